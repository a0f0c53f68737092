"""The pre-norm transformer block of the backbone and of DeltaTok, wired from ops, under the released parameter names.

A block is split where its memory-bound passes meet: it returns its residual stream and its last branch *not yet added*
(:class:`Residual`), so that the next block adds it, scales it and norms the sum in one pass (``ops.residual_norm``). The
first block of DeltaTok begins with ``ops.patch_delta`` instead (:class:`Assembly`). Either happens inside the block that owns
the LayerNorm, so that sharding a model block by block (FSDP), compiling or checkpointing it block by block all work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from deltakern import backend, ops
from deltakern.nn import evaluation
from deltakern.nn.attend import attend, check_backend
from deltakern.nn.packing import PackedModule, compute_dtype
from deltakern.nn.product import product
from deltakern.nn.recompute import Fleeting, apply, check_mode, recomputes

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


def _takes_reference(x: torch.Tensor) -> bool:
    """Whether the ops take their references for x, which is known at once on a CPU where no kernel was asked for."""
    return not torch.compiler.is_compiling() and x.is_cpu and backend.preferred() in (None, "reference", "cpp")


def add_and_norm(entry: Residual | Assembly, norm: nn.LayerNorm, out_dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream, and its LayerNorm in ``out_dtype`` (the stream's own when None)."""
    if isinstance(entry, Assembly):
        return ops.patch_delta(
            entry.prev,
            entry.curr,
            entry.token,
            entry.role,
            norm.weight,
            norm.bias,
            mode=entry.mode,
            eps=norm.eps,
            out_dtype=out_dtype,
            stream_dtype=entry.stream_dtype,
        )
    if entry.branch is None:
        if _takes_reference(entry.stream):  # as it is: the op's checks cost as much as a small norm
            weight = norm.weight
            normed = F.layer_norm(entry.stream.to(weight.dtype), norm.normalized_shape, weight, norm.bias, norm.eps)
            return entry.stream, normed.to(out_dtype or entry.stream.dtype)
        return entry.stream, ops.layer_norm(entry.stream, norm.weight, norm.bias, eps=norm.eps, out_dtype=out_dtype)
    return ops.residual_norm(entry.stream, entry.branch, entry.scale, norm.weight, norm.bias, eps=norm.eps, out_dtype=out_dtype)


def norm_again(stream: torch.Tensor, normed: torch.Tensor, norm: nn.LayerNorm) -> Fleeting:
    """The second of what :func:`add_and_norm` returns, to be made again from the first."""
    made_of = stream, norm.weight, norm.bias
    impl = backend.chosen(ops.layer_norm, *made_of, out_dtype=normed.dtype)
    return Fleeting(normed, functools.partial(ops.layer_norm, eps=norm.eps, out_dtype=normed.dtype, impl=impl), made_of)


class LayerScale(nn.Module):
    """Per-channel scale of a branch, parameter ``lambda1`` (D,)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((width,), float(init)))


def _parameters(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias. A module's attribute is looked up by a call in Python, so the blocks ask for each once."""
    return linear.weight, linear.bias


