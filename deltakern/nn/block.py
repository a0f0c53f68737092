"""The pre-norm transformer block, wired from ops, under the released parameter names: one body for backbone, tokenizer and predictor.

A block is split where its memory-bound passes meet: it returns its residual stream and its last branch *not yet added*
(:class:`Residual`), so that the next block adds it, scales it and norms the sum in one pass (``ops.residual_norm``). The
first block of DeltaTok begins with ``ops.patch_delta`` instead (:class:`Assembly`). Either happens inside the block that owns
the LayerNorm, so that sharding a model block by block (FSDP), compiling or checkpointing it block by block all work.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import EllipsisType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from deltakern import backend, ops
from deltakern.nn.attend import attend, check_backend, describe
from deltakern.nn.product import Pair, apply_linear, cast, evaluates, join, product, value_of
from deltakern.nn.recompute import Fleeting, apply, check_mode, recomputes
from deltakern.nn.weights import Freezable, Reading, compute_dtype, kernels_run, lasts, odd, plain, read

QK_NORM_ORDERS = ("pre_rope", "post_rope")

Rope = tuple[torch.Tensor, torch.Tensor]


class Residual(NamedTuple):
    """``stream + scale * branch``, not yet added. ``branch=None`` is the stream alone; ``scale=None`` is ones."""

    stream: torch.Tensor
    branch: torch.Tensor | None = None
    scale: torch.Tensor | None = None

    def unflatten(self, dim: int, sizes: Sequence[int]) -> Residual:
        """Stream and branch with dimension ``dim`` as several; the scale is the channels' and stays."""
        return Residual(self.stream.unflatten(dim, sizes), None if self.branch is None else self.branch.unflatten(dim, sizes), self.scale)

    def add(self) -> torch.Tensor:
        """The sum."""
        if self.branch is None:
            return self.stream
        return ops.residual_norm(self.stream, self.branch, self.scale, None, None)[0]

    def rows(self, which: slice) -> Residual:
        """The same of some rows (dimension 1)."""
        return Residual(self.stream[:, which], None if self.branch is None else self.branch[:, which], self.scale)


class Assembly(NamedTuple):
    """A token sequence not yet assembled: the arguments of ``ops.patch_delta``."""

    prev: torch.Tensor | None
    curr: torch.Tensor | None
    token: torch.Tensor
    role: torch.Tensor | None
    mode: str
    stream_dtype: torch.dtype | None = None

    @property
    def like(self) -> torch.Tensor:
        """A tensor on the sequence's device."""
        return self.token


class Rows(NamedTuple):
    """Which rows of a block's tokens make up its sequences, and which of these go on.

    Attributes:
        keep: "all", "first" (row 0) or "rest" (all but row 0); the others are keys and values and not computed further.
        samples: s where the tokens (b,s+N,...) stand for b*s sequences [z_i ; x] that differ in their first row alone: what is
            done before the attention is done once for x.
    """

    keep: str = "all"
    samples: int = 0

    def sequences(self, t: torch.Tensor) -> torch.Tensor:
        """(b,s+N,...) to (b*s,1+N,...); (B,L,...) as it is where no samples share rows."""
        if not self.samples:
            return t
        own, shared = t.split((self.samples, t.shape[1] - self.samples), 1)
        return torch.cat((own[:, :, None], shared[:, None].expand(-1, self.samples, *shared.shape[1:])), 2).flatten(0, 1)

    def kept(self, t: torch.Tensor) -> torch.Tensor:
        """The rows of sequences (B,L,...) that go on."""
        return t if self.keep == "all" else t[:, :1] if self.keep == "first" else t[:, 1:]


