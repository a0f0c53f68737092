"""``recon_loss``: the mean reconstruction loss of a prediction, as a scalar.

Formula, d = pred - target in float32::

    kind="log_cosh"    mean(|d| + softplus(-2|d|) - log 2)       DeltaTok's training loss
    kind="smooth_l1"   mean(d^2 / (2 beta) where |d| < beta, else |d| - beta / 2)
    kind="mse"         mean(d^2)

Shapes: pred, target of one shape, any rank -> scalar, float32 (float64 for float64). An empty input gives NaN, as torch's mean.
Dtypes: float32, bfloat16, float16 (float64 in the reference), the two may differ.
Gradient: pred and target.
Determinism: partial sums are added in a fixed order.
Source: LogCoshLoss and the loss_fn table of the released training code; paper, section 3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from deltakern import backend
from deltakern.ops import _triton, _validate
from deltakern.ops._once import once_differentiable

KINDS = ("log_cosh", "smooth_l1", "mse")


def recon_loss_reference(pred: torch.Tensor, target: torch.Tensor, *, kind: str = "log_cosh", beta: float = 0.1) -> torch.Tensor:
    """Plain PyTorch. See the module's docstring for the contract."""
    wide = torch.float64 if torch.float64 in (pred.dtype, target.dtype) else torch.float32
    difference = pred.to(wide) - target.to(wide)
    if kind == "mse":
        return difference.square().mean()
    size = difference.abs()
    if kind == "log_cosh":
        return (size + F.softplus(-2.0 * size) - math.log(2.0)).mean()
    return torch.where(size < beta, difference.square() / (2 * beta), size - beta / 2).mean()


def _facts(pred, target, **_) -> backend.Facts:
    return backend.Facts(pred.device.type, (pred.dtype, target.dtype))


def _forward_fake(pred, target, kind, beta, unit_dtype):
    unit = pred.new_empty(pred.shape if unit_dtype else (0,), dtype=unit_dtype or torch.float32)
    return pred.new_empty((), dtype=torch.float32), unit


_forward = _triton.define(
    "recon_loss_forward(Tensor pred, Tensor target, str kind, float beta, ScalarType? unit_dtype) -> (Tensor, Tensor)",
    module="recon_loss",
    fake=_forward_fake,
)


def _backward_fake(unit, d_loss, pred_dtype, target_dtype):
    return tuple(unit.new_empty(unit.shape if dtype else (0,), dtype=dtype or torch.float32) for dtype in (pred_dtype, target_dtype))


_backward = _triton.define(
    "recon_loss_backward(Tensor unit, Tensor d_loss, ScalarType? pred_dtype, ScalarType? target_dtype) -> (Tensor, Tensor)",
    module="recon_loss",
    fake=_backward_fake,
)


class _ReconLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, target, kind, beta):
        ctx.dtypes = tuple(t.dtype if wanted else None for t, wanted in zip((pred, target), ctx.needs_input_grad, strict=False))
        # A derivative within [-1, 1] loses nothing in a gradient's own dtype; that of "mse" could overflow float16.
        kept = [dtype for dtype in ctx.dtypes if dtype is not None]
        unit_dtype = torch.float32 if kind == "mse" else torch.promote_types(kept[0], kept[-1])
        mean, unit = _forward(pred, target, kind, beta, unit_dtype)
        ctx.save_for_backward(unit)
        return mean

    @staticmethod
    @once_differentiable("recon_loss")
    def backward(ctx, d_loss):
        (unit,) = ctx.saved_tensors
        grads = _backward(unit, d_loss, *ctx.dtypes)
        return (*(g if dtype is not None else None for g, dtype in zip(grads, ctx.dtypes, strict=True)), None, None)


def _check(pred, target, *, kind, beta) -> None:
    _validate.choice("recon_loss", "kind", kind, KINDS)
    _validate.shape("recon_loss", "target", target, pred.shape, "pred's shape")
    if kind == "smooth_l1" and not beta > 0:
        raise ValueError(f"recon_loss: beta must be positive, got {beta}")
    _validate.floating("recon_loss", pred=pred, target=target)
    _validate.one_device("recon_loss", pred=pred, target=target)


def _run(_, pred, target, *, kind, beta):
    if _triton.needs_grad(pred, target):
        return _ReconLoss.apply(pred, target, kind, beta)
    return _forward(pred, target, kind, beta, None)[0]


@backend.op(reference=recon_loss_reference, check=_check, facts=_facts, run=_run, kernels={"triton": backend.triton_refuses})
def recon_loss(pred: torch.Tensor, target: torch.Tensor, *, kind: str = "log_cosh", beta: float = 0.1, impl: str = "auto") -> torch.Tensor:
    """The mean loss of ``pred`` against ``target``. The module's docstring is the contract.

    Args:
        pred, target: one shape, any rank.
        kind: "log_cosh", "smooth_l1" or "mse".
        beta: where smooth-L1 turns linear; positive, ignored otherwise.
        impl: see :mod:`deltakern.backend`.

    Raises:
        ValueError: shapes, devices, kind, beta. TypeError: dtypes.
    """
    return backend.call(recon_loss, impl, pred, target, kind=kind, beta=beta)