def as_they_are(weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    return weight, bias


class MLP(PackedModule):
    """width -> hidden -> width with exact GELU; parameters ``up_proj``, ``down_proj``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)

    def forward(
        self,
        normed: torch.Tensor | Fleeting,
        scale: torch.Tensor | None = None,
        *,
        recompute: bool = False,
    ) -> torch.Tensor:
        """(..., D) -> (..., D); ``scale`` (D,) is folded into the last projection. ``recompute``: the hidden layer is made again in
        the backward."""
        weight, bias = _parameters(self.up_proj)
        dtype = compute_dtype(weight.device.type, weight.dtype)
        up = functools.partial(product, self, "up", (weight, bias), dtype, as_they_are, normed)
        hidden = apply(ops.gelu, up(), recompute=True) if recompute else up(activation="gelu")
        return _down(self, hidden, scale, dtype)

    def for_evaluation(self, scale: torch.Tensor) -> evaluation.GELU:
        """The same with its residual, see :mod:`deltakern.nn.evaluation`."""
        return evaluation.GELU(
            evaluation.Projection(as_they_are, *_parameters(self.up_proj)),
            evaluation.Projection(fold_scale, *_parameters(self.down_proj), scale),
        )


class SwiGLU(PackedModule):
    """down(silu(gate(x)) * up(x)); parameters ``gate_proj``, ``up_proj``, ``down_proj``, all with bias."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden)
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)

    def forward(
        self,
        normed: torch.Tensor | Fleeting,
        scale: torch.Tensor | None = None,
        *,
        recompute: bool = False,
    ) -> torch.Tensor:
        """(..., D) -> (..., D); ``scale`` (D,) is folded into the last projection. ``recompute``: the hidden layer is made again in
        the backward."""
        gate, up = _parameters(self.gate_proj), _parameters(self.up_proj)
        dtype = compute_dtype(up[0].device.type, up[0].dtype)
        hidden = apply(ops.swiglu, product(self, "gate_up", (*gate, *up), dtype, join, normed), recompute=recompute)
        return _down(self, hidden, scale, dtype)

    def for_evaluation(self, scale: torch.Tensor) -> evaluation.SwiGLU:
        """The same with its residual, see :mod:`deltakern.nn.evaluation`."""
        gate, up = _parameters(self.gate_proj), _parameters(self.up_proj)
        return evaluation.SwiGLU(
            evaluation.Projection(as_they_are, *gate),
            evaluation.Projection(as_they_are, *up),
            evaluation.Projection(join, *gate, *up),
            evaluation.Projection(fold_scale, *_parameters(self.down_proj), scale),
        )


