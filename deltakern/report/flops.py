"""FLOPs in closed form: every op that multiplies matrices, every model, and the systems that the paper compares.

Conventions: a multiply-add counts 2. Linear layers, the patch embedding, QK^T and PV are counted, nothing else: norms,
activations, rotations and losses are memory traffic, not arithmetic, on the machines that this package is for. Masked scores
count like any other, since dense kernels compute them. The functions return integers (FLOP, not giga).

``register()`` teaches torch's FlopCounterMode the ops of this package, ``fvcore_handles()`` fvcore's FlopCountAnalysis; tests
hold both counters against the closed forms on the meta device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch


@dataclass(frozen=True)
class Sizes:
    """Sizes of a backbone, a tokenizer and a predictor; the defaults are the released models'.

    ``backbone_mlp`` and ``tokenizer_mlp`` are hidden widths before SwiGLU's rule of two thirds; the predictor's MLP has
    ``mlp_ratio`` times its width.
    """

    hidden: int = 768
    heads: int = 12
    patch: int = 16
    registers: int = 4
    backbone_layers: int = 12
    backbone_mlp: int = 3072
    tokenizer_layers: int = 12
    tokenizer_mlp: int = 3072
    use_delta: bool = True
    use_swiglu: bool = True
    use_gated_attn: bool = True
    use_qk_norm: bool = True
    predictor_hidden: int = 768
    predictor_layers: int = 12
    mlp_ratio: int = 4

    def patches(self, height: int, width: int) -> int:
        """Patches of a frame of so many pixels."""
        for name, pixels in (("height", height), ("width", width)):
            if pixels <= 0 or pixels % self.patch:
                raise ValueError(f"patches: {name} must be a positive multiple of {self.patch}, got {pixels}")
        return (height // self.patch) * (width // self.patch)

    @property
    def tokenizer_hidden(self) -> int:
        return 2 * self.tokenizer_mlp // 3 if self.use_swiglu else self.tokenizer_mlp


RELEASED = Sizes()


def linear(rows: int, inputs: int, outputs: int) -> int:
    """A linear layer on ``rows`` rows; its bias is not counted."""
    return 2 * rows * inputs * outputs


def attention(queries: int, keys: int, width: int) -> int:
    """QK^T and PV of all heads together, ``width`` channels in all."""
    return 4 * queries * keys * width


def _block(tokens: int, width: int, hidden: int, *, products: int, gates: int = 0) -> int:
    """A self-attention block; ``products`` of the MLP is 3 with SwiGLU and 2 without."""
    projections = 4 * linear(tokens, width, width) + linear(tokens, width, gates)
    return projections + attention(tokens, tokens, width) + products * linear(tokens, width, hidden)


def backbone(height: int, width: int, sizes: Sizes = RELEASED) -> int:
    """The frozen backbone on one frame."""
    patches = sizes.patches(height, width)
    embedding = linear(patches, 3 * sizes.patch**2, sizes.hidden)
    return embedding + sizes.backbone_layers * _block(1 + sizes.registers + patches, sizes.hidden, sizes.backbone_mlp, products=2)


def _tokenizer_block(tokens: int, sizes: Sizes) -> int:
    gates = sizes.heads if sizes.use_gated_attn else 0
    return _block(tokens, sizes.hidden, sizes.tokenizer_hidden, products=3 if sizes.use_swiglu else 2, gates=gates)


def encode(height: int, width: int, sizes: Sizes = RELEASED, *, last_block: str = "all") -> int:
    """DeltaTok.encode of one pair of frames.

    Args:
        last_block: "all" as the release runs it; "token" for the delta token's row alone; "folded" when V is not formed either
            (see ``ops.delta_pool``).
    """
    tokens = 1 + (2 if sizes.use_delta else 1) * sizes.patches(height, width)
    block = _tokenizer_block(tokens, sizes)
    if last_block == "all":
        return sizes.tokenizer_layers * block
    if last_block not in ("token", "folded"):
        raise ValueError(f"encode: last_block must be 'all', 'token' or 'folded', got {last_block!r}")
    # q, o, gate and the MLP for one row; K for every token; V for every token, or for the heads' pooled rows
    one = _tokenizer_block(1, sizes) - attention(1, 1, sizes.hidden) - 2 * linear(1, sizes.hidden, sizes.hidden)
    last = one + linear(tokens, sizes.hidden, sizes.hidden)
    if last_block == "token":
        last += linear(tokens, sizes.hidden, sizes.hidden) + attention(1, tokens, sizes.hidden)
    else:
        scores, pooling = 2 * tokens * sizes.hidden, 2 * tokens * sizes.hidden * sizes.heads
        last += scores + pooling + linear(1, sizes.hidden, sizes.hidden)
    return (sizes.tokenizer_layers - 1) * block + last


def decode(height: int, width: int, sizes: Sizes = RELEASED) -> int:
    """DeltaTok.decode of one delta token."""
    return sizes.tokenizer_layers * _tokenizer_block(1 + sizes.patches(height, width), sizes)


def predictor_query(sizes: Sizes = RELEASED) -> int:
    """The predictor for one query, less its attention to the context."""
    width = sizes.predictor_hidden
    layer = 2 * linear(1, width, width) + 2 * linear(1, width, sizes.mlp_ratio * width)
    return sizes.predictor_layers * layer + linear(1, width, sizes.hidden)


def predictor_context(sizes: Sizes = RELEASED) -> int:
    """Keys and values of one context token in all layers."""
    return sizes.predictor_layers * linear(1, sizes.hidden, 2 * sizes.predictor_hidden)


def predictor(queries: int, keys: int, sizes: Sizes = RELEASED, *, new_keys: int | None = None) -> int:
    """The predictor on ``queries`` queries that all meet ``keys`` keys, of which ``new_keys`` (all by default) are projected."""
    projected = keys if new_keys is None else new_keys
    met = sizes.predictor_layers * attention(queries, keys, sizes.predictor_hidden)
    return queries * predictor_query(sizes) + projected * predictor_context(sizes) + met


def candidates(sizes: Sizes = RELEASED, *, frames: int = 8, count: int = 256) -> int:
    """The search pass of one clip: ``count`` candidates for each frame after the first."""
    return predictor((frames - 1) * count, frames - 1, sizes)


def deltatok_training(height: int, width: int, sizes: Sizes = RELEASED, *, last_block: str = "all") -> int:
    """One pair of frames: two backbone passes, encode and decode forward and backward (three times the forward)."""
    return 2 * backbone(height, width, sizes) + 3 * (encode(height, width, sizes, last_block=last_block) + decode(height, width, sizes))


def deltaworld_training(
    height: int,
    width: int,
    sizes: Sizes = RELEASED,
    *,
    frames: int = 8,
    count: int = 256,
    last_block: str = "all",
    black_frame: bool = True,
    from_tokens: bool = False,
) -> int:
    """One clip. ``black_frame=False``: its features are kept; ``from_tokens``: delta tokens are read from a store."""
    search_and_winner = candidates(sizes, frames=frames, count=count) + 3 * predictor(frames - 1, frames - 1, sizes)
    if from_tokens:
        return search_and_winner
    seen = frames + (1 if black_frame else 0)
    return seen * backbone(height, width, sizes) + frames * encode(height, width, sizes, last_block=last_block) + search_and_winner


def sample(sizes: Sizes = RELEASED, *, context: int = 4, horizon: int = 3, samples: int = 20, cached: bool = True) -> int:
    """The predictor's part of a rollout: tokens only. ``cached=False`` projects every sample's past anew at every step."""
    total = context * predictor_context(sizes) if cached else 0
    for step in range(horizon):
        keys = context + step
        if cached:  # the token of the last step is new to its sample; the context was projected once for all
            projected = samples if step else 0
            total += samples * predictor(1, keys, sizes, new_keys=0) + projected * predictor_context(sizes)
        else:
            total += samples * predictor(1, keys, sizes)
    return total


def rollout(
    height: int,
    width: int,
    sizes: Sizes = RELEASED,
    *,
    context: int = 4,
    horizon: int = 3,
    samples: int = 20,
    decoded: int | None = None,
    cached: bool = False,
    last_block: str = "all",
) -> int:
    """One clip's forecast: the context's backbone and encode, the predictor, and ``decoded`` decodes (every sample and step).

    The black frame's features are taken as known and the target frames are not tokenized: that is how the paper counts.
    """
    seen = context * (backbone(height, width, sizes) + encode(height, width, sizes, last_block=last_block))
    decodes = samples * horizon if decoded is None else decoded
    return seen + sample(sizes, context=context, horizon=horizon, samples=samples, cached=cached) + decodes * decode(height, width, sizes)


def dinoworld_rollout(height: int, width: int, sizes: Sizes = RELEASED, *, context: int = 4, horizon: int = 3) -> int:
    """The dense baseline's forecast of one clip: every patch a query, every past patch a key, nothing sampled or cached."""
    patches = sizes.patches(height, width)
    steps = sum(predictor(patches, (context + step) * patches, sizes) for step in range(horizon))
    return context * backbone(height, width, sizes) + steps


