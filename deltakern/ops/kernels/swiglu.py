"""Kernels of ``swiglu``: both halves of a packed row are read, and written in the backward, where they stand; neither is copied out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltakern.ops import _triton
from deltakern.ops.kernels.common import row_offsets, segment_tile
from deltakern.ops.kernels.tiles import tile


@triton.jit
def swiglu_forward_kernel(gate_up, out, width, inner, outer_stride, inner_stride, BLOCK: tl.constexpr):
    row, column, mask = segment_tile(tl.program_id(0), width, BLOCK)
    here = gate_up + row_offsets(row, inner, outer_stride, inner_stride) + column
    gate = tl.load(here, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(here + width, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(
    gate_up, d_out, d_gate_up, width, inner, outer_stride, inner_stride, d_outer, d_inner, BLOCK: tl.constexpr
):  # fmt: skip
    row, column, mask = segment_tile(tl.program_id(0), width, BLOCK)
    here = gate_up + row_offsets(row, inner, outer_stride, inner_stride) + column
    gate = tl.load(here, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(here + width, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(d_out + row_offsets(row, inner, d_outer, d_inner) + column, mask=mask, other=0.0).to(tl.float32)
    opened = tl.sigmoid(gate)
    to = d_gate_up + row * (2 * width) + column
    tl.store(to, (g * up * opened * (1.0 + gate * (1.0 - opened))).to(d_gate_up.dtype.element_ty), mask=mask)
    tl.store(to + width, (g * gate * opened).to(d_gate_up.dtype.element_ty), mask=mask)


def swiglu_forward(gate_up: torch.Tensor) -> torch.Tensor:
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    x = _triton.rows(gate_up)
    size = tile("swiglu_forward", width, gate_up.dtype, _triton.architecture(gate_up.device))
    grid = (x.shape[0] * x.shape[1] * triton.cdiv(width, size.block),)
    _triton.launch(swiglu_forward_kernel, grid, size, x, out, width, x.shape[1], x.stride(0), x.stride(1), BLOCK=size.block)
    return out


def swiglu_backward(gate_up: torch.Tensor, d_out: torch.Tensor) -> torch.Tensor:
    width = gate_up.shape[-1] // 2
    d_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    x, g = _triton.rows(gate_up), _triton.rows(d_out)
    size = tile("swiglu_backward", width, gate_up.dtype, _triton.architecture(gate_up.device))
    grid = (x.shape[0] * x.shape[1] * triton.cdiv(width, size.block),)
    _triton.launch(
        swiglu_backward_kernel, grid, size, x, g, d_gate_up,
        width, x.shape[1], x.stride(0), x.stride(1), g.stride(0), g.stride(1), BLOCK=size.block,
    )  # fmt: skip
    return d_gate_up