def join(*p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and biases, in turn, as one weight and one bias."""
    return torch.cat(p[::2]), torch.cat(p[1::2])


def _pack_qkv(q: torch.Tensor, q_bias: torch.Tensor, k: torch.Tensor, v: torch.Tensor, v_bias: torch.Tensor, *gate: torch.Tensor):
    """Weight and bias of q, k, v and the gate. Zero rows fill the gate up to a multiple of 16, so that every row of the product begins
    at a multiple of 32 bytes and kernels read its slices 16 bytes at a time."""
    weights, biases = [q, k, v], [q_bias, torch.zeros_like(q_bias), v_bias]
    if gate:
        padding = -gate[0].shape[0] % 16
        weights += [gate[0], q.new_zeros((padding, q.shape[1]))]
        biases += [gate[1], q.new_zeros(padding)]
    return torch.cat(weights), torch.cat(biases)


def fold_scale(weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A projection whose output is multiplied by ``scale``: (weight, bias)."""
    return (weight, bias) if scale is None else (weight * scale[:, None], bias * scale)


def _down(mlp: PackedModule, hidden: torch.Tensor | Fleeting, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    return product(mlp, "down", (*_parameters(mlp.down_proj), scale), dtype, fold_scale, hidden)


class SelfAttention(PackedModule):
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

    def norm_weights(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(q, k) weights of the QK-norm, or Nones."""
        if self.qk_norm is None:
            return None, None
        if self.qk_norm == "pre_rope":
            return self.q_norm_prerope.weight, self.k_norm_prerope.weight
        return self.q_norm.weight, self.k_norm.weight

    def _project_together(self, normed: torch.Tensor | Fleeting, dtype: torch.dtype) -> torch.Tensor:
        """q, k, v and the gate's logits as one product, (B,L,3D [+ H + padding])."""
        return product(self, "qkv", self._projections(), dtype, _pack_qkv, normed)

    def _projections(self) -> tuple[torch.Tensor, ...]:
        """The arguments of :func:`_pack_qkv`."""
        gate = _parameters(self.attn_gate) if self.gated else ()
        return (*_parameters(self.q_proj), self.k_proj.weight, *_parameters(self.v_proj), *gate)

    def project(
        self, normed: torch.Tensor, rope: Rope, *, num_prefix: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """q and k, rotated and normed, and v, each (B,L,H,d), and the gate's logits (B,L,H) or None, of tokens (B,L,D)."""
        return self._split(num_prefix)(self._project_together(normed, dtype), *rope, *self.norm_weights())

    def _split(self, num_prefix: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        order = self.qk_norm or "pre_rope"
        return functools.partial(ops.split_qkv, heads=self.num_heads, gated=self.gated, order=order, num_prefix=num_prefix, eps=self.eps)

    def output(
        self,
        mixed: torch.Tensor,
        gate: torch.Tensor | None,
        scale: torch.Tensor | None,
        dtype: torch.dtype,
        *,
        recompute: bool = False,
    ) -> torch.Tensor:
        """Head gate and output projection of (B,L,H,d), with ``scale`` folded in.
        ``recompute``: the gated rows are made again in the backward."""
        opened = mixed if gate is None else apply(ops.head_gate, mixed, gate, recompute=recompute)
        flat = opened._replace(value=opened.value.flatten(2)) if isinstance(opened, Fleeting) else opened.flatten(2)
        return product(self, "o", (*_parameters(self.o_proj), scale), dtype, fold_scale, flat)

    def forward(
        self,
        normed: torch.Tensor | Fleeting,
        rope: Rope,
        *,
        num_prefix: int,
        skip: int = 0,
        scale: torch.Tensor | None = None,
        recompute: bool = False,
    ) -> torch.Tensor:
        """Attention of rows ``skip``.. over all rows.

        Args:
            normed: (B,L,D).
            rope: cosines and sines (N,d), used (L - num_prefix) / N times.
            num_prefix: leading tokens that do not rotate.
            skip: leading rows whose output nobody reads.
            scale: (D,) folded into the output projection.
            recompute: rotated q and k, and the gated rows, are made again in the backward.

        Returns:
            (B, L - skip, D).
        """
        weight = self.q_proj.weight
        dtype = compute_dtype(weight.device.type, weight.dtype)
        made_of = self._project_together(normed, dtype), *rope, *self.norm_weights()
        split, again = self._split(num_prefix), None
        if recompute:
            split = functools.partial(split, impl=backend.chosen(split.func, *made_of, **split.keywords))

            def make(*made_of: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
                q, k, *_ = split(*made_of)
                return q[:, skip:], k

            again = make, made_of
        q, k, v, gate = split(*made_of)
        if skip:
            q, gate = q[:, skip:], None if gate is None else gate[:, skip:]
        mixed = attend(q, k, v, backend=self.attention, again=again)
        return self.output(mixed, gate, scale, dtype, recompute=recompute)

    def first_row(
        self,
        normed: torch.Tensor,
        rope: Rope,
        *,
        num_prefix: int,
        fold_value: bool,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The output of row 0 alone, (B,1,D): keys of every token, one query; exact, see spec of ``ops.delta_pool``.

        With ``fold_value`` the value projection is applied after the pooling, to one vector a head instead of L tokens.
        Row 0 must not rotate: one of the ``num_prefix`` tokens, or a row of cosine 1.
        """
        dtype = compute_dtype(normed.device.type, self.q_proj.weight.dtype)
        heads, head = self.num_heads, self.head_dim
        first = normed[:, 0]
        q_weight, k_weight = self.norm_weights()
        parts = (*_parameters(self.q_proj), *_parameters(self.v_proj))
        q_proj, q_bias, v_proj, v_bias = self.packed("first_row", parts, dtype, lambda *p: p)
        q = F.linear(first, q_proj, q_bias).unflatten(-1, (heads, head))
        if q_weight is not None:
            wide = torch.promote_types(q.dtype, torch.float32)
            q = F.layer_norm(q.to(wide), (head,), q_weight.to(wide), None, self.eps).to(dtype)
        k = product(self, "k", (self.k_proj.weight,), dtype, lambda weight: (weight, None), normed).unflatten(-1, (heads, head))
        _, k = ops.rope_qk_norm(None, k, *rope, None, k_weight, order=self.qk_norm or "pre_rope", num_prefix=num_prefix, eps=self.eps)
        if fold_value:
            pooled = ops.delta_pool(normed, q, k, scale=head**-0.5)
            mixed = torch.einsum("bhc,hdc->bhd", pooled, v_proj.unflatten(0, (heads, head))) + v_bias.view(heads, head)
            mixed = mixed[:, None]
        else:
            v = F.linear(normed, v_proj, v_bias).unflatten(-1, (heads, head))
            mixed = attend(q[:, None], k, v, backend=self.attention)
        gate = None
        if self.gated:
            gate_weight, gate_bias = self.packed("gate", (self.attn_gate.weight, self.attn_gate.bias), dtype, lambda *p: p)
            gate = F.linear(first, gate_weight, gate_bias)[:, None]
        return self.output(mixed.to(dtype), gate, scale, dtype)

    def for_evaluation(self, scale: torch.Tensor) -> tuple[evaluation.Attention, evaluation.FirstRow]:
        """The same with its residual, and :meth:`first_row`, see :mod:`deltakern.nn.evaluation`."""
        weights = self.norm_weights()
        turn = (self.num_heads, self.head_dim, self.qk_norm or "pre_rope", self.eps)
        out = evaluation.Projection(fold_scale, *_parameters(self.o_proj), scale)
        rows = evaluation.Attention(
            evaluation.Projection(_pack_qkv, *self._projections()),
            out,
            evaluation.Turn(weights, *turn),
            gated=self.gated,
            backend=self.attention,
        )
        v, v_bias = _parameters(self.v_proj)
        gate = _parameters(self.attn_gate) if self.gated else ()
        first = evaluation.FirstRow(
            evaluation.Projection(join, *_parameters(self.q_proj), *gate),
            evaluation.Projection(as_they_are, self.k_proj.weight, None),
            v.unflatten(0, (self.num_heads, self.head_dim)),
            v_bias.unflatten(0, (self.num_heads, 1, self.head_dim)),
            out,
            weights[0],
            evaluation.Turn(weights[1:], *turn),
            gated=self.gated,
        )
        return rows, first


class Block(PackedModule):
    """Pre-norm block: norm1, attention, layer_scale1, residual; norm2, mlp, layer_scale2, residual.

    Args:
        width, heads, hidden: D, attention heads, and the MLP's hidden size.
        swiglu: gated MLP instead of GELU.
        qk_norm: None, "pre_rope" or "post_rope".
        gated: head gate.
        layer_scale_init: initial LayerScale.
        eps: of every LayerNorm.
        attention: backend of :func:`deltakern.nn.attend.attend`.
        recompute: "cheap" keeps nothing for the backward that a pass over memory makes again: LayerNorms' outputs, rotated q and
            k (with SDPA's flash attention), the gated attention, the MLP's hidden layer; gradients keep their bits. "none" keeps
            them all. "auto" is "cheap" where kernels run (a GPU, or Triton's interpreter) and "none" on a CPU with reference ops.
            Under torch.compile its partitioner decides.

    LayerScale is folded into the projection before it, so that no branch is kept for its gradient; not in float16, where a
    scale of 1e-5 would take the weights below the smallest number.
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
        super().__init__()
        self.recompute = check_mode(recompute)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = SelfAttention(width, heads, qk_norm=qk_norm, gated=gated, eps=eps, attention=attention)
        self.layer_scale1 = LayerScale(width, layer_scale_init)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = SwiGLU(width, hidden) if swiglu else MLP(width, hidden)
        self.layer_scale2 = LayerScale(width, layer_scale_init)

    def _scales(self, dtype: torch.dtype) -> tuple[tuple[torch.Tensor | None, torch.Tensor | None], ...]:
        """For each branch (folded into its projection, left to the residual): exactly one of the two is the LayerScale."""
        scales = self.layer_scale1.lambda1, self.layer_scale2.lambda1
        return tuple((None, s) if dtype == torch.float16 else (s, None) for s in scales)

    def forward(
        self,
        entry: Residual | Assembly,
        rope: Rope,
        *,
        num_prefix: int,
        rows: str = "all",
        fold_value: bool = True,
    ) -> Residual:
        """One block.

        Args:
            entry: the stream and the branch that the block before left to add, or what the first block assembles.
            rope: cosines and sines (N,d).
            num_prefix: leading tokens that do not rotate.
            rows: which rows of the stream go on: "all", "first" (row 0) or "rest" (all but row 0). The others are used as
                keys and values and not computed further.
            fold_value: with rows="first", see :meth:`SelfAttention.first_row`.

        Returns:
            The stream and the MLP's branch, or their sum on the way of :mod:`deltakern.nn.evaluation`.
        """
        if fold_value and (out := self._evaluated(entry, rope, num_prefix, rows)) is not None:
            return Residual(out)
        norm1, norm2 = self.norm1, self.norm2
        weight = norm1.weight
        dtype = compute_dtype(weight.device.type, weight.dtype)
        (fold1, left1), (fold2, left2) = self._scales(dtype)
        recompute = recomputes(self.recompute, weight.device.type)
        stream, normed = add_and_norm(entry, norm1, dtype)
        if rows == "first":
            stream = stream[:, :1]
            branch = self.attention.first_row(normed, rope, num_prefix=num_prefix, fold_value=fold_value, scale=fold1)
        else:
            skip = 1 if rows == "rest" else 0
            if recompute:
                normed = norm_again(stream, normed, norm1)
            stream = stream[:, skip:] if skip else stream
            branch = self.attention(normed, rope, num_prefix=num_prefix, skip=skip, scale=fold1, recompute=recompute)
        stream, normed = add_and_norm(Residual(stream, branch, left1), norm2, dtype)
        if recompute:
            normed = norm_again(stream, normed, norm2)
        # A clone, because a sharded block's parameters may be freed before the next block adds the branch.
        return Residual(stream, self.mlp(normed, fold2, recompute=recompute), None if left2 is None else left2.clone())

    def _evaluated(self, entry: Residual | Assembly, rope: Rope, num_prefix: int, rows: str) -> torch.Tensor | None:
        """The block as a straight line, see :mod:`deltakern.nn.evaluation`; None where that is not for this block or these arguments."""
        if isinstance(entry, Residual):
            x = entry.stream
            if not evaluation.straight(x) or x.ndim != 3:
                return None
            length = x.shape[1]
        else:
            x = entry.curr if entry.prev is None else entry.prev
            if not evaluation.straight(x) or x.ndim != 3 or entry.stream_dtype not in (None, torch.float32):
                return None
            length = 1 + x.shape[1] * (2 if entry.mode == "pair" else 1)
            if any(t is not None and t.dtype != torch.float32 for t in (entry.curr, entry.token, entry.role)):
                return None
        norm1, attention, norm2, mlp = self.norm1, self.attention, self.norm2, self.mlp
        settings = norm1.eps, getattr(attention, "eps", None), getattr(attention, "attention", None), norm2.eps
        line = evaluation.of(self, self._evaluation, attention, mlp, settings=settings)
        if line is None or not line.fits(length, x.shape[2], rope, num_prefix):
            return None
        if isinstance(entry, Assembly):
            return line(*add_and_norm(entry, norm1, torch.float32), rope, num_prefix, rows)
        stream = x if entry.branch is None else entry.add()
        return line(stream, F.layer_norm(stream, *line.norm1), rope, num_prefix, rows)

    def _evaluation(self) -> evaluation.Evaluation | None:
        """None where parts of it are others than this module's."""
        if type(self.attention) is not SelfAttention or type(self.mlp) not in (MLP, SwiGLU):
            return None
        if any(w is not None and w.shape != (self.attention.head_dim,) for w in self.attention.norm_weights()):
            return None  # the ops say what is wrong
        rows, first_row = self.attention.for_evaluation(self.layer_scale1.lambda1)
        return evaluation.Evaluation(self.norm1, rows, first_row, self.norm2, self.mlp.for_evaluation(self.layer_scale2.lambda1))