def parameters(sizes: Sizes = RELEASED) -> dict[str, int]:
    """Parameters of the parts: backbone, encoder, decoder, tokenizer (both and the embeddings), predictor, deltaworld, dinoworld."""
    width, head = sizes.hidden, sizes.hidden // sizes.heads
    norms_and_scales = 2 * 2 * width + 2 * width
    projections = 4 * width * width + 3 * width  # k has no bias
    mlp = 2 * width * sizes.backbone_mlp + sizes.backbone_mlp + width
    embeddings = 3 * sizes.patch**2 * width + width + (1 + 1 + sizes.registers) * width  # cls, mask and register tokens
    found = {"backbone": embeddings + sizes.backbone_layers * (projections + mlp + norms_and_scales) + 2 * width}
    hidden = sizes.tokenizer_hidden
    mlp = (3 if sizes.use_swiglu else 2) * width * hidden + (2 if sizes.use_swiglu else 1) * hidden + width
    gate = (width + 1) * sizes.heads if sizes.use_gated_attn else 0
    block = projections + mlp + norms_and_scales + gate + (2 * head if sizes.use_qk_norm else 0)
    found["encoder"] = found["decoder"] = sizes.tokenizer_layers * block
    found["tokenizer"] = 2 * sizes.tokenizer_layers * block + 3 * width + 2 * width
    inner = sizes.predictor_hidden
    attending = 2 * (inner * inner + inner) + (width + 1) * 2 * inner
    mlp = 2 * sizes.mlp_ratio * inner * inner + (sizes.mlp_ratio + 1) * inner
    found["predictor"] = sizes.predictor_layers * (attending + mlp + 4 * inner + 2 * inner) + 2 * inner + (inner + 1) * width
    found["deltaworld"] = found["backbone"] + found["tokenizer"] + found["predictor"]
    found["dinoworld"] = found["backbone"] + found["predictor"] + inner  # and its one learned query
    return found


