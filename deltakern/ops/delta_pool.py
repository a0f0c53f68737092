"""``delta_pool``: single-query attention that pools the normed tokens themselves.

Formula, for every clip and head (q one row a head, k and normed L rows)::

    p = softmax_j(scale * <q, k_j>)
    pooled = sum_j p_j * normed_j                    (D,) a head, not (d,)

The value projection commutes with the pooling, sum_j p_j (W n_j + b) = W (sum_j p_j n_j) + b, so the encoder's last block,
of which only the delta token's row is used, never forms V for its 2N+1 tokens: the caller applies each head's rows of W
to ``pooled``.
Shapes: normed (B,L,D), q (B,H,d), k (B,L,H,d) -> (B,H,D) in normed's dtype.
Dtypes: float32, bfloat16, float16 (float64 in the reference); scores, softmax and pooling in float32 (float64 for float64).
Gradient: normed, q, k; softmax statistics are kept, probabilities are not.
Determinism: partial results over tokens are combined in a fixed order.
Kernel: at most 64 heads and 4096 channels.
Source: exact algebra on DeltaTok.encode of the released code, which forms the whole block and drops all rows but the first.
"""

from __future__ import annotations

import torch

from deltakern import backend
from deltakern.ops import _triton, _validate
from deltakern.ops._once import once_differentiable

MOST_HEADS = 64
"""That the kernels take: a program pools for all of them."""


def delta_pool_reference(normed: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Plain PyTorch. See the module's docstring for the contract."""
    wide = torch.float64 if normed.dtype == torch.float64 else torch.float32
    with torch.autocast(normed.device.type, enabled=False):
        scores = torch.einsum("bhd,blhd->bhl", q.to(wide), k.to(wide)) * scale
        return torch.einsum("bhl,bld->bhd", scores.softmax(-1), normed.to(wide)).to(normed.dtype)


def _facts(normed, q, k, **_) -> backend.Facts:
    note = backend.too_wide(normed.shape[-1], 4096)
    if q.shape[1] > MOST_HEADS:
        note = f"the kernel takes at most {MOST_HEADS} heads"
    return backend.Facts(normed.device.type, (normed.dtype, q.dtype, k.dtype), note)


def _check(normed, q, k, **_) -> None:
    op = "delta_pool"
    _validate.rank(op, "normed", normed, "(B,L,D)")
    _validate.rank(op, "q", q, "(B,H,d)")
    batch, length, _ = normed.shape
    _validate.shape(op, "q", q, (batch, *q.shape[1:]), "(B,H,d)")
    _validate.shape(op, "k", k, (batch, length, *q.shape[1:]), "(B,L,H,d)")
    if length == 0:
        raise ValueError(f"{op}: normed must have at least one token, got {_validate.wanted_shape(normed)}")
    _validate.floating(op, normed=normed, q=q, k=k)
    _validate.one_device(op, normed=normed, q=q, k=k)


def _forward_fake(normed, q, k, scale):
    batch, heads, _ = q.shape
    shape = (batch, heads, normed.shape[2])
    wide = normed.new_empty(shape, dtype=torch.float32)
    return normed.new_empty(shape), wide, normed.new_empty((batch, heads, 2), dtype=torch.float32)


_forward = _triton.define(
    "delta_pool_forward(Tensor normed, Tensor q, Tensor k, float scale) -> (Tensor, Tensor, Tensor)",
    module="delta_pool",
    fake=_forward_fake,
)


def _backward_fake(normed, q, k, wide, statistics, grad, scale, want_normed):
    return normed.new_empty(normed.shape if want_normed else 0), q.new_empty(q.shape), k.new_empty(k.shape)


_backward = _triton.define(
    "delta_pool_backward(Tensor normed, Tensor q, Tensor k, Tensor wide, Tensor statistics, Tensor grad, float scale, bool want_normed)"
    " -> (Tensor, Tensor, Tensor)",
    module="delta_pool",
    fake=_backward_fake,
)


class _DeltaPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, normed, q, k, scale):
        out, wide, statistics = _forward(normed, q, k, scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(normed, q, k, wide, statistics)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable("delta_pool")
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 4
        want_normed, want_q, want_k, _ = ctx.needs_input_grad
        d_normed, dq, dk = _backward(*ctx.saved_tensors, grad, ctx.scale, want_normed)
        return d_normed if want_normed else None, dq if want_q else None, dk if want_k else None, None


def _run(_, normed, q, k, *, scale):
    return _DeltaPool.apply(normed, q, k, scale) if _triton.needs_grad(normed, q, k) else _forward(normed, q, k, scale)[0]


@backend.op(reference=delta_pool_reference, check=_check, facts=_facts, run=_run, kernels={"triton": backend.triton_refuses})
def delta_pool(normed: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *, scale: float, impl: str = "auto") -> torch.Tensor:
    """Attention of one query a head over L tokens, pooling the tokens themselves. The module's docstring is the contract.

    Args:
        normed: (B,L,D) tokens to pool.
        q: (B,H,d) one query a head.
        k: (B,L,H,d) keys.
        scale: multiplies the scores, usually d ** -0.5.
        impl: see :mod:`deltakern.backend`.

    Returns:
        (B,H,D) in normed's dtype.

    Raises:
        ValueError: shapes, devices, no token. TypeError: dtypes.
    """
    return backend.call(delta_pool, impl, normed, q, k, scale=scale)
