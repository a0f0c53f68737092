"""Kernels of ``recon_loss``: the loss and its derivative in one read of prediction and target.

The forward keeps the derivative of each element's loss, not divided by their number (in half precision that would underflow).
The backward multiplies it by the incoming scalar, read on the device, into new memory: the scalar is unknown before, and
scaling in place would spoil a second backward. That moves as many bytes as reading both inputs again would, and
frees the prediction in the meantime.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltakern.ops import _triton
from deltakern.ops.kernels.common import elementwise_loss, segment_tile
from deltakern.ops.kernels.tiles import tile


@triton.jit
def _derivative(d, beta, KIND: tl.constexpr):
    size = tl.abs(d)
    sign = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    if KIND == "mse":
        derivative = 2.0 * d
    elif KIND == "smooth_l1":
        derivative = tl.where(size < beta, d / beta, sign)
    else:
        # As the loss itself: near zero the closed form cancels, so there the series takes over
        square = d * d
        decay = tl.exp(-2.0 * size)
        derivative = tl.where(
            size < 0.125,
            d * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0)))),
            sign * ((1.0 - decay) / (1.0 + decay)),
        )
    return derivative


@triton.jit
def recon_loss_forward_kernel(
    pred, target, unit, partials, length, pred_stride, target_stride, tiles, each, beta,
    BLOCK: tl.constexpr, KIND: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Program p walks over tiles p * each and on, and leaves the sum of their losses in ``partials``."""
    beta = tl.cast(beta, tl.float32)
    program = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    first = program * each
    for number in range(first, tl.minimum(first + each, tiles)):
        segment, column, mask = segment_tile(number, length, BLOCK)
        p = tl.load(pred + segment * pred_stride + column, mask=mask, other=0.0).to(tl.float32)
        t = tl.load(target + segment * target_stride + column, mask=mask, other=0.0).to(tl.float32)
        total += elementwise_loss(p - t, beta, KIND)  # of zero where masked, which every kind maps to zero
        if UNIT:
            derivative = _derivative(p - t, beta, KIND)
            tl.store(unit + segment * length + column, derivative.to(unit.dtype.element_ty), mask=mask)
    tl.store(partials + program, tl.sum(total, axis=0))


@triton.jit
def recon_loss_mean_kernel(partials, mean, programs, count, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(partials + index, mask=index < programs, other=0.0), axis=0)
    tl.store(mean, tl.div_rn(total, tl.cast(count, tl.float32)))


@triton.jit
def recon_loss_backward_kernel(
    unit, d_loss, d_pred, d_target, length, count, BLOCK: tl.constexpr, PRED: tl.constexpr, TARGET: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < length
    factor = tl.load(d_loss).to(tl.float32) / tl.cast(count, tl.float32)
    g = tl.load(unit + column, mask=mask, other=0.0).to(tl.float32) * factor
    if PRED:
        tl.store(d_pred + column, g.to(d_pred.dtype.element_ty), mask=mask)
    if TARGET:
        tl.store(d_target + column, (-g).to(d_target.dtype.element_ty), mask=mask)


def recon_loss_forward(
    pred: torch.Tensor, target: torch.Tensor, kind: str, beta: float, unit_dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(mean, unit)``: the loss, and its derivatives times the number of elements, empty without a ``unit_dtype``."""
    device = pred.device
    unit = torch.empty(pred.shape if unit_dtype else (0,), dtype=unit_dtype or torch.float32, device=device)
    mean = torch.empty((), dtype=torch.float32, device=device)
    p, t = _triton.segments([pred, target])
    segments, length = p.shape
    size = tile("recon_loss_forward", length, pred.dtype, _triton.architecture(device))
    tiles = segments * triton.cdiv(length, size.block)
    programs = _triton.programs(device, size, tiles)
    partials = torch.empty((programs,), dtype=torch.float32, device=device)
    _triton.launch(
        recon_loss_forward_kernel, (programs,), size,
        p, t, unit, partials, length, p.stride(0), t.stride(0), tiles, triton.cdiv(tiles, programs), beta,
        BLOCK=size.block, KIND=kind, UNIT=unit_dtype is not None,
    )  # fmt: skip
    count = float(pred.numel() or "nan")
    size = tile("recon_loss_mean", programs, torch.float32, _triton.architecture(device))
    _triton.launch(recon_loss_mean_kernel, (1,), size, partials, mean, programs, count, BLOCK=size.block)
    return mean, unit


def recon_loss_backward(
    unit: torch.Tensor, d_loss: torch.Tensor, pred_dtype: torch.dtype | None, target_dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(d_pred, d_target)``; what has no dtype is not wanted and empty."""
    device, length = unit.device, unit.numel()
    unit = unit.contiguous()
    d_pred = torch.empty(unit.shape if pred_dtype else (0,), dtype=pred_dtype or torch.float32, device=device)
    d_target = torch.empty(unit.shape if target_dtype else (0,), dtype=target_dtype or torch.float32, device=device)
    size = tile("recon_loss_backward", length, unit.dtype, _triton.architecture(device))
    _triton.launch(
        recon_loss_backward_kernel, (triton.cdiv(length, size.block),), size,
        unit, d_loss, d_pred, d_target, length, float(length),
        BLOCK=size.block, PRED=pred_dtype is not None, TARGET=target_dtype is not None,
    )  # fmt: skip
    return d_pred, d_target
