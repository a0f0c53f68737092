"""``split_qkv``: q and k rotated and normed, v, and the head gate's logits, of one packed projection.

Formula, ``packed`` being [q | k | v] or [q | k | v | logits | filling], D = H*d channels each but the last two, H and any number::

    q, k = rope_qk_norm(q, k)                        see ``deltakern.ops.rope_qk_norm``

Shapes: packed (B,L,3D) or (B,L,E) with E >= 3D + H; cos, sin (N,d); weights (d,) or None. Out: q, k contiguous (B,L,H,d);
v (B,L,H,d) and the logits (B,L,H), or None, views of ``packed``: modify none of them in place.
Dtypes: float32, bfloat16, float16 (float64 in the reference); accumulated in float32 (float64 for float64).
Gradient: packed, q_weight, k_weight (not the tables: a table that requires grad raises). That of ``packed`` is one tensor, which
the backward of q and k writes into; autograd of the slices would join four. ``packed`` alone is kept.
Determinism: partial sums for the weights are added in a fixed order.
Source: the projections of DINOv3's attention with qk_norm.py and gated_attn.py of the released code.
"""

from __future__ import annotations

import torch

from deltakern import backend
from deltakern.ops import _extension, _triton, _validate
from deltakern.ops._once import as_dtype, once_differentiable
from deltakern.ops.rope_qk_norm import _forward, _forward_cpp, backward_into, check_turn, rope_qk_norm_reference, run

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def split_qkv_reference(
    packed: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    *,
    heads: int,
    gated: bool = False,
    order: str = "pre_rope",
    num_prefix: int = 0,
    eps: float = 1e-5,
) -> Outputs:
    """Plain PyTorch. See the module's docstring for the contract."""
    width = heads * cos.shape[1]
    q, k, v, rest = packed.split((width, width, width, packed.shape[-1] - 3 * width), -1)
    q, k, v = (t.unflatten(-1, (heads, cos.shape[1])) for t in (q, k, v))
    q, k = rope_qk_norm_reference(q, k, cos, sin, q_weight, k_weight, order=order, num_prefix=num_prefix, eps=eps)
    return q, k, v, rest[..., :heads] if gated else None


def _facts(packed, cos, sin, q_weight, k_weight, **_) -> backend.Facts:
    dtypes = tuple([t.dtype for t in (packed, cos, sin, q_weight, k_weight) if t is not None])
    return backend.Facts(packed.device.type, dtypes, backend.too_wide(cos.shape[-1], 256))


def slices(packed: torch.Tensor, heads: int, head: int, gated: bool) -> Outputs:
    width = heads * head
    q, k, v = packed[..., : 3 * width].unflatten(-1, (3, heads, head)).unbind(2)
    return q, k, v, packed[..., 3 * width : 3 * width + heads] if gated else None


