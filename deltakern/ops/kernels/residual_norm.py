"""Kernels of ``residual_norm``. A tile holds whole rows, so the stream is read once and both outputs are written from registers.

The backward keeps nothing but the stream as stored, the branch where the scale has a gradient, and two float32 statistics a row.
``layer_norm``, the same without a branch, has its launchers here too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltakern.ops import _triton
from deltakern.ops.kernels.common import load_rows, norm_backward, row_offsets, row_statistics, store_rows
from deltakern.ops.kernels.tiles import tile


@triton.jit
def residual_norm_forward_kernel(
    stream, branch, scale, weight, bias, total, normed, statistics,
    count, inner, stream_outer, stream_inner, branch_outer, branch_inner, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BRANCH: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    live = row < count
    inside = column < WIDTH
    mask = live[:, None] & inside[None, :]
    here = row.to(tl.int64) * WIDTH  # the outputs are contiguous

    x = load_rows(stream, row_offsets(row, inner, stream_outer, stream_inner), column, mask)
    if HAS_BRANCH:
        z = load_rows(branch, row_offsets(row, inner, branch_outer, branch_inner), column, mask)
        if HAS_SCALE:
            z = z * tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        stored = (z + x).to(total.dtype.element_ty)
        tl.store(total + here[:, None] + column[None, :], stored, mask=mask)
        x = stored.to(tl.float32)
    if HAS_NORM:
        mean, rstd = row_statistics(x, mask, tl.cast(eps, tl.float32), WIDTH)
        if STATISTICS:
            tl.store(statistics + row, mean, mask=live)
            tl.store(statistics + count + row, rstd, mask=live)
        y = (x - mean[:, None]) * rstd[:, None] * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        store_rows(normed, here, column, y, mask)


@triton.jit
def residual_norm_backward_kernel(
    total, branch, scale, weight, statistics, d_total, d_normed, d_stream, d_branch, partials,
    count, inner, branch_outer, branch_inner, d_total_outer, d_total_inner, d_normed_outer, d_normed_inner, each,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_D_TOTAL: tl.constexpr,
    STREAM: tl.constexpr, BRANCH: tl.constexpr, SCALE: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """STREAM, BRANCH, SCALE, WEIGHT say which gradients are wanted. Program p walks over rows p * each and on."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    if HAS_SCALE:
        gamma = tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    sum_scale = tl.zeros((BLOCK,), tl.float32)
    sum_weight = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)

    first = program * each
    last = tl.minimum(first + each, count)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < last
        mask = live[:, None] & inside[None, :]
        here = row.to(tl.int64) * WIDTH
        g = tl.zeros((ROWS, BLOCK), tl.float32)
        if HAS_NORM:
            x = load_rows(total, here, column, mask)
            dy = load_rows(d_normed, row_offsets(row, inner, d_normed_outer, d_normed_inner), column, mask)
            mean = tl.load(statistics + row, mask=live, other=0.0)
            rstd = tl.load(statistics + count + row, mask=live, other=0.0)
            xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
            if WEIGHT:
                sum_weight += tl.sum(dy * xhat, axis=0)
                sum_bias += tl.sum(dy, axis=0)
            g = norm_backward(dy * w[None, :], xhat, rstd, WIDTH)
        if HAS_D_TOTAL:
            g += load_rows(d_total, row_offsets(row, inner, d_total_outer, d_total_inner), column, mask)
        if STREAM:
            store_rows(d_stream, here, column, g, mask)
        if SCALE:
            z = load_rows(branch, row_offsets(row, inner, branch_outer, branch_inner), column, mask)
            sum_scale += tl.sum(g * z, axis=0)
        if BRANCH:
            store_rows(d_branch, here, column, g * gamma[None, :] if HAS_SCALE else g, mask)

    if SCALE or WEIGHT:
        to = partials + program.to(tl.int64) * 3 * WIDTH + column
        tl.store(to, sum_scale, mask=inside)
        tl.store(to + WIDTH, sum_weight, mask=inside)
        tl.store(to + 2 * WIDTH, sum_bias, mask=inside)


def _dense(vector: torch.Tensor | None) -> torch.Tensor | None:
    return None if vector is None else vector.contiguous()


