"""``layer_norm``: the LayerNorm of a residual stream that has no branch to add; ``residual_norm`` without the sum.

Formula: ``out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias``.
Shapes: x (..., D); weight, bias (D,), ``bias=None`` for none. Out: (..., D).
Dtypes: x float32, bfloat16, float16 (float64 in the reference); computed in float32 (float64 for float64). ``out`` has
``out_dtype``, or x's.
Gradient: x, weight, bias; x is kept for it, and two float32 numbers a row.
Determinism: the same inputs give the same bits, and those of ``residual_norm``'s second output for a first one that is x: a
backward makes that output again from the stream instead of keeping it.
Source: the LayerNorms of DINOv3ViTLayer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from deltakern import backend
from deltakern.ops import _triton, _validate
from deltakern.ops._once import as_dtype, once_differentiable
from deltakern.ops.residual_norm import _backward


def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, eps: float = 1e-5, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Plain PyTorch. See the module's docstring for the contract."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.dtype is weight.dtype is wide and out_dtype in (None, wide) and (bias is None or bias.dtype is wide):  # nothing to cast
        return torch.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    normed = F.layer_norm(x.to(wide), (x.shape[-1],), weight.to(wide), None if bias is None else bias.to(wide), eps)
    return normed.to(out_dtype or x.dtype)


def _facts(x, weight, bias, *, out_dtype=None, **_) -> backend.Facts:
    dtypes = [t.dtype for t in (x, weight, bias) if t is not None]
    return backend.Facts(x.device.type, (*dtypes, out_dtype or x.dtype), backend.too_wide(x.shape[-1]))


def _check(x, weight, bias, **_) -> None:
    if x.ndim == 0:
        raise ValueError(f"layer_norm: x must be (...,D), got {_validate.wanted_shape(x)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            _validate.shape("layer_norm", name, tensor, x.shape[-1:], "(D,)")
    _validate.floating_on_one_device("layer_norm", x=x, weight=weight, bias=bias)


def _forward_fake(x, weight, bias, eps, out_dtype, want_statistics):
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty((2, x[..., 0].numel()) if want_statistics else 0, dtype=torch.float32)


_forward = _triton.define(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType out_dtype, bool want_statistics) -> (Tensor, Tensor)",
    module="residual_norm",
    fake=_forward_fake,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, out_dtype):
        normed, statistics = _forward(x, weight, bias, eps, out_dtype, True)
        ctx.save_for_backward(x, weight, statistics)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return normed

    @staticmethod
    @once_differentiable("layer_norm")
    def backward(ctx, grad):
        x, weight, statistics = ctx.saved_tensors
        want_x, want_weight, want_bias, _, _ = ctx.needs_input_grad
        d_x, _, sums = _backward(x, None, None, weight, statistics, None, grad, None, want_x, False, want_weight or want_bias)
        _, d_weight, d_bias = sums.unbind()
        return (
            d_x if want_x else None,
            as_dtype(d_weight, weight.dtype) if want_weight else None,
            as_dtype(d_bias, ctx.bias_dtype) if want_bias else None,
            None,
            None,
        )


def _run(_, x, weight, bias, *, eps, out_dtype):
    out_dtype = out_dtype or x.dtype
    if _triton.needs_grad(x, weight, bias):
        return _LayerNorm.apply(x, weight, bias, eps, out_dtype)
    return _forward(x, weight, bias, eps, out_dtype, False)[0]


@backend.op(reference=layer_norm_reference, check=_check, facts=_facts, run=_run, kernels={"triton": backend.triton_refuses})
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """LayerNorm of (..., D) in ``out_dtype``. The module's docstring is the contract.

    Args:
        x: (..., D).
        weight, bias: (D,); ``bias=None`` for none.
        eps: added to the variance.
        out_dtype: of the result; x's by default.
        impl: see :mod:`deltakern.backend`.

    Raises:
        ValueError: shapes, devices. TypeError: dtypes.
    """
    return backend.call(layer_norm, impl, x, weight, bias, eps=eps, out_dtype=out_dtype)