def pieces(height: int, width: int, sizes: Sizes = RELEASED) -> dict[str, int]:
    """The pieces of the models at one frame size, by a readable name: the table of the report."""
    at = (height, width, sizes)
    return {
        "backbone, a frame": backbone(*at),
        "encode, a pair (release)": encode(*at),
        "encode, last block for the token alone": encode(*at, last_block="token"),
        "encode, and V folded": encode(*at, last_block="folded"),
        "decode, a frame": decode(*at),
        "predictor, a query without K and V": predictor_query(sizes),
        "predictor, K and V of a context token": predictor_context(sizes),
        "candidates, 7 x 256 queries": candidates(sizes),
        "DeltaTok training, a pair": deltatok_training(*at),
        "DeltaTok training, V folded": deltatok_training(*at, last_block="folded"),
        "DeltaWorld training, a clip of 8": deltaworld_training(*at),
        "DeltaWorld training, without savable work": deltaworld_training(*at, last_block="folded", black_frame=False),
        "DeltaWorld training from stored tokens": deltaworld_training(*at, from_tokens=True),
        "rollout, 4 + 3 frames, 20 samples (release)": rollout(*at),
        "rollout, one future decoded": rollout(*at, decoded=3, cached=True, last_block="folded"),
        "token-space sample, 3 frames, 20 samples": sample(sizes),
    }


