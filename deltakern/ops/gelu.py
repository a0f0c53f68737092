"""``gelu``: the exact (erf) GELU of the backbone's and the predictor's MLPs.

Formula: ``out = x * (1 + erf(x / sqrt(2))) / 2``.
Shapes: any -> the same, in the same dtype.
Dtypes: float32, bfloat16, float16 (float64 in the reference); computed in float32 (float64 for float64), rounded once.
Gradient: x, of which alone is kept for the backward.
Source: DINOv3's MLP (hidden_act="gelu") and the released Predictor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from deltakern import backend
from deltakern.ops import _triton, _validate
from deltakern.ops._once import once_differentiable


def gelu_reference(x: torch.Tensor) -> torch.Tensor:
    """Plain PyTorch. See the module's docstring for the contract."""
    return F.gelu(x)


def _facts(x, **_) -> backend.Facts:
    return backend.Facts(x.device.type, (x.dtype,))


_forward = _triton.define(
    "gelu_forward(Tensor x) -> Tensor",
    module="gelu",
    fake=lambda x: x.new_empty(x.shape),
)
_backward = _triton.define(
    "gelu_backward(Tensor x, Tensor d_out) -> Tensor",
    module="gelu",
    fake=lambda x, d_out: x.new_empty(x.shape),
)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _forward(x)

    @staticmethod
    @once_differentiable("gelu")
    def backward(ctx, d_out):
        return _backward(*ctx.saved_tensors, d_out)


def _check(x) -> None:
    _validate.floating("gelu", x=x)


def _run(_, x):
    return _Gelu.apply(x) if _triton.needs_grad(x) else _forward(x)


@backend.op(reference=gelu_reference, check=_check, facts=_facts, run=_run, kernels={"triton": backend.triton_refuses})
def gelu(x: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """Exact GELU. The module's docstring is the contract.

    Raises:
        TypeError: the dtype.
    """
    return backend.call(gelu, impl, x)
