"""Kernels of ``best_of_n_head``: a linear layer whose epilogue is the loss, so that no prediction is ever stored.

A program walks over tiles of candidates. It norms a tile's rows once, into a scratch of its own that is as high as one tile and
stays in the cache, and then multiplies them with the head as any dense kernel does, slice by slice through shared memory: normed
in the registers of the product itself, every row would be normed again for every tile of the head. Each tile of the product
ends as one float32 sum a row. A second kernel, small, divides the sums and picks the least.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltakern.ops import _triton
from deltakern.ops.kernels.common import elementwise_loss, load_rows, row_offsets, row_statistics
from deltakern.ops.kernels.tiles import tile

NORMED = 8192
"""Elements of the rows that are normed at a time: 32 a thread of eight warps."""


@triton.jit
def best_of_n_head_kernel(
    stream, branch, scale, weight, bias, head, head_bias, target, scratch, sums,
    each, patches, tiles, share, stream_inner, target_inner, stream_outer, stream_row, branch_outer, branch_row, head_row,
    target_outer, target_row, eps, beta,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    NORM_ROWS: tl.constexpr, NORM_BLOCK: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_HEAD_BIAS: tl.constexpr, ONE_TARGET: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    """Program p walks over tiles p * share and on; a tile is ROWS of the ``each`` rows of one group (candidates times patches).

    ONE_TARGET: a group has one target row, not one a patch. PADDED: WIDTH rounded up to DEPTH, the slice of a product.
    """
    eps = tl.cast(eps, tl.float32)
    beta = tl.cast(beta, tl.float32)
    program = tl.program_id(0)
    mine = scratch + program.to(tl.int64) * ROWS * PADDED
    parts = tl.cdiv(each, ROWS)
    lane = tl.arange(0, ROWS)
    first = program * share
    for number in range(first, tl.minimum(first + share, tiles)):
        group = number // parts
        start = (number % parts) * ROWS

        column = tl.arange(0, NORM_BLOCK)
        inside = column < WIDTH
        for step in range(0, ROWS, NORM_ROWS):
            place = step + tl.arange(0, NORM_ROWS)
            row = group * each + start + place
            mask = (start + place < each)[:, None] & inside[None, :]
            x = load_rows(stream, row_offsets(row, stream_inner, stream_outer, stream_row), column, mask)
            if HAS_BRANCH:
                y = load_rows(branch, row_offsets(row, stream_inner, branch_outer, branch_row), column, mask)
                if HAS_SCALE:
                    y = y * tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)[None, :]
                x = (y + x).to(stream.dtype.element_ty).to(tl.float32)
            mean, rstd = row_statistics(x, mask, eps, WIDTH)
            y = (x - mean[:, None]) * rstd[:, None] * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            if HAS_BIAS:
                y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            y = tl.where(mask, y, 0.0)  # zeros to the edge of the last slice, and in rows that are none
            tl.store(mine + place[:, None] * PADDED + column[None, :], y.to(scratch.dtype.element_ty), mask=(column < PADDED)[None, :])
        tl.debug_barrier()

        total = tl.zeros((ROWS,), tl.float32)
        for first_output in range(0, OUT, BLOCK):
            output = first_output + tl.arange(0, BLOCK)
            row = head + output.to(tl.int64)[:, None] * head_row
            acc = tl.zeros((ROWS, BLOCK), tl.float32)
            for first_input in range(0, WIDTH, DEPTH):
                depth = first_input + tl.arange(0, DEPTH)
                x = tl.load(mine + lane[:, None] * PADDED + depth[None, :])
                if OUT % BLOCK == 0 and WIDTH % DEPTH == 0:
                    w = tl.load(row + depth[None, :])
                else:
                    w = tl.load(row + depth[None, :], mask=(output < OUT)[:, None] & (depth < WIDTH)[None, :], other=0.0)
                acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
            real = output < OUT
            if ONE_TARGET:
                offset = row_offsets(group, target_inner, target_outer, target_row)
                goal = tl.load(target + offset + output, mask=real, other=0.0).to(tl.float32)[None, :]
            else:
                offsets = row_offsets(group * patches + (start + lane) % patches, target_inner, target_outer, target_row)
                goal = load_rows(target, offsets, output, real[None, :])
            if HAS_HEAD_BIAS:  # subtracted from the target, of which there is less
                goal -= tl.load(head_bias + output, mask=real, other=0.0).to(tl.float32)[None, :]
            value = elementwise_loss(acc - goal, beta, LOSS)
            if OUT % BLOCK != 0:
                value = tl.where(real[None, :], value, 0.0)
            total += tl.sum(value, axis=1)
        tl.store(sums + group.to(tl.int64) * each + start + lane, total, mask=start + lane < each)
        tl.debug_barrier()  # before the next tile's rows take the place of this one's


@triton.jit
def best_of_n_head_pick_kernel(
    sums, index, loss, losses, count, patches, elements, BLOCK: tl.constexpr, PATCHES: tl.constexpr, LOSSES: tl.constexpr
):  # fmt: skip
    """One program: one group. Its candidates BLOCK at a time, their patches PATCHES at a time, in order."""
    group = tl.program_id(0).to(tl.int64)
    elements = tl.cast(elements, tl.float32)
    best = tl.full((), float("inf"), tl.float32)
    winner = tl.full((), 0, tl.int32) + count  # none yet
    for first in range(0, count, BLOCK):
        n = first + tl.arange(0, BLOCK)
        row = (group * count + n) * patches
        total = tl.zeros((BLOCK, PATCHES), tl.float32)
        for start in range(0, patches, PATCHES):
            patch = start + tl.arange(0, PATCHES)
            mask = (n < count)[:, None] & (patch < patches)[None, :]
            total += tl.load(sums + row[:, None] + patch[None, :], mask=mask, other=0.0)
        value = tl.div_rn(tl.sum(total, axis=1), tl.zeros((BLOCK,), tl.float32) + elements)
        if LOSSES:
            tl.store(losses + group * count + n, value, mask=n < count)
        number = (n < count) & (value == value)
        value = tl.where(number, value, float("inf"))
        least = tl.min(value, axis=0)
        here = tl.min(tl.where(number & (value == least), n, count), axis=0)
        better = (here < count) & ((winner == count) | (least < best))
        best = tl.where(better, least, best)
        winner = tl.where(better, here, winner)
    tl.store(index + group, tl.where(winner < count, winner, 0).to(tl.int64))
    tl.store(loss + group, tl.where(winner < count, best, float("nan")))


def _dense(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.contiguous()


def best_of_n_head(
    stream: torch.Tensor,
    branch: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    head: torch.Tensor,
    head_bias: torch.Tensor | None,
    target: torch.Tensor,
    eps: float,
    loss: str,
    beta: float,
    reduce_dims: int,
    return_losses: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(index, loss, losses)``, the last empty where it is not wanted."""
    device, axis = stream.device, stream.ndim - reduce_dims - 1
    outputs, width = head.shape
    leading, count, patches = stream.shape[:axis], stream.shape[axis], stream.shape[axis + 1 : -1].numel()
    groups, each = leading.numel(), count * patches
    index = torch.empty(leading, dtype=torch.int64, device=device)
    least = torch.empty(leading, dtype=torch.float32, device=device)
    losses = torch.empty((*leading, count) if return_losses else (0,), dtype=torch.float32, device=device)
    sums = torch.empty((groups, count, patches), dtype=torch.float32, device=device)

    name = "best_of_n_head_narrow" if patches > 1 or loss == "log_cosh" else "best_of_n_head"
    size = tile(name, width, head.dtype, _triton.architecture(device))
    depth = 128 // head.dtype.itemsize  # a slice of a row is one line of the cache
    padded = triton.cdiv(width, depth) * depth
    block = triton.next_power_of_2(padded)
    tiles = groups * triton.cdiv(each, size.rows)
    share = max(1, triton.cdiv(tiles, _triton.programs(device, size, tiles)))
    programs = triton.cdiv(tiles, share)
    scratch = torch.empty((programs, size.rows, padded), dtype=head.dtype, device=device)
    s, t, w = _triton.rows(stream), _triton.rows(target), _triton.unit(head)
    b = None if branch is None else _triton.rows(branch)
    _triton.launch(
        best_of_n_head_kernel, (programs,), size,
        s, b, *map(_dense, (scale, weight, bias)), w, _dense(head_bias), t, scratch, sums,
        each, patches, tiles, share, s.shape[1], t.shape[1], s.stride(0), s.stride(1), *((0, 0) if b is None else b.stride()[:2]),
        w.stride(0), t.stride(0), t.stride(1), eps, beta,
        WIDTH=width, PADDED=padded, OUT=outputs, ROWS=size.rows, BLOCK=size.block, DEPTH=depth,
        NORM_ROWS=min(size.rows, max(1, NORMED // block)), NORM_BLOCK=block, HAS_BRANCH=branch is not None,
        HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, HAS_HEAD_BIAS=head_bias is not None, ONE_TARGET=patches == 1, LOSS=loss,
    )  # fmt: skip
    size = tile("best_of_n_head_pick", count, torch.float32, _triton.architecture(device))
    across = min(triton.next_power_of_2(patches), 128)
    _triton.launch(
        best_of_n_head_pick_kernel, (groups,), size,
        sums, index, least, losses, count, patches, float(patches * outputs),
        BLOCK=size.block // across, PATCHES=across, LOSSES=return_losses,
    )  # fmt: skip
    return index, least, losses
