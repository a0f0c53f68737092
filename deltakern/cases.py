"""The one registry of cases: for every op the shapes that the models run it at, inputs, bytes and FLOPs.

Tests, benchmarks, doctor and report all read it. A new op is one file in ``deltakern/ops`` and its entries here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from deltakern import ops


@dataclass(frozen=True)
class Case:
    """One call of one op.

    Attributes:
        op: name in ``deltakern.ops``.
        name: unique within the op, e.g. ``"vitb-512"``.
        make: ``make(dtype, device, generator, scale)`` returns ``(args, kwargs)`` of the op; ``scale`` in (0, 1] shrinks the
            sizes that only repeat work (batch, tokens), never the widths.
        differentiable: positions in ``args`` that take a gradient.
        bytes_moved: the fewest bytes of the forward pass, every input read and every output written once, for a dtype.
        flops: multiply-adds counted twice, of the forward pass.
        tags: ``"tiny"`` runs in every test, ``"real"`` is compiled ahead of time: a shape of the released models, or the most that
            a kernel takes; ``"benchmark"`` is timed; ``"float32"`` is compiled in float32 beside bfloat16.
    """

    op: str
    name: str
    make: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]
    differentiable: tuple[int, ...] = ()
    bytes_moved: Callable[[torch.dtype], int] | None = None
    flops: int = 0
    tags: frozenset[str] = field(default_factory=frozenset)

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(ops, self.op)


_CASES: list[Case] = []


def add(case: Case) -> Case:
    if any(c.op == case.op and c.name == case.name for c in _CASES):
        raise ValueError(f"case {case.op}/{case.name} is registered twice")
    _CASES.append(case)
    return case


def cases(op: str | None = None, tag: str | None = None) -> list[Case]:
    """All cases, of one op if named, with one tag if given, in the order of registration."""
    return [c for c in _CASES if (op is None or c.op == op) and (tag is None or tag in c.tags)]


DRAWN = (1 << 24) - 3  # a prime, so that what repeats is no row of anything


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: Any, generator: torch.Generator) -> torch.Tensor:
    """Standard normal values, drawn in float32 on the CPU so that every dtype and device starts from the same numbers.

    Drawing takes a core a second for some hundred million; after ``DRAWN`` values they repeat.
    """
    count = math.prod(shape)
    drawn = torch.randn(min(count, DRAWN), generator=generator).to(device, dtype)
    return (drawn.repeat(-(-count // DRAWN))[:count] if count > DRAWN else drawn).view(shape)


def shrunk(size: int, scale: float) -> int:
    """``size`` times ``scale``, at least one."""
    return max(1, round(size * scale))


def rounded_up(size: int, multiple: int) -> int:
    """``size`` or the next multiple above."""
    return -(-size // multiple) * multiple


def nbytes(*counts: tuple[int, torch.dtype]) -> int:
    """Bytes of so many elements of each dtype."""
    return sum(count * dtype.itemsize for count, dtype in counts)


TINY, REAL, TIMED, WIDE = frozenset({"tiny"}), frozenset({"real"}), frozenset({"real", "benchmark"}), frozenset({"float32"})


# --- patch_delta -----------------------------------------------------------------------------------------------------------


def _patch_delta(
    name: str,
    shape: tuple[int, int, int],
    tags: frozenset[str],
    *,
    mode: str,
    stream: torch.dtype | None = torch.float32,
    token: tuple[int, ...] = (),
    frozen: bool = False,
) -> None:
    """``shape`` is that of the features, which take no gradient where ``frozen``; ``token`` the token's dimensions before D."""
    reads_prev, reads_curr = mode != "current", mode != "previous"

    def make(dtype, device, generator, shrink):
        batch, patches, width = shrunk(shape[0], shrink), *shape[1:]
        features = (batch, patches, width)
        dims = (batch, 1) if len(token) == 2 else token
        args = (
            normal(features, dtype, device, generator) if reads_prev else None,
            normal(features, dtype, device, generator) if reads_curr else None,
            normal((*dims, width), torch.float32 if stream else dtype, device, generator),
            normal((2, width), torch.float32, device, generator) if reads_curr else None,
            normal((width,), torch.float32, device, generator),
            normal((width,), torch.float32, device, generator),
        )
        return args, {"mode": mode, "out_dtype": dtype, "stream_dtype": stream or dtype}

    batch, patches, width = shape
    read = batch * patches * width * (reads_prev + reads_curr)
    written = batch * (1 + patches * (2 if mode == "pair" else 1)) * width
    features = () if frozen else ((0,) if reads_prev else ()) + ((1,) if reads_curr else ())
    add(
        Case(
            "patch_delta",
            name,
            make,
            (*features, 2, *((3,) if reads_curr else ()), 4, 5),
            lambda dtype: nbytes((read + written, dtype), (written, stream or dtype)),
            10 * written,
            tags,
        )
    )