def residual_norm_forward(
    stream: torch.Tensor,
    branch: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    want_statistics: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(total, normed, statistics)``, the statistics (2, rows) float32, where they are wanted; the last two are empty without a weight."""
    width = stream.shape[-1]
    total = torch.empty(stream.shape, dtype=stream.dtype, device=stream.device)
    count = stream[..., 0].numel()
    norm = weight is not None
    normed = torch.empty(stream.shape if norm else (0,), dtype=out_dtype, device=stream.device)
    keeps = norm and want_statistics
    statistics = torch.empty((2, count) if keeps else (0,), dtype=torch.float32, device=stream.device)
    s, b = _triton.rows(stream), _triton.rows(branch)
    size = tile("residual_norm_forward", width, stream.dtype, _triton.architecture(stream.device))
    _triton.launch(
        residual_norm_forward_kernel, (triton.cdiv(count, size.rows),), size,
        s, b, *map(_dense, (scale, weight, bias)), total, normed, statistics if keeps else None,
        count, s.shape[1], s.stride(0), s.stride(1), b.stride(0), b.stride(1), eps,
        WIDTH=width, ROWS=size.rows, BLOCK=size.block,
        HAS_BRANCH=True, HAS_SCALE=scale is not None, HAS_NORM=norm, HAS_BIAS=bias is not None, STATISTICS=keeps,
    )  # fmt: skip
    return total, normed, statistics


def layer_norm_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, out_dtype: torch.dtype, want_statistics: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(normed, statistics)``, the bits of ``residual_norm``'s for a stream that is ``x`` as stored."""
    width = x.shape[-1]
    count = x[..., 0].numel()
    normed = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    statistics = torch.empty((2, count) if want_statistics else (0,), dtype=torch.float32, device=x.device)
    s = _triton.rows(x)
    size = tile("residual_norm_forward", width, x.dtype, _triton.architecture(x.device))
    _triton.launch(
        residual_norm_forward_kernel, (triton.cdiv(count, size.rows),), size,
        s, s, None, *map(_dense, (weight, bias)), s, normed, statistics if want_statistics else None,
        count, s.shape[1], s.stride(0), s.stride(1), s.stride(0), s.stride(1), eps,
        WIDTH=width, ROWS=size.rows, BLOCK=size.block,
        HAS_BRANCH=False, HAS_SCALE=False, HAS_NORM=True, HAS_BIAS=bias is not None, STATISTICS=want_statistics,
    )  # fmt: skip
    return normed, statistics


def residual_norm_backward(
    total: torch.Tensor | None,
    branch: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    statistics: torch.Tensor | None,
    d_total: torch.Tensor | None,
    d_normed: torch.Tensor | None,
    branch_dtype: torch.dtype | None,
    want_stream: bool,
    want_scale: bool,
    want_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(d_stream, d_branch, sums)``, the sums (3, D) float32 of scale, weight and bias; what is not wanted is empty.

    total, weight and statistics go with d_normed, the branch with its scale's gradient; the branch's own has ``branch_dtype``.
    """
    like = d_total if total is None else total
    width, device = like.shape[-1], like.device
    count = like[..., 0].numel()
    norm = d_normed is not None
    d_stream = torch.empty(like.shape if want_stream else (0,), dtype=like.dtype, device=device)
    d_branch = torch.empty(like.shape if branch_dtype else (0,), dtype=branch_dtype or torch.float32, device=device)
    size = tile("residual_norm_backward", width, like.dtype, _triton.architecture(device))
    tiles = triton.cdiv(count, size.rows)
    programs = _triton.programs(device, size, tiles)
    sums = want_scale or (want_weight and norm)
    partials = torch.empty((programs if sums else 0, 3, width), dtype=torch.float32, device=device)
    # A tensor that is not read is stood for by one that is there.
    dt = _triton.rows(d_normed if d_total is None else d_total)
    dn = _triton.rows(d_normed) if norm else dt
    t = total.contiguous() if norm else dt
    b = _triton.rows(branch) if want_scale else dt
    _triton.launch(
        residual_norm_backward_kernel, (programs,), size,
        t, b, _dense(scale), _dense(weight), statistics, dt, dn, d_stream, d_branch, partials,
        count, dt.shape[1], b.stride(0), b.stride(1), dt.stride(0), dt.stride(1), dn.stride(0), dn.stride(1),
        triton.cdiv(tiles, programs) * size.rows,
        WIDTH=width, ROWS=size.rows, BLOCK=size.block, HAS_SCALE=scale is not None, HAS_NORM=norm, HAS_D_TOTAL=d_total is not None,
        STREAM=want_stream, BRANCH=branch_dtype is not None, SCALE=want_scale, WEIGHT=want_weight and norm,
    )  # fmt: skip
    return d_stream, d_branch, partials.sum(0)
