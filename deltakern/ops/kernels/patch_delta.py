"""Kernels of ``patch_delta``: the token sequence is put together in registers and written once, next to its LayerNorm.

A row loads from the one or two sources that it is made of; the other sources' loads are masked off and move nothing. The
backward reads the stream as stored and two float32 statistics a row, never the features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltakern.ops import _triton
from deltakern.ops.kernels.common import load_rows, norm_backward, row_statistics, store_rows
from deltakern.ops.kernels.tiles import tile


@triton.jit
def sources(token_number, patches, MODE: tl.constexpr):
    """Which rows of the sequence take from prev and from curr, and the patch that curr's is; prev's is ``token_number - 1``."""
    patch = token_number - 1
    from_prev = patch >= 0
    from_curr = patch >= 0
    of_curr = patch
    if MODE == "pair":
        from_prev = from_prev & (patch < patches)
        from_curr = patch >= patches
        of_curr = patch - patches
    return from_prev, from_curr, of_curr


@triton.jit
def patch_delta_forward_kernel(
    token, prev, curr, role, weight, bias, stream, normed, statistics,
    count, length, patches, token_batch, prev_batch, prev_patch, curr_batch, curr_patch, role_stride, eps,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    live = row < count
    inside = column < WIDTH
    mask = live[:, None] & inside[None, :]
    here = row.to(tl.int64) * WIDTH
    clip = (row // length).to(tl.int64)
    number = row % length
    from_prev, from_curr, of_curr = sources(number, patches, MODE)

    x = load_rows(token, clip * token_batch, column, mask & (number == 0)[:, None])
    if MODE != "previous":
        chosen = mask & from_curr[:, None]
        x += load_rows(curr, clip * curr_batch + of_curr.to(tl.int64) * curr_patch, column, chosen)
    if MODE != "current":
        chosen = mask & from_prev[:, None]
        y = load_rows(prev, clip * prev_batch + (number - 1).to(tl.int64) * prev_patch, column, chosen)
        x = x - y if MODE == "difference" else x + y
    if MODE == "pair":
        role0 = tl.load(role + column, mask=inside, other=0.0).to(tl.float32)
        x += tl.where(from_prev[:, None], role0[None, :], 0.0)
    if MODE != "previous":
        role1 = tl.load(role + role_stride + column, mask=inside, other=0.0).to(tl.float32)
        x += tl.where(from_curr[:, None], role1[None, :], 0.0)

    stored = x.to(stream.dtype.element_ty)
    tl.store(stream + here[:, None] + column[None, :], stored, mask=mask)
    x = stored.to(tl.float32)
    mean, rstd = row_statistics(x, mask, tl.cast(eps, tl.float32), WIDTH)
    tl.store(statistics + row, mean, mask=live)
    tl.store(statistics + count + row, rstd, mask=live)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    store_rows(normed, here, column, (x - mean[:, None]) * rstd[:, None] * w[None, :] + b[None, :], mask)


@triton.jit
def patch_delta_backward_kernel(
    stream, weight, statistics, d_stream, d_normed, d_token, d_prev, d_curr, partials,
    count, length, patches, d_stream_batch, d_stream_row, d_normed_batch, d_normed_row, each,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MODE: tl.constexpr,
    HAS_D_STREAM: tl.constexpr, HAS_D_NORMED: tl.constexpr, TOKEN: tl.constexpr, PREV: tl.constexpr, CURR: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """TOKEN, PREV, CURR and SUMS say which gradients are wanted, the sums those of the roles, weight and bias. Program p walks
    over rows p * each and on."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    if HAS_D_NORMED:
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    sum_role0 = tl.zeros((BLOCK,), tl.float32)
    sum_role1 = tl.zeros((BLOCK,), tl.float32)
    sum_weight = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)

    first = program * each
    last = tl.minimum(first + each, count)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        live = row < last
        mask = live[:, None] & inside[None, :]
        clip = (row // length).to(tl.int64)
        number = row % length
        from_prev, from_curr, of_curr = sources(number, patches, MODE)

        g = tl.zeros((ROWS, BLOCK), tl.float32)
        if HAS_D_NORMED:
            x = load_rows(stream, row.to(tl.int64) * WIDTH, column, mask)
            dy = load_rows(d_normed, clip * d_normed_batch + number.to(tl.int64) * d_normed_row, column, mask)
            mean = tl.load(statistics + row, mask=live, other=0.0)
            rstd = tl.load(statistics + count + row, mask=live, other=0.0)
            xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
            if SUMS:
                sum_weight += tl.sum(dy * xhat, axis=0)
                sum_bias += tl.sum(dy, axis=0)
            g = norm_backward(dy * w[None, :], xhat, rstd, WIDTH)
        if HAS_D_STREAM:
            g += load_rows(d_stream, clip * d_stream_batch + number.to(tl.int64) * d_stream_row, column, mask)
        if TOKEN:
            store_rows(d_token, clip * WIDTH, column, g, mask & (number == 0)[:, None])
        if PREV:
            to = (clip * patches + (number - 1)) * WIDTH
            store_rows(d_prev, to, column, -g if MODE == "difference" else g, mask & from_prev[:, None])
        if CURR:
            store_rows(d_curr, (clip * patches + of_curr) * WIDTH, column, g, mask & from_curr[:, None])
        if SUMS:
            if MODE == "pair":
                sum_role0 += tl.sum(tl.where(from_prev[:, None], g, 0.0), axis=0)
            if MODE != "previous":
                sum_role1 += tl.sum(tl.where(from_curr[:, None], g, 0.0), axis=0)

    if SUMS:
        to = partials + program.to(tl.int64) * 4 * WIDTH + column
        tl.store(to, sum_role0, mask=inside)
        tl.store(to + WIDTH, sum_role1, mask=inside)
        tl.store(to + 2 * WIDTH, sum_weight, mask=inside)
        tl.store(to + 3 * WIDTH, sum_bias, mask=inside)


def patch_delta_forward(
    prev: torch.Tensor | None,
    curr: torch.Tensor | None,
    token: torch.Tensor,
    role: torch.Tensor | None,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    mode: str,
    eps: float,
    out_dtype: torch.dtype,
    stream_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(stream, normed, statistics)``, the statistics (2, rows) float32. ``prev``, ``curr`` and ``role`` are None where unread."""
    base = prev if prev is not None else curr
    batch, patches, width = base.shape
    device = base.device
    length = 1 + patches * (2 if mode == "pair" else 1)
    count = batch * length
    stream = torch.empty((batch, length, width), dtype=stream_dtype, device=device)
    normed = torch.empty((batch, length, width), dtype=out_dtype, device=device)
    statistics = torch.empty((2, count), dtype=torch.float32, device=device)
    p = None if prev is None else _triton.rows(prev)
    c = None if curr is None else _triton.rows(curr)
    r = None if role is None else _triton.rows(role)[0]
    t = _triton.rows(token.reshape(-1, width))[0]
    size = tile("patch_delta_forward", width, stream_dtype, _triton.architecture(device))
    _triton.launch(
        patch_delta_forward_kernel, (triton.cdiv(count, size.rows),), size,
        t, p, c, r, norm_weight.contiguous(), norm_bias.contiguous(), stream, normed, statistics,
        count, length, patches, t.stride(0) if len(t) > 1 else 0, *_strides(p), *_strides(c), 0 if r is None else r.stride(0), eps,
        WIDTH=width, ROWS=size.rows, BLOCK=size.block, MODE=mode,
    )  # fmt: skip
    return stream, normed, statistics


def _strides(view: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if view is None else (view.stride(0), view.stride(1))


def patch_delta_backward(
    stream: torch.Tensor,
    norm_weight: torch.Tensor,
    statistics: torch.Tensor,
    d_stream: torch.Tensor | None,
    d_normed: torch.Tensor | None,
    mode: str,
    prev_dtype: torch.dtype | None,
    curr_dtype: torch.dtype | None,
    want_token: bool,
    want_sums: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(d_prev, d_curr, d_token, sums)``: d_token (B,D) and the sums (4,D) of both roles, weight and bias in float32.

    What is not wanted, or has no dtype, is empty.
    """
    batch, length, width = stream.shape
    device = stream.device
    patches = (length - 1) // 2 if mode == "pair" else length - 1
    count = batch * length
    features = (batch, patches, width)
    d_prev = torch.empty(features if prev_dtype else (0,), dtype=prev_dtype or torch.float32, device=device)
    d_curr = torch.empty(features if curr_dtype else (0,), dtype=curr_dtype or torch.float32, device=device)
    d_token = torch.empty((batch, width) if want_token else (0,), dtype=torch.float32, device=device)
    size = tile("patch_delta_backward", width, stream.dtype, _triton.architecture(device))
    tiles = triton.cdiv(count, size.rows)
    programs = _triton.programs(device, size, tiles)
    partials = torch.empty((programs if want_sums else 0, 4, width), dtype=torch.float32, device=device)
    ds = None if d_stream is None else _triton.rows(d_stream)
    dn = None if d_normed is None else _triton.rows(d_normed)
    _triton.launch(
        patch_delta_backward_kernel, (programs,), size,
        stream.contiguous(), norm_weight.contiguous(), statistics, ds, dn, d_token, d_prev, d_curr, partials,
        count, length, patches, *_strides(ds), *_strides(dn), triton.cdiv(tiles, programs) * size.rows,
        WIDTH=width, ROWS=size.rows, BLOCK=size.block, MODE=mode, HAS_D_STREAM=ds is not None, HAS_D_NORMED=dn is not None,
        TOKEN=want_token, PREV=prev_dtype is not None, CURR=curr_dtype is not None, SUMS=want_sums,
    )  # fmt: skip
    return d_prev, d_curr, d_token, partials.sum(0)