_patch_delta("pair", (3, 5, 37), TINY, mode="pair")
_patch_delta("difference", (3, 4, 24), TINY, mode="difference")
_patch_delta("current", (3, 7, 9), TINY, mode="current", stream=None)
_patch_delta("previous", (3, 5, 16), TINY, mode="previous", token=(3, 1))
_patch_delta("pair-frozen", (4, 3, 20), TINY, mode="pair", token=(1,), frozen=True, stream=None)
_patch_delta("encoder-512", (64, 1024, 768), TIMED, mode="pair", frozen=True)
_patch_delta("encoder-512-bf16-stream", (64, 1024, 768), REAL, mode="pair", stream=None, frozen=True)
_patch_delta("encoder-512-difference", (64, 1024, 768), TIMED, mode="difference", frozen=True)
_patch_delta("encoder-512-current", (64, 1024, 768), REAL, mode="current", frozen=True)
_patch_delta("decoder-512", (64, 1024, 768), TIMED, mode="previous", token=(64, 1), frozen=True)
_patch_delta("vit-large", (64, 1024, 1024), REAL, mode="pair")
_patch_delta("vit-huge", (64, 1024, 1280), REAL, mode="difference")


# --- residual_norm ---------------------------------------------------------------------------------------------------------


def _residual_norm(
    name: str,
    shape: tuple[int, ...],
    tags: frozenset[str],
    *,
    scale: bool = True,
    norm: bool = True,
    bias: bool = True,
    stream: torch.dtype | None = None,
) -> None:
    """``stream`` is the stream's dtype where it is not the branch's; ``normed`` has the branch's."""

    def make(dtype, device, generator, shrink):
        *lead, width = shape
        lead = [shrunk(lead[0], shrink), *lead[1:]] if lead else lead
        full = (*lead, width)
        args = (
            normal(full, stream or dtype, device, generator),
            normal(full, dtype, device, generator),
            normal((width,), torch.float32, device, generator) if scale else None,
            normal((width,), torch.float32, device, generator) if norm else None,
            normal((width,), torch.float32, device, generator) if norm and bias else None,
        )
        return args, {"out_dtype": dtype} if norm else {}

    count = math.prod(shape)
    wanted = (0, 1, *((2,) if scale else ()), *((3,) if norm else ()), *((4,) if norm and bias else ()))
    add(
        Case(
            "residual_norm",
            name,
            make,
            wanted,
            lambda dtype: nbytes((2 * count, stream or dtype), ((2 if norm else 1) * count, dtype)),
            (10 if norm else 2) * count,
            tags,
        )
    )


_residual_norm("odd", (3, 5, 37), TINY)
_residual_norm("float32-stream", (3, 7, 24), TINY, stream=torch.float32)
_residual_norm("folded-scale", (4, 3, 2, 20), TINY, scale=False)
_residual_norm("no-bias", (11, 65), TINY, bias=False)
_residual_norm("last-block", (3, 3, 16), TINY, norm=False)
_residual_norm("sum-only", (5, 9), TINY, scale=False, norm=False)
_residual_norm("one-row", (13,), TINY)
_residual_norm("encoder-512", (64, 2049, 768), TIMED, stream=torch.float32)
_residual_norm("decoder-512", (64, 1025, 768), TIMED, stream=torch.float32)
_residual_norm("encoder-512-bf16-stream", (64, 2049, 768), TIMED)
_residual_norm("predictor", (1024, 7, 768), REAL, norm=False)
_residual_norm("backbone-512-frozen", (128, 1029, 768), TIMED, scale=False)
_residual_norm("vit-large", (64, 1025, 1024), REAL, stream=torch.float32)
_residual_norm("vit-huge", (64, 1025, 1280), REAL, stream=torch.float32)