def gradient_to_fill(
    packed: torch.Tensor,
    heads: int,
    head: int,
    grad_q: torch.Tensor | None,
    grad_k: torch.Tensor | None,
    grad_v: torch.Tensor | None,
    grad_gate: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(d_packed, dq, dk): the gradient, written but for q's and k's, and the views of it that their kernel fills."""
    d_packed = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    dq, dk, dv, _ = slices(d_packed, heads, head, False)
    for to, grad in ((dq, grad_q), (dk, grad_k)):
        if grad is None:
            to.zero_()
    if grad_v is None:
        dv.zero_()
    else:
        dv.copy_(grad_v)
    rest = d_packed[..., 3 * heads * head :]  # the gate's logits, and the columns of zero weights that fill the row
    if grad_gate is None:
        rest.zero_()
    else:
        rest[..., :heads].copy_(grad_gate)
        rest[..., heads:].zero_()
    return d_packed, dq, dk


def _run_backward(packed, cos, sin, q_weight, k_weight, grad_q, grad_k, grad_v, grad_gate, heads, pre_rope, num_prefix, eps):
    d_packed, dq, dk = gradient_to_fill(packed, heads, cos.shape[1], grad_q, grad_k, grad_v, grad_gate)
    q, k = slices(packed, heads, cos.shape[1], False)[:2]
    options = (pre_rope, num_prefix, eps)
    return d_packed, backward_into(dq, dk, q, k, cos, sin, q_weight, k_weight, grad_q, grad_k, *options)


def _backward_fake(packed, cos, sin, q_weight, k_weight, grad_q, grad_k, grad_v, grad_gate, heads, pre_rope, num_prefix, eps):
    return packed.new_empty(packed.shape), packed.new_empty((2, cos.shape[1]), dtype=torch.float32)


_backward = _triton.define(
    "split_qkv_backward(Tensor packed, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, Tensor? grad_q, Tensor? grad_k,"
    " Tensor? grad_v, Tensor? grad_gate, int heads, bool pre_rope, int num_prefix, float eps) -> (Tensor, Tensor)",
    module="rope_qk_norm",
    fake=_backward_fake,
)


_backward_cpp = _triton.register(
    "split_qkv_backward_cpp(Tensor packed, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, Tensor? grad_q, Tensor? grad_k,"
    " Tensor? grad_v, Tensor? grad_gate, int heads, bool pre_rope, int num_prefix, float eps) -> (Tensor, Tensor)",
    {"CPU": _run_backward},
    fake=_backward_fake,
)
_LIBRARY_OPS = {"triton": (_forward, _backward), "cpp": (_forward_cpp, _backward_cpp)}


class _SplitQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed, cos, sin, q_weight, k_weight, heads, gated, pre_rope, num_prefix, eps, impl):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(packed, cos, sin, q_weight, k_weight)
        ctx.options, ctx.impl = (heads, pre_rope, num_prefix, eps), impl
        q, k, v, gate = slices(packed, heads, cos.shape[1], gated)
        return *_LIBRARY_OPS[impl][0](q, k, cos, sin, q_weight, k_weight, pre_rope, num_prefix, eps), v, gate

    @staticmethod
    @once_differentiable("split_qkv")
    def backward(ctx, grad_q, grad_k, grad_v, grad_gate):
        packed, cos, sin, q_weight, k_weight = ctx.saved_tensors
        want_packed, _, _, want_q_weight, want_k_weight = ctx.needs_input_grad[:5]
        if grad_q is None and grad_k is None and grad_v is None and grad_gate is None:
            return (None,) * 11
        d_packed, sums = _LIBRARY_OPS[ctx.impl][1](packed, cos, sin, q_weight, k_weight, grad_q, grad_k, grad_v, grad_gate, *ctx.options)
        return (
            d_packed if want_packed else None,
            None,
            None,
            as_dtype(sums[0], q_weight.dtype) if want_q_weight and grad_q is not None else None,
            as_dtype(sums[1], k_weight.dtype) if want_k_weight and grad_k is not None else None,
            *(None,) * 6,
        )


def _check(packed, cos, sin, q_weight, k_weight, *, heads, gated, order, num_prefix, eps) -> None:
    op = "split_qkv"
    _validate.rank(op, "packed", packed, "(B,L,E)")
    _validate.rank(op, "cos", cos, "(N,d)")
    (_, length, columns), head = packed.shape, cos.shape[1]
    least = heads * (3 * head + 1) if gated else 3 * heads * head
    if heads < 1 or columns < least or (not gated and columns != least):
        wanted = "E >= 3*H*d + H" if gated else "E = 3*H*d"
        raise ValueError(f"{op}: packed must be (B,L,E) with {wanted} for H={heads}, d={head}, got {_validate.wanted_shape(packed)}")
    check_turn(op, length, head, cos, sin, q_weight, k_weight, order, num_prefix)
    _validate.floating_on_one_device(op, packed=packed, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight)


def _run(impl, packed, cos, sin, q_weight, k_weight, *, heads, gated, order, num_prefix, eps):
    if _triton.needs_grad(packed, q_weight, k_weight) and not torch.compiler.is_compiling():
        return _SplitQKV.apply(packed, cos, sin, q_weight, k_weight, heads, gated, order == "pre_rope", num_prefix, eps, impl)
    # Under torch.compile the slices' gradients are joined in the graph: a Function that returns views is not traced.
    q, k, v, gate = slices(packed, heads, cos.shape[1], gated)
    return *run(impl, q, k, cos, sin, q_weight, k_weight, order == "pre_rope", num_prefix, eps), v, gate


@backend.op(
    reference=split_qkv_reference,
    check=_check,
    facts=_facts,
    run=_run,
    kernels={"triton": backend.triton_refuses, "cpp": _extension.cpp_refuses},
)
def split_qkv(
    packed: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    *,
    heads: int,
    gated: bool = False,
    order: str = "pre_rope",
    num_prefix: int = 0,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Outputs:
    """``(q, k, v, gate logits or None)`` of a packed projection. The module's docstring is the contract.

    Args:
        packed: (B,L,E).
        cos, sin: (N,d) tables, used (L - num_prefix) / N times.
        q_weight, k_weight: (d,) of the per-head LayerNorms, or ``None`` for plain RoPE.
        heads: H.
        gated: whether H logits stand after v.
        order: "pre_rope" (norm, then rotate) or "post_rope".
        num_prefix: leading tokens that are not rotated.
        eps: of the LayerNorms.
        impl: see :mod:`deltakern.backend`.

    Raises:
        ValueError: shapes, devices, order, num_prefix, a table that requires grad. TypeError: dtypes.
    """
    options = {"heads": heads, "gated": gated, "order": order, "num_prefix": num_prefix, "eps": eps}
    return backend.call(split_qkv, impl, packed, cos, sin, q_weight, k_weight, **options)
