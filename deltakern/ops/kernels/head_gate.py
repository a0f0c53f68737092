"""Kernels of ``head_gate``. A row is a token and a head: d channels that share one gate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltakern.ops import _triton
from deltakern.ops.kernels.common import load_rows, store_rows
from deltakern.ops.kernels.tiles import tile


@triton.jit
def head_gate_forward_kernel(
    attn, logits, out, length, attn_b, attn_l, attn_h, logits_b, logits_l, logits_h,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    per_clip = tl.cdiv(length * HEADS, ROWS)
    clip = (tl.program_id(0) // per_clip).to(tl.int64)
    row = (tl.program_id(0) % per_clip) * ROWS + tl.arange(0, ROWS)
    live = row < length * HEADS
    token, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = live[:, None] & (column < WIDTH)[None, :]
    logit = tl.load(logits + clip * logits_b + token * logits_l + head * logits_h, mask=live, other=0.0).to(tl.float32)
    value = load_rows(attn, clip * attn_b + token * attn_l + head * attn_h, column, mask)
    store_rows(out, (clip * length * HEADS + row) * WIDTH, column, value * tl.sigmoid(logit)[:, None], mask)


@triton.jit
def head_gate_backward_kernel(
    attn, logits, grad, d_attn, d_logits, length,
    attn_b, attn_l, attn_h, logits_b, logits_l, logits_h, grad_b, grad_l, grad_h,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As the forward; the logit's gradient is a sum over the channels of a row, which one program holds whole."""
    per_clip = tl.cdiv(length * HEADS, ROWS)
    clip = (tl.program_id(0) // per_clip).to(tl.int64)
    row = (tl.program_id(0) % per_clip) * ROWS + tl.arange(0, ROWS)
    live = row < length * HEADS
    token, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = live[:, None] & (column < WIDTH)[None, :]
    logit = tl.load(logits + clip * logits_b + token * logits_l + head * logits_h, mask=live, other=0.0).to(tl.float32)
    value = load_rows(attn, clip * attn_b + token * attn_l + head * attn_h, column, mask)
    g = load_rows(grad, clip * grad_b + token * grad_l + head * grad_h, column, mask)
    gate = tl.sigmoid(logit)
    # 1 - gate by its own sigmoid: the difference would lose every digit where the gate is open
    slope = tl.sum(value * g, axis=1) * gate * tl.sigmoid(-logit)
    here = clip * length * HEADS + row
    store_rows(d_attn, here * WIDTH, column, g * gate[:, None], mask)
    tl.store(d_logits + here, slope.to(d_logits.dtype.element_ty), mask=live)


def head_gate_forward(attn: torch.Tensor, gate_logits: torch.Tensor) -> torch.Tensor:
    batch, length, heads, width = attn.shape
    out = torch.empty(attn.shape, dtype=attn.dtype, device=attn.device)
    size = tile("head_gate", width, attn.dtype, _triton.architecture(attn.device))
    a = _triton.unit(attn)
    _triton.launch(
        head_gate_forward_kernel, (batch * triton.cdiv(length * heads, size.rows),), size,
        a, gate_logits, out, length, *a.stride()[:3], *gate_logits.stride(),
        HEADS=heads, WIDTH=width, ROWS=size.rows, BLOCK=size.block,
    )  # fmt: skip
    return out


def head_gate_backward(attn: torch.Tensor, gate_logits: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(d_attn, d_logits)``, both contiguous."""
    batch, length, heads, width = attn.shape
    d_attn = torch.empty(attn.shape, dtype=attn.dtype, device=attn.device)
    d_logits = torch.empty(gate_logits.shape, dtype=gate_logits.dtype, device=attn.device)
    size = tile("head_gate", width, attn.dtype, _triton.architecture(attn.device))
    a, g = _triton.unit(attn), _triton.unit(grad)
    _triton.launch(
        head_gate_backward_kernel, (batch * triton.cdiv(length * heads, size.rows),), size,
        a, gate_logits, g, d_attn, d_logits, length, *a.stride()[:3], *gate_logits.stride(), *g.stride()[:3],
        HEADS=heads, WIDTH=width, ROWS=size.rows, BLOCK=size.block,
    )  # fmt: skip
    return d_attn, d_logits