@dataclass(frozen=True)
class System:
    """One row of the comparison of forecasting systems (mid horizon, two crops a frame as in the paper).

    Attributes:
        tokens: tokens that the predictor handles for a frame at 512 px; None where nobody published it.
        parameters: of everything that runs.
        gflop: published figure where ``published``, else from the closed forms of this module.
        paper_gflop: the paper's figure for the same system, where this module computes its own.
        flops_ratio, parameter_ratio, token_ratio: against DeltaWorld's row.
    """

    name: str
    size: int
    published: bool
    tokens: int | None
    parameters: float
    gflop: float
    paper_gflop: float | None
    flops_ratio: float
    parameter_ratio: float
    token_ratio: float | None
    note: str = ""


PUBLISHED: dict[str, dict[int, float]] = {
    "DeltaWorld": {512: 3.1e4, 256: 6721.0},
    "DINO-world": {512: 5.8e3, 256: 959.0},
    "Cosmos-4B": {512: 6.0e7},
    "Cosmos-12B": {512: 6.4e7},
}
"""GFLOPs of the paper (arXiv 2604.04913), by frame size. Cosmos leaves out its tokenizer and prefill there."""

CROPS = 2  # a rectangular frame is evaluated as two square crops


def dinoworld_attention(height: int, width: int, sizes: Sizes = RELEASED, *, context: int = 4, horizon: int = 3) -> int:
    """The attention products within :func:`dinoworld_rollout`'s predictor."""
    patches = sizes.patches(height, width)
    met = sum(attention(patches, (context + step) * patches, sizes.predictor_hidden) for step in range(horizon))
    return sizes.predictor_layers * met


def systems(size: int = 512, sizes: Sizes = RELEASED) -> list[System]:
    """The table of systems at one frame size: DeltaWorld, DINO-world, and as published Cosmos-4B and Cosmos-12B.

    The paper's own figures for DeltaWorld are those of this convention (31,349 against 3.1e4 and 6,725 against 6,721). For DINO-world
    they are higher (5.8e3 against 4,627 and 959 against 886), and with 4 frames of context and 3 steps no choice of queries, crops,
    cached projections or backbone passes gives both of them. What does, to their digits, is the predictor's attention counted twice:
    5,786 and 958.8. So it would be if a query met the patches of both crops, which the released evaluation treats as two clips. It is
    not added here.
    """
    own = parameters(sizes)
    ours = CROPS * rollout(size, size, sizes)
    patches = sizes.patches(size, size)
    rows: list[tuple[str, bool, int | None, float, float, str]] = [
        ("DeltaWorld", False, 1, own["deltaworld"], ours / 1e9, "20 samples, every one decoded at every step"),
        ("DINO-world", False, patches, own["dinoworld"], CROPS * dinoworld_rollout(size, size, sizes) / 1e9, "one deterministic forecast"),
    ]
    cosmos = (("Cosmos-4B", 4e9), ("Cosmos-12B", 12e9))
    note = "as published; predictor's parameters, its 7B diffusion decoder not counted in them"
    rows += [(name, True, None, count, PUBLISHED[name][size], note) for name, count in cosmos if size in PUBLISHED[name]]
    return [
        System(
            name=name,
            size=size,
            published=published,
            tokens=tokens,
            parameters=count,
            gflop=gflop,
            paper_gflop=PUBLISHED[name].get(size),
            flops_ratio=gflop / (ours / 1e9),
            parameter_ratio=count / own["deltaworld"],
            token_ratio=tokens,
            note=note,
        )
        for name, published, tokens, count, gflop, note in rows
    ]