# --- layer_norm ------------------------------------------------------------------------------------------------------------


def _layer_norm(
    name: str, shape: tuple[int, ...], tags: frozenset[str], *, bias: bool = True, stream: torch.dtype | None = torch.float32
) -> None:
    """``stream`` is x's dtype where it is not the output's."""

    def make(dtype, device, generator, shrink):
        vectors = [normal(shape[-1:], torch.float32, device, generator) for _ in range(1 + bias)]
        x = normal((shrunk(shape[0], shrink), *shape[1:]), stream or dtype, device, generator)
        return (x, vectors[0], vectors[1] if bias else None), {"out_dtype": dtype}

    count = math.prod(shape)
    wanted = (0, 1, 2) if bias else (0, 1)
    add(Case("layer_norm", name, make, wanted, lambda dtype: nbytes((count, stream or dtype), (count, dtype)), 8 * count, tags))


_layer_norm("odd", (3, 5, 37), TINY, stream=None)
_layer_norm("float32-stream", (4, 3, 2, 24), TINY)
_layer_norm("no-bias", (11, 65), TINY, bias=False)
_layer_norm("encoder-512", (64, 2049, 768), TIMED)
_layer_norm("backbone-512-frozen", (128, 1029, 768), REAL)
_layer_norm("vit-large", (64, 1025, 1024), REAL)
_layer_norm("vit-huge", (64, 1025, 1280), REAL, stream=None)


# --- gelu, swiglu ----------------------------------------------------------------------------------------------------------


def _activation(op: str, name: str, shape: tuple[int, ...], tags: frozenset[str]) -> None:
    """``shape`` is the input's."""

    def make(dtype, device, generator, shrink):
        return (2 * normal((shrunk(shape[0], shrink), *shape[1:]), dtype, device, generator),), {}

    count = math.prod(shape)
    read_and_written = 2 * count if op == "gelu" else count + count // 2
    add(Case(op, name, make, (0,), lambda dtype: nbytes((read_and_written, dtype)), (8 if op == "gelu" else 3) * count, tags))


_activation("gelu", "odd", (3, 5, 37), TINY)
_activation("gelu", "two-tiles", (3, 700), TINY)
_activation("gelu", "vector", (5,), TINY)
_activation("gelu", "backbone-512", (128, 1029, 3072), TIMED)
_activation("gelu", "predictor", (1024, 7, 3072), REAL)
_activation("swiglu", "odd", (3, 5, 34), TINY)
_activation("swiglu", "two-tiles", (3, 1, 2060), TINY)
_activation("swiglu", "four-dimensions", (3, 2, 3, 16), TINY)
_activation("swiglu", "vector", (10,), TINY)
_activation("swiglu", "encoder-512", (64, 2049, 4096), TIMED)
_activation("swiglu", "decoder-512", (64, 1025, 4096), TIMED)
_activation("swiglu", "vit-huge", (64, 1025, 6826), REAL)


# --- recon_loss ------------------------------------------------------------------------------------------------------------


def _recon_loss(
    name: str,
    shape: tuple[int, ...],
    tags: frozenset[str],
    *,
    kind: str,
    target: torch.dtype | None = None,
    wanted: tuple[int, ...] = (0,),
) -> None:
    """``target`` is the target's dtype where it is not the prediction's."""

    def make(dtype, device, generator, shrink):
        full = (shrunk(shape[0], shrink), *shape[1:]) if shape else ()
        pred = normal(full, dtype, device, generator)
        return (pred, normal(full, target or dtype, device, generator) * 0.5), {"kind": kind, "beta": 0.3}

    count = math.prod(shape)
    add(Case("recon_loss", name, make, wanted, lambda dtype: nbytes((count, dtype), (count, target or dtype)), 8 * count, tags))