def add_and_norm(
    entry: Residual | Assembly, norm: nn.Module, out_dtype: torch.dtype | None, known: Reading | EllipsisType | None = ...
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream, and its LayerNorm in ``out_dtype`` (the stream's own when None). ``known``: what
    :func:`deltakern.nn.weights.read` says of the norm."""
    known = read(nn.LayerNorm, norm) if known is ... else known
    if known is None:
        if isinstance(entry, Assembly):
            ones = entry.token.new_ones(entry.token.shape[-1:])
            stream = _assemble(entry, ones, torch.zeros_like(ones), 1e-5, out_dtype)[0]
        else:
            stream = entry.add()
        return stream, norm(stream).to(out_dtype or stream.dtype)
    weight, bias, eps = known
    if isinstance(entry, Assembly):
        return _assemble(entry, weight, torch.zeros_like(weight) if bias is None else bias, eps, out_dtype)
    stream, branch, scale = entry
    if branch is None:
        return stream, backend.direct(ops.layer_norm, stream)(stream, weight, bias, eps=eps, out_dtype=out_dtype)
    return backend.direct(ops.residual_norm, stream)(stream, branch, scale, weight, bias, eps=eps, out_dtype=out_dtype)


def _assemble(entry: Assembly, weight: torch.Tensor, bias: torch.Tensor, eps: float, out_dtype: torch.dtype | None):
    *tensors, mode, stream_dtype = entry
    return ops.patch_delta(*tensors, weight, bias, mode=mode, eps=eps, out_dtype=out_dtype, stream_dtype=stream_dtype)


def norm_again(stream: torch.Tensor, normed: torch.Tensor, known: Reading | None) -> torch.Tensor | Fleeting:
    """The second of what :func:`add_and_norm` returns, to be made again from the first."""
    if known is None:
        return normed
    made_of = stream, known.weight, known.bias
    impl = backend.chosen(ops.layer_norm, *made_of, out_dtype=normed.dtype)
    return Fleeting(normed, functools.partial(ops.layer_norm, eps=known.eps, out_dtype=normed.dtype, impl=impl), made_of)


class LayerScale(nn.Module):
    """Per-channel scale of a branch, parameter ``lambda1`` (D,)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((width,), float(init)))

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D). Blocks call it where it is not plain; else they fold it or leave it to the residual."""
        return branch * self.lambda1.to(branch.dtype)


def _packs(owner: nn.Module, x: torch.Tensor | Fleeting, weight: torch.Tensor) -> bool:
    """Whether products of x with several plain layers, one of them of this weight, are to be one: where packing costs nothing (frozen),
    saves launches, or joins gradients."""
    return lasts(owner) or kernels_run(value_of(x)) or (torch.is_grad_enabled() and weight.requires_grad)


class MLP(Freezable):
    """width -> hidden -> width with exact GELU; parameters ``up_proj``, ``down_proj``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)

    def forward(
        self,
        normed: torch.Tensor | Fleeting,
        scale: torch.Tensor | None = None,
        *,
        into: torch.Tensor | None = None,
        recompute: bool = False,
    ) -> torch.Tensor:
        """(..., D) -> (..., D); ``scale`` (D,) is folded into the last projection, ``into`` (..., D) is added to. ``recompute``: the hidden
        layer is made again in the backward."""
        up, down, up_known, down_known = self.known()
        dtype = value_of(normed).dtype
        if recompute:
            hidden = apply(ops.gelu, apply_linear(self, "up", up, normed, dtype, known=up_known), recompute=True)
        else:
            hidden = apply_linear(self, "up", up, normed, dtype, activation="gelu", known=up_known)
        return apply_linear(self, "down", down, hidden, dtype, scale=scale, into=into, known=down_known)

    def ask(self) -> tuple[Any, ...]:
        """The layers, and what is read of them."""
        layers = self.up_proj, self.down_proj
        return *layers, *(read(nn.Linear, layer) for layer in layers)

    def groups(self) -> dict[str, tuple[nn.Module, ...]]:
        """What goes through one product each, by a name for it."""
        return {"up": (self.up_proj,), "down": (self.down_proj,)}