def claims(sizes: Sizes = RELEASED) -> dict[str, float]:
    """The project page's figures, from the table of systems at 512 px: how many times fewer tokens a frame than a dense predictor,
    and fewer parameters and FLOPs than Cosmos, of which the figures are as published."""
    rows = {s.name: s for s in systems(512, sizes)}
    return {
        "tokens a frame, DINO-world": rows["DINO-world"].token_ratio,
        "parameters, Cosmos-12B": rows["Cosmos-12B"].parameter_ratio,
        "FLOPs, Cosmos-4B": rows["Cosmos-4B"].flops_ratio,
        "FLOPs, Cosmos-12B": rows["Cosmos-12B"].flops_ratio,
    }


# ---- the counters -------------------------------------------------------------------------------------------------------

_NAMESPACE = "deltakern"
_MULTIPLYING = ("delta_pool", "context_attention", "best_of_n_head")  # the other ops multiply no matrices


def op_flops(op: str, shapes: Mapping[str, Sequence[int] | None]) -> int:
    """FLOPs of one op's forward pass, from the shapes of its arguments by name. Zero for ops that multiply no matrices."""
    if op == "delta_pool":
        batch, length, width = shapes["normed"]
        heads, head = shapes["q"][-2:]
        return 2 * batch * heads * length * (head + width)
    if op == "context_attention":
        batch, queries, heads, head = shapes["q"]
        own = shapes.get("own_k")
        return batch * attention(queries, shapes["k"][1] + (own[2] if own is not None else 0), heads * head)
    if op == "best_of_n_head":
        outputs, width = shapes["head"]
        return linear(prod(shapes["stream"][:-1]), width, outputs)
    return 0


def library_ops() -> dict[str, tuple[str, Any]]:
    """Every op that the package registered with torch: name to (public op that it belongs to, the overload packet)."""
    from deltakern import backend  # with the package come its ops, which register themselves

    names = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith(f"{_NAMESPACE}::")}
    found = {}
    for name in sorted(names):
        owners = [op for op in backend.ops() if name == op or name.startswith(f"{op}_")]
        if not owners:
            raise LookupError(f"library_ops: torch.ops.{_NAMESPACE}.{name} belongs to no op of the package; its name must begin with one")
        found[name] = (max(owners, key=len), getattr(getattr(torch.ops, _NAMESPACE), name))
    return found


def _counted(name: str, op: str, packet: Any) -> Callable[[Sequence[Any]], int]:
    """Takes the shapes of a library op's arguments in order; a backward counts twice its forward."""
    arguments = [a.name for a in packet.default._schema.arguments]
    factor = 2 if "backward" in name else 1
    return lambda shapes: factor * op_flops(op, dict(zip(arguments, shapes, strict=False)))


@functools.cache
def register() -> tuple[str, ...]:
    """Registers every op of the package, and oneDNN's product, with torch's FlopCounterMode, once. Returns the package's names."""
    from torch.utils.flop_counter import register_flop_formula

    def formula(count: Callable[[Sequence[Any]], int]) -> Callable[..., int]:
        return lambda *shapes, out_shape=None, **_: count(shapes)

    found = library_ops()
    for name, (op, packet) in found.items():
        register_flop_formula([packet])(formula(_counted(name, op, packet)))
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # see deltakern.nn.product

        def linear(x: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
            return 2 * prod(out_shape) * x[-1]

        register_flop_formula([torch.ops.mkldnn._linear_pointwise])(linear)
    return tuple(found)


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """Handles for ``fvcore.nn.FlopCountAnalysis(...).set_op_handle(**handles)``: this package's ops, and torch's attention,
    which fvcore does not know. As fvcore has it they count multiply-adds, half of what everything else here counts."""
    from fvcore.nn.jit_handles import get_shape

    def scaled_dot_product(inputs: list[Any], outputs: list[Any]) -> int:
        q, k = get_shape(inputs[0]), get_shape(inputs[1])
        return attention(prod(q[:-1]), k[-2], q[-1]) // 2

    def handle(count: Callable[[Sequence[Any]], int]) -> Callable[[list[Any], list[Any]], int]:
        return lambda inputs, outputs: count([get_shape(i) for i in inputs]) // 2

    own = {f"{_NAMESPACE}::{name}": handle(_counted(name, op, packet)) for name, (op, packet) in library_ops().items()}
    return {**own, "aten::scaled_dot_product_attention": scaled_dot_product}
