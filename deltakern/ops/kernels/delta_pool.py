"""Kernels of ``delta_pool``: k is read once for the scores, normed once for the pooling.

Between the two stand the scores, (B,L,H) float32, a sixty-fourth of what is read at d=64 and small enough to stay in the cache. A clip's
tokens are split over programs; each keeps a running softmax, and the parts are combined in the order of the tokens.

Where normed is narrow the products run on tensor cores, with the float32 factor as the sum of two narrow numbers: the pooling is
as exact as in float32, and the kernels wait for memory all the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltakern.ops import _triton
from deltakern.ops.kernels.common import dot_wide_narrow
from deltakern.ops.kernels.tiles import tile

SPLIT = 512
"""Tokens a split, about: a part is H*D float32, a fiftieth of what the split reads at the released size."""


@triton.jit
def delta_pool_scores_kernel(
    q, k, scores, length, scale, q_b, q_h, k_b, k_l, k_h,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row is a token and a head. scores (B,L,H)."""
    per_clip = tl.cdiv(length * HEADS, ROWS)
    clip = (tl.program_id(0) // per_clip).to(tl.int64)
    row = (tl.program_id(0) % per_clip) * ROWS + tl.arange(0, ROWS)
    live = row < length * HEADS
    token, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (column < WIDTH)
    key = tl.load(k + (clip * k_b + token * k_l + head * k_h)[:, None] + column, mask=mask, other=0.0).to(tl.float32)
    query = tl.load(q + (clip * q_b + head * q_h)[:, None] + column, mask=mask, other=0.0).to(tl.float32)
    score = tl.sum(key * query, axis=1) * tl.cast(scale, tl.float32)
    tl.store(scores + clip * length * HEADS + row, score, mask=live)


@triton.jit
def delta_pool_split_kernel(
    normed, scores, parts, peaks, totals, length, width, per_split, splits, normed_b, normed_l,
    HEADS: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK channels of one split of one clip, all heads (in LANES lanes).

    parts (B,S,H,D) are sums not yet divided; peaks and totals (B,S,H) the split's greatest score and its sum of exponentials.
    """
    chunks = tl.cdiv(width, BLOCK)
    chunk = tl.program_id(0) % chunks
    split = (tl.program_id(0) // chunks) % splits
    clip = (tl.program_id(0) // (chunks * splits)).to(tl.int64)
    head = tl.arange(0, LANES)
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    peak = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    acc = tl.zeros((LANES, BLOCK), tl.float32)
    rows = normed + clip * normed_b + column[None, :]
    columns = scores + clip * length * HEADS + head[:, None]
    first = split * per_split
    last = tl.minimum(first + per_split, length)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        live = token < last
        score = tl.load(columns + token.to(tl.int64)[None, :] * HEADS, mask=live[None, :] & (head < HEADS)[:, None], other=0.0)
        score = tl.where(live[None, :], score, float("-inf"))
        x = tl.load(rows + token.to(tl.int64)[:, None] * normed_l, mask=live[:, None] & (column < width)[None, :], other=0.0)
        higher = tl.maximum(peak, tl.max(score, axis=1))
        shrink = tl.exp(peak - higher)
        weight = tl.exp(score - higher[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        acc = dot_wide_narrow(weight, x, acc * shrink[:, None])
        peak = higher
    place = (clip * splits + split) * HEADS + head
    tl.store(parts + place[:, None] * width + column[None, :], acc, mask=(head < HEADS)[:, None] & (column < width)[None, :])
    if chunk == 0:
        tl.store(peaks + place, peak, mask=head < HEADS)
        tl.store(totals + place, total, mask=head < HEADS)


@triton.jit
def delta_pool_combine_kernel(
    parts, peaks, totals, out, wide, statistics, width, splits, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK channels of one head of one clip. wide is out in float32, statistics (B,H,2) the peak and the total."""
    chunks = tl.cdiv(width, BLOCK)
    chunk = tl.program_id(0) % chunks
    head = (tl.program_id(0) // chunks) % HEADS
    clip = (tl.program_id(0) // (chunks * HEADS)).to(tl.int64)
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = clip * splits * HEADS + head
    peak = tl.load(peaks + place)
    for split in range(1, splits):
        peak = tl.maximum(peak, tl.load(peaks + place + split * HEADS))
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        shrink = tl.exp(tl.load(peaks + place + split * HEADS) - peak)
        total += tl.load(totals + place + split * HEADS) * shrink
        acc += tl.load(parts + (place + split * HEADS) * width + column, mask=inside, other=0.0) * shrink
    acc /= total
    place = clip * HEADS + head
    tl.store(out + place * width + column, acc.to(out.dtype.element_ty), mask=inside)
    tl.store(wide + place * width + column, acc, mask=inside)
    if chunk == 0:
        tl.store(statistics + 2 * place, peak)
        tl.store(statistics + 2 * place + 1, total)


@triton.jit
def delta_pool_products_kernel(
    normed, grad, products, length, width, normed_b, normed_l, grad_b, grad_h,
    HEADS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens of one clip. products (B,H,L) are <grad_h, normed_l>, the gradients of the probabilities."""
    per_clip = tl.cdiv(length, ROWS)
    clip = (tl.program_id(0) // per_clip).to(tl.int64)
    token = ((tl.program_id(0) % per_clip) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    head = tl.arange(0, LANES).to(tl.int64)
    acc = tl.zeros((ROWS, LANES), tl.float32)
    rows = normed + clip * normed_b + token[:, None] * normed_l
    columns = grad + clip * grad_b + head[None, :] * grad_h
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        x = tl.load(rows + column[None, :], mask=(token < length)[:, None] & inside[None, :], other=0.0)
        g = tl.load(columns + column[:, None], mask=(head < HEADS)[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(x, g, acc, input_precision="ieee")
    place = (clip * HEADS + head)[None, :] * length + token[:, None]
    tl.store(products + place, acc, mask=(token < length)[:, None] & (head < HEADS)[None, :])


@triton.jit
def delta_pool_query_kernel(
    q, k, grad, wide, statistics, products, weights, nears, parts, shifts, length, width, per_split, splits, scale,
    q_b, q_h, k_b, k_l, k_h, grad_b, grad_h,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: one head of one split of one clip, ROWS tokens at a time. Writes weights (B,H,L), the probabilities.

    A score's gradient is its probability times the excess of its product over the products' mean under the probabilities. Where one
    token has nearly all the probability the excess is all cancellation, so the mean must come from these very products. It is known
    only at the end; <grad_h, pooled_h>, nears (B,H), equals it but for rounding and is taken off at once, here and where products are
    read again: stored over what was loaded, a warp that comes late would read it twice taken off. What remains of the mean, shifts
    (B,S,H), is taken off later: dq is scale * (parts 0 - the sum of shifts * parts 1), parts (B,S,2,H,d).
    """
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    split = (tl.program_id(0) // HEADS) % splits
    clip = (tl.program_id(0) // (HEADS * splits)).to(tl.int64)
    terms = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, width, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        g = tl.load(grad + clip * grad_b + head * grad_h + channel, mask=channel < width, other=0.0).to(tl.float32)
        terms += g * tl.load(wide + (clip * HEADS + head) * width + channel, mask=channel < width, other=0.0)
    near = tl.sum(terms, axis=0)
    peak = tl.load(statistics + 2 * (clip * HEADS + head))
    total = tl.load(statistics + 2 * (clip * HEADS + head) + 1)
    column = tl.arange(0, BLOCK)
    query = tl.load(q + clip * q_b + head * q_h + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    products += (clip * HEADS + head) * length
    weights += (clip * HEADS + head) * length
    rows = k + clip * k_b + head * k_h + column[None, :]
    sloped = tl.zeros((ROWS, BLOCK), tl.float32)
    pooled = tl.zeros((ROWS, BLOCK), tl.float32)
    shift = tl.zeros((ROWS,), tl.float32)
    first = split * per_split
    last = tl.minimum(first + per_split, length)
    for start in range(first, last, ROWS):
        token = (start + tl.arange(0, ROWS)).to(tl.int64)
        live = token < last
        key = tl.load(rows + token[:, None] * k_l, mask=live[:, None] & (column < WIDTH)[None, :], other=0.0).to(tl.float32)
        weight = tl.exp(tl.sum(key * query, axis=1) * tl.cast(scale, tl.float32) - peak) / total
        weight = tl.where(live, weight, 0.0)
        excess = tl.load(products + token, mask=live, other=0.0) - near
        tl.store(weights + token, weight, mask=live)
        shift += weight * excess
        sloped += (weight * excess)[:, None] * key
        pooled += weight[:, None] * key
    if split == 0:
        tl.store(nears + clip * HEADS + head, near)
    place = clip * splits + split
    tl.store(shifts + place * HEADS + head, tl.sum(shift, axis=0))
    tl.store(parts + (place * 2 * HEADS + head) * WIDTH + column, tl.sum(sloped, axis=0), mask=column < WIDTH)
    tl.store(parts + ((place * 2 + 1) * HEADS + head) * WIDTH + column, tl.sum(pooled, axis=0), mask=column < WIDTH)


@triton.jit
def delta_pool_keys_kernel(
    q, products, weights, nears, shift, dk, length, scale, q_b, q_h,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row is a token and a head: dk is the gradient of its score times q. shift (B,H) is the rest of the mean."""
    per_clip = tl.cdiv(length * HEADS, ROWS)
    clip = (tl.program_id(0) // per_clip).to(tl.int64)
    row = (tl.program_id(0) % per_clip) * ROWS + tl.arange(0, ROWS)
    live = row < length * HEADS
    token, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (column < WIDTH)
    place = (clip * HEADS + head) * length + token
    excess = tl.load(products + place, mask=live, other=0.0) - tl.load(nears + clip * HEADS + head) - tl.load(shift + clip * HEADS + head)
    slope = tl.load(weights + place, mask=live, other=0.0) * excess * tl.cast(scale, tl.float32)
    query = tl.load(q + (clip * q_b + head * q_h)[:, None] + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(dk + ((clip * length * HEADS + row) * WIDTH)[:, None] + column, (slope[:, None] * query).to(dk.dtype.element_ty), mask=mask)


@triton.jit
def delta_pool_spread_kernel(
    weights, grad, d_normed, length, width, grad_b, grad_h,
    HEADS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens of one clip. d_normed_l is the sum over the heads of the probability times grad_h."""
    per_clip = tl.cdiv(length, ROWS)
    clip = (tl.program_id(0) // per_clip).to(tl.int64)
    token = ((tl.program_id(0) % per_clip) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = (token < length)[:, None]
    head = tl.arange(0, LANES).to(tl.int64)
    weight = tl.load(weights + (clip * HEADS + head)[None, :] * length + token[:, None], mask=live & (head < HEADS)[None, :], other=0.0)
    rows = grad + clip * grad_b + head[:, None] * grad_h
    to = d_normed + (clip * length + token)[:, None] * width
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        g = tl.load(rows + column, mask=(head < HEADS)[:, None] & (column < width), other=0.0)
        value = dot_wide_narrow(weight, g, tl.zeros((ROWS, BLOCK), tl.float32))
        tl.store(to + column, value.to(d_normed.dtype.element_ty), mask=live & (column < width))


def _splits(length: int, tokens: int) -> tuple[int, int]:
    """Number of splits of ``length`` tokens and the size of each, a multiple of ``tokens``, as even as that allows."""
    each = triton.cdiv(triton.cdiv(length, triton.cdiv(length, SPLIT)), tokens) * tokens
    return triton.cdiv(length, each), each


def _lanes(heads: int) -> int:
    """Tensor cores take at least 16."""
    return max(16, triton.next_power_of_2(heads))


def delta_pool_forward(
    normed: torch.Tensor, q: torch.Tensor, k: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(out, wide, statistics)``: wide is out in float32, statistics (B,H,2) the greatest score and the sum of exponentials below it."""
    batch, length, width = normed.shape
    heads, head = q.shape[1:]
    device, architecture = normed.device, _triton.architecture(normed.device)
    out = torch.empty((batch, heads, width), dtype=normed.dtype, device=device)
    wide = torch.empty(out.shape, dtype=torch.float32, device=device)
    statistics = torch.empty((batch, heads, 2), dtype=torch.float32, device=device)
    normed, q, k = _triton.unit(normed), _triton.unit(q), _triton.unit(k)

    scores = torch.empty((batch, length, heads), dtype=torch.float32, device=device)
    size = tile("delta_pool_scores", head, k.dtype, architecture)
    _triton.launch(
        delta_pool_scores_kernel, (batch * triton.cdiv(length * heads, size.rows),), size,
        q, k, scores, length, scale, *q.stride()[:2], *k.stride()[:3],
        HEADS=heads, WIDTH=head, ROWS=size.rows, BLOCK=size.block,
    )  # fmt: skip
    lanes = _lanes(heads)
    size = tile("delta_pool_split" if lanes <= 32 else "delta_pool_split_many", width, normed.dtype, architecture)
    splits, each = _splits(length, size.rows)
    parts = torch.empty((batch, splits, heads, width), dtype=torch.float32, device=device)
    peaks = torch.empty((batch, splits, heads), dtype=torch.float32, device=device)
    totals = torch.empty((batch, splits, heads), dtype=torch.float32, device=device)
    _triton.launch(
        delta_pool_split_kernel, (batch * splits * triton.cdiv(width, size.block),), size,
        normed, scores, parts, peaks, totals, length, width, each, splits, *normed.stride()[:2],
        HEADS=heads, LANES=lanes, TOKENS=size.rows, BLOCK=size.block,
    )  # fmt: skip
    size = tile("delta_pool_combine", width, normed.dtype, architecture)
    _triton.launch(
        delta_pool_combine_kernel, (batch * heads * triton.cdiv(width, size.block),), size,
        parts, peaks, totals, out, wide, statistics, width, splits, HEADS=heads, BLOCK=size.block,
    )  # fmt: skip
    return out, wide, statistics


def delta_pool_backward(
    normed: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    wide: torch.Tensor,
    statistics: torch.Tensor,
    grad: torch.Tensor,
    scale: float,
    want_normed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(d_normed, dq, dk)``; the first is empty where it is not wanted."""
    batch, length, width = normed.shape
    heads, head = q.shape[1:]
    device, architecture = normed.device, _triton.architecture(normed.device)
    d_normed = torch.empty(normed.shape if want_normed else (0,), dtype=normed.dtype, device=device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=device)
    normed, q_in, k, grad = _triton.unit(normed), _triton.unit(q), _triton.unit(k), _triton.unit(grad)

    products = torch.empty((batch, heads, length), dtype=torch.float32, device=device)
    size = tile("delta_pool_products", width, normed.dtype, architecture)
    _triton.launch(
        delta_pool_products_kernel, (batch * triton.cdiv(length, size.rows),), size,
        normed, grad, products, length, width, *normed.stride()[:2], *grad.stride()[:2],
        HEADS=heads, LANES=_lanes(heads), ROWS=size.rows, BLOCK=size.block,
    )  # fmt: skip
    size = tile("delta_pool_query", head, k.dtype, architecture)
    splits, each = _splits(length, size.rows)
    weights = torch.empty(products.shape, dtype=torch.float32, device=device)
    nears = torch.empty((batch, heads), dtype=torch.float32, device=device)
    parts = torch.empty((batch, splits, 2, heads, head), dtype=torch.float32, device=device)
    shifts = torch.empty((batch, splits, heads), dtype=torch.float32, device=device)
    _triton.launch(
        delta_pool_query_kernel, (batch * splits * heads,), size,
        q_in, k, grad, wide, statistics, products, weights, nears, parts, shifts, length, width, each, splits, scale,
        *q_in.stride()[:2], *k.stride()[:3], *grad.stride()[:2],
        HEADS=heads, WIDTH=head, ROWS=size.rows, BLOCK=size.block, CHUNK=256,
    )  # fmt: skip
    shift = shifts.sum(1)
    sloped, pooled = parts.sum(1).unbind(1)
    dq = (scale * (sloped - shift[..., None] * pooled)).to(q.dtype)
    size = tile("delta_pool_scores", head, k.dtype, architecture)
    _triton.launch(
        delta_pool_keys_kernel, (batch * triton.cdiv(length * heads, size.rows),), size,
        q_in, products, weights, nears, shift, dk, length, scale, *q_in.stride()[:2],
        HEADS=heads, WIDTH=head, ROWS=size.rows, BLOCK=size.block,
    )  # fmt: skip
    if want_normed:
        size = tile("delta_pool_spread", width, normed.dtype, architecture)
        _triton.launch(
            delta_pool_spread_kernel, (batch * triton.cdiv(length, size.rows),), size,
            weights, grad, d_normed, length, width, *grad.stride()[:2],
            HEADS=heads, LANES=_lanes(heads), ROWS=size.rows, BLOCK=size.block,
        )  # fmt: skip
    return d_normed, dq, dk
