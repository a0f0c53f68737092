"""Kernels of ``gelu``: element by element over contiguous segments, a tile a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltakern.ops import _triton
from deltakern.ops.kernels.common import segment_tile
from deltakern.ops.kernels.tiles import tile


@triton.jit
def normal_cdf(x):
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def gelu_forward_kernel(x, out, length, x_stride, BLOCK: tl.constexpr):
    segment, column, mask = segment_tile(tl.program_id(0), length, BLOCK)
    value = tl.load(x + segment * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + segment * length + column, (value * normal_cdf(value)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def gelu_backward_kernel(x, d_out, d_x, length, x_stride, d_out_stride, BLOCK: tl.constexpr):
    segment, column, mask = segment_tile(tl.program_id(0), length, BLOCK)
    value = tl.load(x + segment * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(d_out + segment * d_out_stride + column, mask=mask, other=0.0).to(tl.float32)
    density = 0.3989422804014327 * tl.exp(-0.5 * value * value)
    tl.store(d_x + segment * length + column, (g * (normal_cdf(value) + value * density)).to(d_x.dtype.element_ty), mask=mask)


def gelu_forward(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (view,) = _triton.segments([x])
    count, length = view.shape
    size = tile("gelu_forward", length, x.dtype, _triton.architecture(x.device))
    grid = (count * triton.cdiv(length, size.block),)
    _triton.launch(gelu_forward_kernel, grid, size, view, out, length, view.stride(0), BLOCK=size.block)
    return out


def gelu_backward(x: torch.Tensor, d_out: torch.Tensor) -> torch.Tensor:
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    view, d_view = _triton.segments([x, d_out])
    count, length = view.shape
    size = tile("gelu_backward", length, x.dtype, _triton.architecture(x.device))
    grid = (count * triton.cdiv(length, size.block),)
    _triton.launch(gelu_backward_kernel, grid, size, view, d_view, d_x, length, view.stride(0), d_view.stride(0), BLOCK=size.block)
    return d_x