class SwiGLU(Freezable):
    """width -> hidden -> width, gated: down(silu(gate(x)) * up(x)); parameters ``gate_proj``, ``up_proj``, ``down_proj``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.gate_proj = nn.Linear(width, hidden)
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)

    def forward(
        self,
        normed: torch.Tensor | Fleeting,
        scale: torch.Tensor | None = None,
        *,
        into: torch.Tensor | None = None,
        recompute: bool = False,
    ) -> torch.Tensor:
        """(..., D) -> (..., D); ``scale`` (D,) is folded into the last projection, ``into`` (..., D) is added to. ``recompute``: the hidden
        layer is made again in the backward."""
        gate, up, down, gate_known, up_known, down_known, joins = self.known()
        dtype = value_of(normed).dtype
        if joins and _packs(self, normed, up_known.weight):
            both = product(self, "gate_up", (*gate_known[:2], *up_known[:2]), dtype, join, normed)
        else:
            both = tuple(
                apply_linear(self, name, layer, normed, dtype, known=known)
                for name, layer, known in (("gate", gate, gate_known), ("up", up, up_known))
            )
        if not isinstance(both, tuple):
            hidden = apply(ops.swiglu, both, recompute=recompute)
        elif kernels_run(both[0]):
            hidden = apply(ops.swiglu, torch.cat(both, -1), recompute=recompute)
        else:
            wide = torch.promote_types(both[0].dtype, torch.float32)
            hidden = F.silu(both[0].to(wide))
            hidden = (hidden * both[1].to(wide) if torch.is_grad_enabled() else hidden.mul_(both[1].to(wide))).to(both[0].dtype)
        return apply_linear(self, "down", down, hidden, dtype, scale=scale, into=into, known=down_known)

    def ask(self) -> tuple[Any, ...]:
        """As :meth:`MLP.ask`, and whether gate and up can be one product."""
        layers = self.gate_proj, self.up_proj, self.down_proj
        known = [read(nn.Linear, layer) for layer in layers]
        return *layers, *known, all(k is not None and k.bias is not None for k in known[:2])

    def groups(self) -> dict[str, tuple[nn.Module, ...]]:
        """As :meth:`MLP.groups`."""
        return {"gate and up": (self.gate_proj, self.up_proj), "down": (self.down_proj,)}


def _pack_qkv(q: torch.Tensor, q_bias: torch.Tensor, k: torch.Tensor, v: torch.Tensor, v_bias: torch.Tensor, *gate: torch.Tensor) -> Pair:
    """Weight and bias of q, k, v and the gate. Zero rows fill the gate up to a multiple of 16, so that every row of the product begins
    at a multiple of 32 bytes and kernels read its slices 16 bytes at a time."""
    weights, biases = [q, k, v], [q_bias, torch.zeros_like(q_bias), v_bias]
    if gate:
        padding = -gate[0].shape[0] % 16
        weights += [gate[0], q.new_zeros((padding, q.shape[1]))]
        biases += [gate[1], q.new_zeros(padding)]
    return torch.cat(weights), torch.cat(biases)


class _Asked(NamedTuple):
    """What :class:`SelfAttention` needs to know of its layers.

    Attributes:
        layers, projections: of q, k, v and the gate, and what is read of them.
        output, output_known: the same of the output projection.
        norms: of q and k, or none; ``weights`` theirs where the op behind the projections does what they do, which ``fuse`` says.
        joins: whether the layers can be one product, of ``parameters``.
    """

    layers: tuple[nn.Module, ...]
    projections: list[Reading | None]
    output: nn.Module
    output_known: Reading | None
    norms: tuple[nn.Module, ...]
    weights: list[torch.Tensor | None]
    fuse: list[bool]
    joins: bool
    parameters: list[torch.Tensor]


_EVERY = Rows()


class SelfAttention(Freezable):
    """Multi-head self-attention with RoPE, optional QK-norm and optional head gate, under the released names.

    Parameters: ``k_proj`` (no bias), ``v_proj``, ``q_proj``, ``o_proj``; with ``qk_norm`` the per-head LayerNorms without bias
    ``q_norm``/``k_norm`` ("post_rope") or ``q_norm_prerope``/``k_norm_prerope`` ("pre_rope"); with ``gated`` ``attn_gate``.
    """

    def __init__(
        self, width: int, heads: int, *, qk_norm: str | None = None, gated: bool = False, eps: float = 1e-5, attention: str = "auto"
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"SelfAttention: width must be a multiple of heads, got {width} and {heads}")
        if qk_norm not in (None, *QK_NORM_ORDERS):
            raise ValueError(f"SelfAttention: qk_norm must be None or one of {QK_NORM_ORDERS}, got {qk_norm!r}")
        self.num_heads, self.head_dim = heads, width // heads
        self.qk_norm, self.gated, self.eps = qk_norm, gated, eps
        self.attention = check_backend(attention)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        if qk_norm is not None:
            suffix = "_prerope" if qk_norm == "pre_rope" else ""
            self.add_module(f"q_norm{suffix}", nn.LayerNorm(self.head_dim, eps=eps, bias=False))
            self.add_module(f"k_norm{suffix}", nn.LayerNorm(self.head_dim, eps=eps, bias=False))
        if gated:
            self.attn_gate = nn.Linear(width, heads)

    def norms(self) -> tuple[nn.Module, ...]:
        """The LayerNorms of q and k; none without QK-norm."""
        if self.qk_norm is None:
            return ()
        return (self.q_norm_prerope, self.k_norm_prerope) if self.qk_norm == "pre_rope" else (self.q_norm, self.k_norm)

    def _layers(self) -> tuple[nn.Module, ...]:
        return (self.q_proj, self.k_proj, self.v_proj, *((self.attn_gate,) if self.gated else ()))

    def ask(self) -> _Asked:
        """What is read of the layers, and what is made of them together."""
        layers, norms = self._layers(), self.norms()
        known = [read(nn.Linear, layer) for layer in layers]
        # The op behind the projections does what norms do that are plain and of the form that they were built in
        weights = [read(nn.LayerNorm, norm) for norm in norms]
        fuse = [k is not None and k.bias is None and k.eps == self.eps for k in weights]
        joins = all(fuse) and all(k is not None and (k.bias is None) is (i == 1) for i, k in enumerate(known))
        parameters = [p for k in known for p in k[:2] if p is not None] if joins else []
        weights = [k.weight if fuses else None for k, fuses in zip(weights, fuse, strict=True)] or [None, None]
        return _Asked(layers, known, self.o_proj, read(nn.Linear, self.o_proj), norms, weights, fuse, joins, parameters)

    def _turn(self, q: torch.Tensor | None, k: torch.Tensor, rope: Rope, num_prefix: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """RoPE and QK-norm of q and k (B,L,H,d)."""
        known, order = self.known(), self.qk_norm or "pre_rope"
        if all(known.fuse):
            return ops.rope_qk_norm(q, k, *rope, *known.weights, order=order, num_prefix=num_prefix, eps=self.eps)
        if order == "pre_rope":
            q, k = (None if t is None else norm(t).to(t.dtype) for t, norm in zip((q, k), known.norms, strict=True))
        q, k = ops.rope_qk_norm(q, k, *rope, None, None, num_prefix=num_prefix, eps=self.eps)
        if order == "post_rope":
            q, k = (None if t is None else norm(t).to(t.dtype) for t, norm in zip((q, k), known.norms, strict=True))
        return q, k

    def _project(self, known: _Asked, normed: torch.Tensor | Fleeting, rope: Rope, num_prefix: int, skip: int, recompute: bool):
        """q, k, v (B,L,H,d), the gate's logits (B,L,H) or None, and how q and k of rows ``skip``.. are made again, or None."""
        dtype = value_of(normed).dtype
        if not (known.joins and _packs(self, normed, known.parameters[0])):
            q, k, v, *gate = (
                apply_linear(self, name, layer, normed, dtype, known=each)
                for name, layer, each in zip(("q", "k", "v", "gate"), known.layers, known.projections, strict=False)
            )
            q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
            return *self._turn(q, k, rope, num_prefix), v, gate[0] if gate else None, None
        made_of = product(self, "qkv", known.parameters, dtype, _pack_qkv, normed), *rope, *known.weights
        options = {"heads": self.num_heads, "gated": self.gated, "order": self.qk_norm or "pre_rope", "num_prefix": num_prefix}
        options["eps"] = self.eps
        if not recompute:
            return *ops.split_qkv(*made_of, **options), None
        split = functools.partial(ops.split_qkv, **options, impl=backend.chosen(ops.split_qkv, *made_of, **options))

        def make(*made_of: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
            q, k, *_ = split(*made_of)
            return q[:, skip:], k

        return *split(*made_of), (make, made_of)

    def forward(
        self,
        normed: torch.Tensor | Fleeting,
        rope: Rope,
        *,
        num_prefix: int,
        rows: Rows = _EVERY,
        fold_value: bool = True,
        scale: torch.Tensor | None = None,
        into: torch.Tensor | None = None,
        recompute: bool = False,
    ) -> torch.Tensor:
        """Attention of some rows over all rows.

        Args:
            normed: (B,L,D).
            rope: cosines and sines (N,d), used (L - num_prefix) / N times.
            num_prefix: leading tokens that do not rotate.
            rows: the rows that go on, and the sequences that share theirs.
            fold_value: with ``keep="first"`` the value projection is applied behind the pooling, to one vector a head instead of L
                tokens; exact, see ``ops.delta_pool``. Row 0 must not rotate: one of the prefix, or a row of cosine 1.
            scale: (D,) folded into the output projection.
            into: (B, rows that go on, D) that the result is added to.
            recompute: rotated q and k, and the gated rows, are made again in the backward.

        Returns:
            (B, rows that go on, D).
        """
        known = self.known()
        if rows.keep == "first":
            mixed, gate = self._first_row(known, normed, rope, num_prefix, fold_value)
        else:
            q, k, v, gate, again = self._project(known, normed, rope, num_prefix, 1 if rows.keep == "rest" else 0, recompute)
            if rows != _EVERY:
                q, k, v = rows.kept(rows.sequences(q)), rows.sequences(k), rows.sequences(v)
                gate = None if gate is None else rows.kept(rows.sequences(gate))
            mixed = attend(q, k, v, backend=self.attention, again=again)
        opened = mixed if gate is None else apply(ops.head_gate, mixed, gate, recompute=recompute and rows.keep != "first")
        flat = opened._replace(value=opened.value.flatten(2)) if isinstance(opened, Fleeting) else opened.flatten(2)
        return apply_linear(self, "o", known.output, flat, mixed.dtype, scale=scale, into=into, known=known.output_known)

    def _first_row(
        self, known: _Asked, normed: torch.Tensor, rope: Rope, num_prefix: int, fold_value: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Row 0 of the attention, (B,1,H,d), and its gate's logits (B,1,H) or None: keys of every token, one query."""
        dtype, heads, norms, weights = normed.dtype, self.num_heads, known.norms, known.weights
        first, rows = normed[:, :1], dict(zip(("q", "k", "v", "gate"), zip(known.layers, known.projections, strict=True), strict=False))

        def project(name: str, x: torch.Tensor) -> torch.Tensor:
            return apply_linear(self, name, rows[name][0], x, dtype, known=rows[name][1])

        q = project("q", first).unflatten(-1, (heads, -1))
        if norms:
            q = ops.layer_norm(q, weights[0], None, eps=self.eps) if known.fuse[0] else norms[0](q).to(dtype)
        k = project("k", normed).unflatten(-1, (heads, -1))
        if norms and not known.fuse[1]:
            k = self._turn(torch.zeros_like(k), k, rope, num_prefix)[1]
        else:
            order = self.qk_norm or "pre_rope"
            k = ops.rope_qk_norm(None, k, *rope, None, weights[1], order=order, num_prefix=num_prefix, eps=self.eps)[1]
        value = rows["v"][1]
        if fold_value and value is not None:
            weight, bias = cast(self, "v", value[:2], dtype)
            pooled = ops.delta_pool(normed, q[:, 0], k, scale=self.head_dim**-0.5)
            mixed = torch.einsum("bhc,hdc->bhd", pooled, weight.unflatten(0, (heads, -1)))
            mixed = (mixed if bias is None else mixed + bias.view(heads, -1))[:, None].to(dtype)
        else:
            mixed = attend(q, k, project("v", normed).unflatten(-1, (heads, -1)), backend=self.attention)
        return mixed, project("gate", first) if self.gated else None

    def groups(self) -> dict[str, tuple[nn.Module, ...]]:
        """As :meth:`MLP.groups`; with the norms of q and k, which the op after it takes."""
        return {"q, k, v and gate": (*self._layers(), *self.norms()), "output": (self.o_proj,)}


class _AskedBlock(NamedTuple):
    """What a block needs to know: its parts, its norms and scales in turn, and what is read of these."""

    attention: nn.Module
    mlp: nn.Module
    layers: tuple[nn.Module, ...]
    norm1: Reading | None
    norm2: Reading | None
    scale1: torch.Tensor | None
    scale2: torch.Tensor | None


class TransformerBlock(Freezable):
    """Pre-norm block: norm1, attention, layer_scale1, residual; norm2, mlp, layer_scale2, residual.

    Args:
        attention: called with the normed rows and whatever this block is called with; :class:`SelfAttention` or the predictor's.
        mlp: :class:`MLP` or :class:`SwiGLU`.
        width: D.
        layer_scale_init: initial LayerScale.
        eps: of both LayerNorms.
        recompute: see :class:`Block`.
        folds: LayerScale is folded into the projection before it in training, so that no branch is kept for its gradient. Frozen, it
            always is; not in float16, where a scale of 1e-5 would take the weights below the smallest number.
    """

    def __init__(
        self, attention: nn.Module, mlp: nn.Module, width: int, *, layer_scale_init: float, eps: float, recompute: str, folds: bool
    ) -> None:
        super().__init__()
        self.recompute, self.folds = check_mode(recompute), folds
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = attention
        self.layer_scale1 = LayerScale(width, layer_scale_init)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = mlp
        self.layer_scale2 = LayerScale(width, layer_scale_init)

    def forward(self, entry: Residual | Assembly, *context: Any, rows: str = "all", samples: int = 0, **options: Any) -> Residual:
        """One block.

        Args:
            entry: the stream and the branch that the block before left to add, or what the first block assembles.
            context, options: the attention's own arguments: for :class:`SelfAttention` ``rope``, ``num_prefix`` and ``fold_value``,
                for the predictor's ``memory``, ``rotate`` and ``mix``.
            rows: which rows of the stream go on: "all", "first" (row 0) or "rest" (all but row 0). The others are used as
                keys and values and not computed further.
            samples: of sequences that share all rows but their first, see :class:`Rows`.

        Returns:
            The stream and the MLP's branch.
        """
        known, which = self.known(), _EVERY if rows == "all" and not samples else Rows(rows, samples)
        like = entry.stream if isinstance(entry, Residual) else entry.like
        dtype = compute_dtype(like.device.type, like.dtype if known.norm1 is None else known.norm1.weight.dtype)
        recompute = recomputes(self.recompute, like.device.type)
        stream, normed = add_and_norm(entry, known.layers[0], dtype, known.norm1)
        if recompute and rows != "first":
            normed = norm_again(stream, normed, known.norm1)
        stream, options = which.kept(which.sequences(stream)), {**options, "rows": which, "recompute": recompute}
        entry = self._branch(stream, known.layers[1], known.scale1, known.attention, dtype, normed, *context, **options)
        stream, normed = add_and_norm(entry, known.layers[2], dtype, known.norm2)
        if recompute:
            normed = norm_again(stream, normed, known.norm2)
        entry = self._branch(stream, known.layers[3], known.scale2, known.mlp, dtype, normed, recompute=recompute)
        # A clone, because a sharded block's parameters may be freed before the next block adds the branch.
        return entry if entry.scale is None else entry._replace(scale=entry.scale.clone())

    def ask(self) -> _AskedBlock:
        """The layers, and what is read of them."""
        scales = [layer.lambda1 if plain(LayerScale, layer) else None for layer in (self.layer_scale1, self.layer_scale2)]
        layers = self.norm1, self.layer_scale1, self.norm2, self.layer_scale2
        return _AskedBlock(self.attention, self.mlp, layers, *(read(nn.LayerNorm, n) for n in (self.norm1, self.norm2)), *scales)

    def _branch(
        self,
        stream: torch.Tensor,
        scale: nn.Module,
        lambda1: torch.Tensor | None,
        part: nn.Module,
        dtype: torch.dtype,
        *args: Any,
        **options: Any,
    ) -> Residual:
        """``stream + scale * part(*args, **options)``: the LayerScale is folded into the part's last projection, left to the residual, or
        called; the sum is left to the norm behind it, but where oneDNN makes the product, which adds on the way."""
        if lambda1 is None:
            return Residual(stream, scale(part(*args, **options)))
        lasting = lasts(part)
        if dtype == torch.float16 or not (lasting or (self.folds and torch.is_grad_enabled() and lambda1.requires_grad)):
            return Residual(stream, part(*args, **options), lambda1)
        if lasting and evaluates(stream, dtype) and plain(type(part), part):
            return Residual(part(*args, scale=lambda1, into=stream, **options))
        return Residual(stream, part(*args, scale=lambda1, **options))


class Block(TransformerBlock):
    """The block of the backbone and of DeltaTok.

    Args:
        width, heads, hidden: D, attention heads, and the MLP's hidden size.
        swiglu: gated MLP instead of GELU.
        qk_norm: None, "pre_rope" or "post_rope".
        gated: head gate.
        layer_scale_init: initial LayerScale.
        eps: of every LayerNorm.
        attention: backend of :func:`deltakern.nn.attend.attend`.
        recompute: "cheap" keeps nothing for the backward that a pass over memory makes again: LayerNorms' outputs, rotated q and
            k (with SDPA's flash attention or cuDNN's), the gated attention, the MLP's hidden layer; gradients keep their bits. "none" keeps
            them all. "auto" is "cheap" where kernels run (a GPU, or Triton's interpreter) and "none" on a CPU with reference ops.
            Under torch.compile its partitioner decides.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        swiglu: bool = False,
        qk_norm: str | None = None,
        gated: bool = False,
        layer_scale_init: float = 1.0,
        eps: float = 1e-5,
        attention: str = "auto",
        recompute: str = "auto",
    ) -> None:
        super().__init__(
            SelfAttention(width, heads, qk_norm=qk_norm, gated=gated, eps=eps, attention=attention),
            SwiGLU(width, hidden) if swiglu else MLP(width, hidden),
            width,
            layer_scale_init=layer_scale_init,
            eps=eps,
            recompute=recompute,
            folds=True,
        )


def _kind(layer: nn.Module) -> type[nn.Module] | None:
    """The class whose plain instances a block reads the parameters of, and does not call."""
    return next((kind for kind in (nn.Linear, nn.LayerNorm, LayerScale) if isinstance(layer, kind)), None)


def all_plain(module: nn.Module) -> bool:
    """Whether calling ``module`` does nothing but compute with its parameters and buffers: no hooks, no forward put in the place of
    another, no class that is neither torch's nor this package's."""
    return all(
        not odd(part, _kind(part) or type(part)) and type(part).__module__.startswith(("torch.nn.modules.", "deltakern."))
        for part in module.modules()
    )


class BlockExplanation(NamedTuple):
    """Which way every part of a block goes, and why. ``str()`` of it is a line a part."""

    parts: dict[str, str]

    def __str__(self) -> str:
        return "\n".join(f"{part}: {way}" for part, way in self.parts.items())


def explain(block: TransformerBlock) -> BlockExplanation:
    """Says of every part of a block whether its weights are read, live or frozen, or its modules called, and which one asks for that; of
    self-attention also which kernel runs and what its self-check found.

    Raises:
        TypeError: no block of this package.
    """
    if not isinstance(block, TransformerBlock):
        raise TypeError(f"explain: expected a deltakern.nn.Block or a predictor's block, got {type(block).__name__}")

    names = {module: name for name, module in block.named_modules()}

    def way(layers: tuple[nn.Module, ...], otherwise: str) -> str:
        for layer in layers:
            if why := odd(layer, _kind(layer) or nn.Linear):
                return f"modules are called, because {names[layer]} {why}"
        return otherwise

    found = {}
    for part, norm, scale in ((block.attention, block.norm1, block.layer_scale1), (block.mlp, block.norm2, block.layer_scale2)):
        frozen = getattr(part, "_frozen", None) is not None
        found[names[norm]] = way((norm,), "weights are read at every use")
        for name, layers in part.groups().items():
            found[f"{names[part]}, {name}"] = way(layers, "frozen: derived once" if frozen else "live: weights are read at every use")
        if isinstance(part, SelfAttention):
            found[f"{names[part]}, kernel"] = describe(part.attention, block.norm1.weight.device, part.head_dim)
        folded = "frozen: folded into the projection, where that is plain and not float16"
        found[names[scale]] = way((scale,), folded if frozen else "live: read at every use")
    return BlockExplanation(found)