_recon_loss("odd", (3, 5, 37), TINY, kind="log_cosh", wanted=(0, 1))
_recon_loss("several-tiles", (3, 5000), TINY, kind="log_cosh")
_recon_loss("float32-target", (3, 5, 37), TINY, kind="log_cosh", target=torch.float32, wanted=(0, 1))
_recon_loss("smooth-l1", (3, 4, 3, 11), TINY, kind="smooth_l1", wanted=(0, 1))
_recon_loss("mse", (3, 7, 9), TINY, kind="mse", wanted=(0, 1))
_recon_loss("scalar", (), TINY, kind="log_cosh")
_recon_loss("tokenizer-512", (64, 1024, 768), TIMED, kind="log_cosh")
_recon_loss("tokenizer-512-float32-target", (64, 1024, 768), REAL, kind="log_cosh", target=torch.float32)
_recon_loss("tokenizer-256-smooth-l1", (128, 256, 768), REAL, kind="smooth_l1")
_recon_loss("tokenizer-256-mse", (128, 256, 768), REAL, kind="mse")


# --- rope_qk_norm ----------------------------------------------------------------------------------------------------------


def _rope_qk_norm(
    name: str,
    batch: int,
    patches: int,
    heads: int,
    head: int,
    tags: frozenset[str],
    *,
    order: str = "pre_rope",
    prefix: int = 1,
    frames: int = 1,
    q: bool = True,
    q_norm: bool = True,
    k_norm: bool = True,
) -> None:
    """q and k are slices of a packed projection of q, k, v and gate logits, whose rows are a multiple of 16 channels long."""

    def make(dtype, device, generator, shrink):
        width, count = heads * head, min(patches, 5 + shrunk(patches, shrink))
        length = prefix + frames * count
        packed = normal((shrunk(batch, shrink), length, 3 * width + rounded_up(heads, 16)), dtype, device, generator)
        angles = 6 * normal((count, head // 2), torch.float32, device, generator).repeat(1, 2)
        weights = [1 + 0.1 * normal((head,), torch.float32, device, generator) for _ in range(2)]
        args = (
            packed[..., :width].unflatten(-1, (heads, head)) if q else None,
            packed[..., width : 2 * width].unflatten(-1, (heads, head)),
            angles.cos(),
            angles.sin(),
            weights[0] if q_norm else None,
            weights[1] if k_norm else None,
        )
        return args, {"order": order, "num_prefix": prefix}

    length, tensors = prefix + frames * patches, 2 if q else 1
    count = tensors * batch * length * heads * head
    wanted = (*((0,) if q else ()), 1, *((4,) if q and q_norm else ()), *((5,) if k_norm else ()))
    add(
        Case(
            "rope_qk_norm",
            name,
            make,
            wanted,
            lambda dtype: nbytes((2 * count, dtype), (2 * patches * head, torch.float32)),
            (10 if q_norm or k_norm else 3) * count,
            tags,
        )
    )


_rope_qk_norm("pair", 3, 9, 3, 10, TINY, frames=2)
_rope_qk_norm("post-rope", 3, 7, 2, 16, TINY, order="post_rope", frames=2)
_rope_qk_norm("no-norm", 3, 5, 3, 8, TINY, prefix=5, q_norm=False, k_norm=False)
_rope_qk_norm("q-norm-only", 4, 6, 2, 6, TINY, prefix=0, k_norm=False)
_rope_qk_norm("keys", 3, 11, 2, 12, TINY, frames=2, q=False)
_rope_qk_norm("prefix-only", 3, 4, 2, 4, TINY, prefix=3, frames=0)
_rope_qk_norm("encoder-512", 64, 1024, 12, 64, TIMED, frames=2)
_rope_qk_norm("encoder-512-post-rope", 64, 1024, 12, 64, TIMED, order="post_rope", frames=2)
_rope_qk_norm("encoder-512-last", 64, 1024, 12, 64, REAL, frames=2, q=False)
_rope_qk_norm("decoder-512", 64, 1024, 12, 64, TIMED)
_rope_qk_norm("backbone-512", 128, 1024, 12, 64, TIMED, prefix=5, q_norm=False, k_norm=False)
_rope_qk_norm("vit-large", 64, 1024, 16, 64, REAL, frames=2)
_rope_qk_norm("vit-huge", 64, 1024, 20, 64, REAL, frames=2)


# --- split_qkv -------------------------------------------------------------------------------------------------------------


def _split_qkv(
    name: str,
    batch: int,
    patches: int,
    heads: int,
    head: int,
    tags: frozenset[str],
    *,
    order: str = "pre_rope",
    prefix: int = 1,
    frames: int = 1,
    norm: bool = True,
    gated: bool = True,
) -> None:
    def make(dtype, device, generator, shrink):
        count = min(patches, 5 + shrunk(patches, shrink))
        channels = 3 * heads * head + (rounded_up(heads, 16) if gated else 0)
        packed = normal((shrunk(batch, shrink), prefix + frames * count, channels), dtype, device, generator)
        angles = 6 * normal((count, head // 2), torch.float32, device, generator).repeat(1, 2)
        weights = [1 + 0.1 * normal((head,), torch.float32, device, generator) for _ in range(2)] if norm else [None, None]
        return (packed, angles.cos(), angles.sin(), *weights), {"heads": heads, "gated": gated, "order": order, "num_prefix": prefix}

    rotated = 2 * batch * (prefix + frames * patches) * heads * head  # v and the gate's logits are views: nothing is moved
    add(
        Case(
            "split_qkv",
            name,
            make,
            (0, 3, 4) if norm else (0,),
            lambda dtype: nbytes((2 * rotated, dtype), (2 * patches * head, torch.float32)),
            (10 if norm else 3) * rotated,
            tags,
        )
    )


_split_qkv("pair", 3, 9, 3, 10, TINY, frames=2)
_split_qkv("post-rope", 3, 7, 2, 8, TINY, order="post_rope", gated=False)
_split_qkv("no-norm", 2, 5, 3, 4, TINY, prefix=5, norm=False)
_split_qkv("encoder-512", 64, 1024, 12, 64, TIMED, frames=2)
_split_qkv("encoder-512-post-rope", 64, 1024, 12, 64, REAL, order="post_rope", frames=2)
_split_qkv("decoder-512", 64, 1024, 12, 64, TIMED)
_split_qkv("backbone-512", 128, 1024, 12, 64, REAL, prefix=5, norm=False, gated=False)
_split_qkv("vit-large", 64, 1024, 16, 64, REAL, frames=2)
_split_qkv("vit-huge", 64, 1024, 20, 64, REAL, frames=2)


# --- head_gate -------------------------------------------------------------------------------------------------------------


def _head_gate(name: str, batch: int, length: int, heads: int, head: int, tags: frozenset[str]) -> None:
    """The attention's output lies as (B,H,L,d) in memory, as torch's attention leaves it; the logits are a slice of the projection."""

    def make(dtype, device, generator, shrink):
        clips, tokens = shrunk(batch, shrink), min(length, 5 + shrunk(length, shrink))
        attn = normal((clips, heads, tokens, head), dtype, device, generator).transpose(1, 2)
        packed = normal((clips, tokens, 3 * heads * head + rounded_up(heads, 16)), dtype, device, generator)
        return (attn, packed[..., 3 * heads * head :][..., :heads]), {}

    count = batch * length * heads
    add(Case("head_gate", name, make, (0, 1), lambda dtype: nbytes(((2 * head + 1) * count, dtype)), count * (head + 4), tags))


_head_gate("odd", 3, 13, 3, 10, TINY)
_head_gate("one-channel", 3, 5, 2, 1, TINY)
_head_gate("wide", 3, 2, 5, 72, TINY)
_head_gate("encoder-512", 64, 2049, 12, 64, TIMED)
_head_gate("decoder-512", 64, 1025, 12, 64, TIMED)
_head_gate("vit-large", 64, 1025, 16, 64, REAL)
_head_gate("vit-huge", 64, 1025, 20, 64, REAL)


# --- delta_pool ------------------------------------------------------------------------------------------------------------


def _delta_pool(name: str, batch: int, length: int, heads: int, head: int, width: int, tags: frozenset[str], *, sharp: float = 1.0) -> None:
    """``sharp`` times larger queries concentrate the softmax on few tokens."""

    def make(dtype, device, generator, shrink):
        clips, tokens = shrunk(batch, shrink), min(length, 512 + shrunk(length, shrink))  # more than one split
        args = (
            normal((clips, tokens, width), dtype, device, generator),
            (sharp * normal((clips, heads, head), torch.float32, device, generator)).to(dtype),
            normal((clips, tokens, heads, head), dtype, device, generator),
        )
        return args, {"scale": head**-0.5}

    tokens, rows = batch * length, batch * heads
    add(
        Case(
            "delta_pool",
            name,
            make,
            (0, 1, 2),
            lambda dtype: nbytes((tokens * (width + heads * head) + rows * (width + head), dtype)),
            2 * tokens * heads * (width + head),
            tags,
        )
    )


_delta_pool("odd", 3, 37, 3, 10, 21, TINY)
_delta_pool("one-token", 3, 1, 2, 8, 16, TINY)
_delta_pool("several-splits", 2, 530, 2, 4, 5, TINY)
_delta_pool("sharp", 3, 70, 2, 16, 130, TINY, sharp=20.0)
_delta_pool("one-head", 3, 9, 1, 6, 6, TINY)
_delta_pool("encoder-512", 64, 2049, 12, 64, 768, TIMED)
_delta_pool("encoder-256", 128, 513, 12, 64, 768, TIMED)
_delta_pool("vit-large", 64, 2049, 16, 64, 1024, REAL)
_delta_pool("vit-huge", 64, 2049, 20, 64, 1280, REAL)
_delta_pool("widest", 64, 2049, 64, 64, 4096, REAL | WIDE)


# --- context_attention -----------------------------------------------------------------------------------------------------


def _context_attention(
    name: str,
    batch: int,
    groups: int,
    each: int,
    tokens: int,
    heads: int,
    head: int,
    tags: frozenset[str],
    *,
    rope_size: int,
    causal: bool = False,
    turned: bool = False,
    own: int | None = None,
) -> None:
    """``groups`` of ``each`` queries; ``causal``: group g sees g + 1 tokens; ``turned``: keys are rotated already; ``own``: J."""

    def make(dtype, device, generator, shrink):
        clips, queries = shrunk(batch, shrink), groups * each  # the tiles depend on the size of a group
        seconds = torch.cumsum(0.04 + 0.3 * torch.rand((clips, tokens + groups + (own or 0)), generator=generator), 1).to(device)
        args = (
            normal((clips, queries, heads, head), dtype, device, generator),
            normal((clips, tokens, heads, head), dtype, device, generator),
            normal((clips, tokens, heads, head), dtype, device, generator),
            seconds[:, 1 : groups + 1] if causal else seconds[:, -groups:],
            None if turned else seconds[:, :tokens],
            torch.arange(1, groups + 1, device=device) if causal else None,
        )
        kwargs: dict[str, Any] = {"rope_size": rope_size}
        if own is not None:
            kwargs["own_k"], kwargs["own_v"] = (normal((clips, queries, own, heads, head), dtype, device, generator) for _ in range(2))
            kwargs["own_time"] = None if turned else seconds[:, tokens : tokens + own].double()
        return args, kwargs

    queries = batch * groups * each * heads * head
    keys = tokens + (own or 0)
    moved = 2 * queries + 2 * batch * tokens * heads * head + 2 * (own or 0) * queries
    add(Case("context_attention", name, make, (0, 1, 2), lambda dtype: nbytes((moved, dtype)), 4 * queries * keys, tags))


_context_attention("training", 3, 3, 5, 4, 2, 10, TINY, rope_size=6, causal=True)
_context_attention("several-tiles", 2, 2, 70, 3, 1, 8, TINY, rope_size=8, causal=True)
_context_attention("several-programs", 2, 1, 270, 2, 1, 4, TINY, rope_size=4)
_context_attention("sampling", 3, 1, 7, 4, 3, 12, TINY, rope_size=10)
_context_attention("turned", 3, 2, 3, 17, 1, 16, TINY, rope_size=2, turned=True)
_context_attention("one-query", 3, 1, 1, 1, 1, 6, TINY, rope_size=4)
_context_attention("own", 3, 2, 5, 3, 2, 10, TINY, rope_size=6, own=3)
_context_attention("own-turned", 3, 1, 4, 2, 2, 8, TINY, rope_size=8, own=1, turned=True)
_context_attention("no-own-yet", 3, 1, 4, 2, 2, 8, TINY, rope_size=8, own=0)
_context_attention("candidates", 1024, 7, 256, 7, 12, 64, TIMED, rope_size=60, causal=True)
_context_attention("chosen", 1024, 7, 1, 7, 12, 64, TIMED, rope_size=60, causal=True)
_context_attention("rollout", 1, 1, 20, 4, 12, 64, TIMED, rope_size=60, own=2, turned=True)
_context_attention("rollout-own", 16, 1, 20, 4, 12, 64, REAL, rope_size=60, own=3)
_context_attention("long-context", 64, 1, 1024, 32, 12, 64, TIMED, rope_size=60)
_context_attention("vit-large", 64, 7, 256, 7, 16, 64, REAL, rope_size=60, causal=True)
_context_attention("vit-huge", 64, 7, 256, 7, 20, 64, REAL, rope_size=60, causal=True)
_context_attention("widest", 64, 1, 256, 16, 6, 128, REAL | WIDE, rope_size=120, own=2)
_context_attention("widest-context", 64, 1, 256, 32, 6, 128, REAL, rope_size=120, own=2)


# --- best_of_n -------------------------------------------------------------------------------------------------------------


def _best_of_n(
    name: str,
    shape: tuple[int, ...],
    tags: frozenset[str],
    *,
    reduce_dims: int = 1,
    loss: str = "smooth_l1",
    target: torch.dtype | None = None,
    wanted: tuple[int, ...] = (0, 1),
) -> None:
    """``shape`` is that of the candidates; ``target`` the target's dtype where it is not the candidates'."""
    axis = len(shape) - reduce_dims - 1

    def make(dtype, device, generator, shrink):
        full = (shrunk(shape[0], shrink), *shape[1:]) if axis else shape
        candidates = normal(full, dtype, device, generator)
        wished = normal((*full[:axis], *full[axis + 1 :]), target or dtype, device, generator)
        return (candidates, wished), {"loss": loss, "reduce_dims": reduce_dims}

    count, groups = math.prod(shape), math.prod(shape[:axis])
    wide = count // shape[axis]

    def moved(dtype):
        return nbytes((count, dtype), (wide, target or dtype), (groups, torch.int64), (groups, torch.float32))

    add(Case("best_of_n", name, make, wanted, moved, 6 * count, tags))


_best_of_n("odd", (3, 5, 37), TINY)
_best_of_n("one-candidate", (3, 1, 8), TINY, loss="l1")
_best_of_n("no-leading-dimension", (7, 16), TINY, loss="mse")
_best_of_n("feature-maps", (3, 4, 3, 19), TINY, reduce_dims=2, loss="log_cosh")
_best_of_n("float32-target", (3, 2, 9, 24), TINY, target=torch.float32)
_best_of_n("several-blocks", (3, 2, 4099), TINY)
_best_of_n("training", (32, 7, 256, 768), TIMED, wanted=())
_best_of_n("training-8-clips", (8, 7, 256, 768), TIMED, wanted=())
_best_of_n("training-float32-target", (32, 7, 256, 768), REAL, target=torch.float32, wanted=())
_best_of_n("best-sample-512", (1, 20, 1024, 768), TIMED, reduce_dims=2, wanted=())
_best_of_n("best-sample-256", (16, 20, 256, 768), TIMED, reduce_dims=2, wanted=())
_best_of_n("search-65536", (1, 65536, 768), REAL, wanted=())


# --- best_of_n_head --------------------------------------------------------------------------------------------------------


def _best_of_n_head(
    name: str,
    shape: tuple[int, ...],
    outputs: int,
    tags: frozenset[str],
    *,
    reduce_dims: int = 1,
    loss: str = "smooth_l1",
    stream: torch.dtype | None = torch.float32,
    target: torch.dtype | None = torch.float32,
    branch: bool = True,
    scale: bool = True,
    bias: bool = True,
    head_bias: bool = True,
    losses: bool = False,
) -> None:
    """``shape`` is the stream's; ``stream`` and ``target`` are those tensors' dtypes where they are not the head's.

    A group's target is near the prediction of one of its candidates, so that the same one wins in every dtype.
    """
    axis = len(shape) - reduce_dims - 1

    def make(dtype, device, generator, shrink):
        full = (shrunk(shape[0], shrink), *shape[1:]) if axis else shape
        width = shape[-1]
        x = normal(full, stream or dtype, device, generator)
        y = normal(full, dtype, device, generator) if branch else None
        gamma = 0.5 * normal((width,), torch.float32, device, generator) if branch and scale else None
        weight = 1 + 0.1 * normal((width,), torch.float32, device, generator)
        shift = 0.1 * normal((width,), torch.float32, device, generator) if bias else None
        head = (normal((outputs, width), torch.float32, device, generator) / math.sqrt(width)).to(dtype)
        offset = 0.1 * normal((outputs,), torch.float32, device, generator) if head_bias else None
        groups, count = math.prod(full[:axis]), full[axis]
        winner = torch.arange(groups, device=device), (5 * torch.arange(groups, device=device) + 3) % count

        def of_winner(t):
            return t.reshape(groups, count, *full[axis + 1 :])[winner].float()

        total = of_winner(x)
        if y is not None:
            total = total + of_winner(y) * (1.0 if gamma is None else gamma)
        predicted = torch.nn.functional.layer_norm(total, (width,), weight, shift) @ head.float().T
        if offset is not None:
            predicted = predicted + offset
        wished = (*full[:axis], *full[axis + 1 : -1], outputs)
        goal = predicted.reshape(wished) + 0.5 * normal(wished, torch.float32, device, generator)
        args = (x, y, gamma, weight, shift, head, offset, goal.to(target or dtype))
        return args, {"loss": loss, "reduce_dims": reduce_dims, "return_losses": losses}

    rows, groups, width = math.prod(shape[:-1]), math.prod(shape[:axis]), shape[-1]
    wide = math.prod(shape[axis + 1 : -1]) * groups * outputs

    def moved(dtype):
        read = nbytes((rows * width, stream or dtype), (rows * width * branch, dtype), (outputs * width, dtype), (wide, target or dtype))
        return read + nbytes((groups, torch.int64), (groups, torch.float32), (rows * losses, torch.float32))

    add(Case("best_of_n_head", name, make, (), moved, 2 * rows * width * outputs, tags))


_best_of_n_head("odd", (3, 5, 37), 29, TINY, losses=True)
_best_of_n_head("several-tiles", (2, 150, 70), 261, TINY, stream=None, target=None, losses=True)
_best_of_n_head("stream-alone", (2, 2, 4, 24), 24, TINY, branch=False, loss="log_cosh")
_best_of_n_head("folded-scale", (3, 7, 16), 40, TINY, scale=False, bias=False, loss="mse", losses=True)
_best_of_n_head("one-group", (9, 20), 8, TINY, head_bias=False, loss="l1")
_best_of_n_head("one-candidate", (4, 1, 65), 3, TINY)
_best_of_n_head("patches", (2, 5, 3, 33), 19, TINY, reduce_dims=2, losses=True)
_best_of_n_head("many-patches", (2, 4, 3, 50, 16), 20, TINY, reduce_dims=3, stream=None, losses=True)
_best_of_n_head("training", (32 * 7, 256, 768), 768, TIMED)
_best_of_n_head("training-4096", (4 * 7, 4096, 768), 768, TIMED)
_best_of_n_head("training-bf16-stream", (32 * 7, 256, 768), 768, REAL, stream=None, target=None)
_best_of_n_head("training-log-cosh", (32 * 7, 256, 768), 768, REAL, loss="log_cosh")
_best_of_n_head("folded-4096", (4 * 7, 4096, 768), 768, REAL, scale=False)
_best_of_n_head("dense-256", (8 * 7, 16, 256, 768), 768, REAL, reduce_dims=2)
_best_of_n_head("vit-large", (32 * 7, 256, 1024), 1024, REAL)
_best_of_n_head("vit-huge", (32 * 7, 256, 1280), 1280, REAL)
