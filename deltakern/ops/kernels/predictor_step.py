"""Kernel of ``predictor_step``: as many programs as processors stay for the whole launch and meet at a barrier after every phase.

Phases of a block: attention (norm, query projection, rotation, softmax over context and own tokens; a tile is a head); output
projection and residual; norm, up projection, GELU; down projection and residual. After the last block the head, and where another
step follows, keys and values of the new token in all blocks. A phase is cut into tiles of output columns, each the work of one program
from load to store, so its value does not depend on how many programs share the tiles. Rows are padded to 16 or 32, and cut where there
are more; activations lie in scratch memory that stays in the L2 cache.

A product is skinny: a tile's few columns by all of K. Each warp takes its own share of K (the leading dimension of a batched
product), the shares are added at the end. LayerNorm needs whole rows, of which a program wrote a few columns: it leaves mean and
squared deviation of those columns, and the reader combines them by Chan's formula, which loses no digits to a large mean.

The barrier: a counter that only grows, cleared before the launch. A program's threads meet, one of them adds 1 with release
semantics, waits with acquire semantics until the others have, and the threads meet again. All programs must be resident, which a
cooperative launch guarantees or refuses. Between adding and waiting a program asks for its part of the weights of the phase *after*
the next one to come from memory into the L2 cache, so that memory streams while programs wait. Exchanged data is read past the L1 cache.

Estimate for ViT-B in bfloat16 with 20 samples on an H200 (not measured). A step moves, in MB: 1.2 query, 1.2 output, 4.7 up and 4.7
down projection in each of 12 blocks, 1.2 for the head, 28.3 for keys and values where a step follows: 171, or 40 us at 4.3 TB/s. There
are 4 barriers a block and 2 more, 50, at about 1 us each. Every program reads activations again, in a block 0.7 (stream, attention), 2.9
(mixed heads), 5.9 (stream, up) and 11.8 MB (hidden), with head, keys, values and the norms' statistics 300 MB a step, which the L2 cache
delivers at perhaps 5.5 TB/s, 55 us. Weights come from memory meanwhile but for those of keys and values (7 us). So 110 to 150 us: bound
by latency and the L2 cache, not by memory. Tiles of twice the columns would halve the activations and leave half of the processors idle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltakern.ops import _triton
from deltakern.ops.kernels.common import cosine_sine, dot_wide_narrow
from deltakern.ops.kernels.context_attention import turns_a_second
from deltakern.ops.kernels.gelu import normal_cdf
from deltakern.ops.kernels.tiles import Tile, tile

SECTOR = tl.constexpr(32)
"""Bytes that one prefetch is sure to bring."""


@triton.jit
def _prefetch(weight, count):
    """Asks for this program's part of ``count`` elements to be brought into the L2 cache, and waits for nothing."""
    apart: tl.constexpr = SECTOR // (weight.dtype.element_ty.primitive_bitwidth // 8)
    share = tl.cdiv(count, tl.num_programs(0))
    start = tl.program_id(0) * share
    for offset in range(0, share, 1024 * apart):
        index = tl.minimum(start + offset + tl.arange(0, 1024) * apart, count - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [weight + index], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _barrier(counter, target, ahead, count, PREFETCH: tl.constexpr):
    """Returns once the counter has reached ``target``: every program has come here, and sees what the others have stored.

    ``ahead``: ``count`` elements that will be read soon. The result is zero, which the compiler cannot know: addresses that it is part of
    are computed by the phase that needs them, instead of once for the whole launch, where they would fill the registers of all phases.
    """
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")
    if PREFETCH:
        _prefetch(ahead, count)
    seen = tl.atomic_add(counter, 0, sem="acquire")
    while seen < target:
        seen = tl.atomic_add(counter, 0, sem="acquire")
    tl.debug_barrier()
    return tl.minimum(seen, 0) * 128


@triton.jit
def _statistics(stats, zero, row, R, eps, D: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    """Mean and reciprocal deviation of rows of the stream, from those of its tiles of COLUMNS columns."""
    tiles: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    piece = zero + tl.arange(0, PIECES)[None, :]
    mask = (row[:, None] < R) & (piece < tiles)
    place = stats + row[:, None] * tiles + piece
    means = tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")
    squares = tl.load(place + R * tiles, mask=mask, other=0.0, cache_modifier=".cg")
    count = tl.maximum(tl.minimum(D - piece * COLUMNS, COLUMNS), 0).to(tl.float32)
    mean = tl.sum(means * count, axis=1) / D
    apart = means - mean[:, None]
    return mean, 1.0 / tl.sqrt(tl.sum(squares + count * apart * apart, axis=1) / D + eps)


@triton.jit
def _store_stream(stream, stats, value, row, R, number, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Tile ``number`` of the residual stream, (ROWS, COLUMNS), and its statistics."""
    tiles: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    column = number * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(stream + row[:, None] * D + column, value, mask=(row[:, None] < R) & (column < D))
    mean = tl.sum(tl.where(column < D, value, 0.0), axis=1) / tl.minimum(D - number * COLUMNS, COLUMNS).to(tl.float32)
    centred = tl.where(column < D, value - mean[:, None], 0.0)
    tl.store(stats + row * tiles + number, mean, mask=row < R)
    tl.store(stats + (R + row) * tiles + number, tl.sum(centred * centred, axis=1), mask=row < R)


@triton.jit
def _rows(number, zero, tiles, ROWS: tl.constexpr):
    """The rows of tile ``number``: all tiles of the first ROWS rows come first."""
    return zero + (number // tiles) * ROWS + tl.arange(0, ROWS)


@triton.jit
def _product(
    x, zero, row, R, weight, bias, column, inside, norm, mean, rstd,
    x_row, K: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, DEEP: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Rows of x (R,K) times rows ``column`` of the weight (N,K), plus the bias: (ROWS, COLUMNS) float32, zero where not ``inside``.

    NORMED: x is the residual stream, D wide, and is normed first.
    """
    part = zero + tl.arange(0, SPLIT)[:, None, None] * DEEP
    across = part + tl.arange(0, DEEP)[None, None, :]
    down = part + tl.arange(0, DEEP)[None, :, None]
    rows = x + row[None, :, None] * x_row
    columns = weight + column.to(tl.int64)[None, None, :] * K
    acc = tl.zeros((SPLIT, row.shape[0], column.shape[0]), tl.float32)
    for start in range(0, K, SPLIT * DEEP):
        k = start + across
        left = tl.load(rows + k, mask=(row[None, :, None] < R) & (k < K), other=0.0, cache_modifier=".cg")
        if NORMED:
            gain = tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)
            shift = tl.load(norm + D + k, mask=k < K, other=0.0).to(tl.float32)
            left = (left - mean[None, :, None]) * rstd[None, :, None] * gain + shift
        k = start + down
        right = tl.load(columns + k, mask=inside[None, None, :] & (k < K), other=0.0)
        acc = tl.dot(left.to(right.dtype), right, acc, input_precision="ieee")
    return tl.sum(acc, axis=0) + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _pair(pair, HALF: tl.constexpr):
    """The two channels of a pair: the first HALF pairs rotate, (i, i + HALF), the others are neighbours beyond them."""
    return tl.where(pair < HALF, pair, 2 * pair), tl.where(pair < HALF, pair + HALF, 2 * pair + 1)


@triton.jit
def _pairs(value, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """The first and the second channels of (ROWS, 2 PAIRS) columns in the order of :func:`_interleaved`."""
    return tl.split(tl.reshape(value, (ROWS, PAIRS, 2)))


@triton.jit
def _interleaved(start, PAIRS: tl.constexpr, HALF: tl.constexpr):
    """The channels of PAIRS pairs, the two of a pair side by side."""
    number = tl.arange(0, 2 * PAIRS)
    first, second = _pair(start + number // 2, HALF)
    return tl.where(number % 2 == 0, first, second)


@triton.jit
def _attend(
    number, zero, layer, step, stream, stats, norm, weight, bias, keys, values, own, turns, mixed, R, clips, samples, T, kept, scale, eps,
    k_l, k_b, k_t, k_h, v_l, v_b, v_t, v_h,
    D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr,
    LANES: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr, SPLIT: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """One head of LANES rows: from the stream to the head's columns of ``mixed``."""
    row = _rows(number, zero, HEADS, LANES)
    head = number % HEADS
    clip = tl.minimum(row // samples, clips - 1)
    channel = _interleaved(0, PAIRS, HALF)
    mean, rstd = _statistics(stats, zero, row, R, eps, D, COLUMNS, PIECES)
    query = _product(
        stream, zero, row, R, weight, bias, head * WIDTH + channel, channel < WIDTH, norm, mean, rstd, D, D, D, SPLIT, DEEP, NORMED=True
    )
    first, second = _pairs(query, LANES, PAIRS)
    pair = tl.arange(0, PAIRS)[None, :]
    turn = turns + ((step * clips + clip) * (2 * PAIRS))[:, None] + pair
    cos, sin = tl.load(turn, cache_modifier=".cg"), tl.load(turn + PAIRS, cache_modifier=".cg")
    first, second = first * cos - second * sin, first * sin + second * cos

    token = tl.arange(0, TOKENS)
    there = token < clips * T
    of_clip = token // T
    place = of_clip.to(tl.int64) * k_b + (token % T).to(tl.int64) * k_t
    at_first, at_second = _pair(pair, HALF)
    paired = pair < WIDTH // 2
    at_keys = keys + layer * k_l + place[:, None] + head.to(tl.int64) * k_h
    mask = there[:, None] & paired
    score = dot_wide_narrow(first, tl.trans(tl.load(at_keys + at_first, mask=mask, other=0.0)), tl.zeros((LANES, TOKENS), tl.float32))
    score = dot_wide_narrow(second, tl.trans(tl.load(at_keys + at_second, mask=mask, other=0.0)), score) * scale
    score = tl.where(there[None, :] & (of_clip[None, :] == clip[:, None]), score, float("-inf"))
    peak = tl.max(score, axis=1)[:, None]
    share = tl.exp(score - peak)
    total = tl.sum(share, axis=1)[:, None]
    column = tl.arange(0, 2 * PAIRS)[None, :]
    place = of_clip.to(tl.int64) * v_b + (token % T).to(tl.int64) * v_t
    at_values = values + layer * v_l + place[:, None] + head.to(tl.int64) * v_h
    value = tl.load(at_values + column, mask=there[:, None] & (column < WIDTH), other=0.0)
    acc = dot_wide_narrow(share, value, tl.zeros((LANES, 2 * PAIRS), tl.float32))
    inside = row[:, None] < R
    for j in range(step):
        own_keys = own + ((layer * 2 * R + row[:, None]) * kept + j) * D + head * WIDTH
        own_values = own_keys + tl.cast(R, tl.int64) * kept * D
        own_first = tl.load(own_keys + at_first, mask=inside & paired, other=0.0, cache_modifier=".cg").to(tl.float32)
        own_second = tl.load(own_keys + at_second, mask=inside & paired, other=0.0, cache_modifier=".cg").to(tl.float32)
        own_value = tl.load(own_values + column, mask=inside & (column < WIDTH), other=0.0, cache_modifier=".cg").to(tl.float32)
        own_score = tl.sum(first * own_first + second * own_second, axis=1)[:, None] * scale
        higher = tl.maximum(peak, own_score)
        shrink = tl.exp(peak - higher)
        own_share = tl.exp(own_score - higher)
        total = total * shrink + own_share
        acc = acc * shrink + own_share * own_value
        peak = higher
    to = mixed + row[:, None] * D + head * WIDTH + column
    tl.store(to, (acc * (1.0 / total)).to(mixed.dtype.element_ty), mask=inside & (column < WIDTH))


@triton.jit
def _remember(
    number, zero, layers, step, steps, tokens, weight, bias, own, turns, R, clips, samples, kept,
    D: tl.constexpr, MEMORY: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """Keys, rotated, or values of a step's tokens: 16 pairs of channels of one block and head."""
    parts: tl.constexpr = PAIRS // 16
    row = _rows(number, zero, parts * HEADS * 2 * layers, ROWS)
    number = number % (parts * HEADS * 2 * layers)
    start = (number % parts) * 16
    head = (number // parts) % HEADS
    which = (number // (parts * HEADS)).to(tl.int64)  # block and, in it, keys or values
    channel = _interleaved(start, 16, HALF)
    made = _product(
        tokens + tl.cast(step, tl.int64) * MEMORY, zero, row, R, weight + which * (D * MEMORY), bias + which * D, head * WIDTH + channel,
        channel < WIDTH, bias, 0.0, 1.0, tl.cast(steps, tl.int64) * MEMORY, MEMORY, D, SPLIT, DEEP, NORMED=False,
    )  # fmt: skip
    first, second = _pairs(made, ROWS, 16)
    pair = start + tl.arange(0, 16)[None, :]
    clip = tl.minimum(row // samples, clips - 1)
    turn = turns + ((step * clips + clip) * (2 * PAIRS))[:, None] + pair
    is_key = which % 2 == 0
    cos = tl.where(is_key, tl.load(turn, cache_modifier=".cg"), 1.0)
    sin = tl.where(is_key, tl.load(turn + PAIRS, cache_modifier=".cg"), 0.0)
    at_first, at_second = _pair(pair, HALF)
    mask = (row[:, None] < R) & (pair < WIDTH // 2)
    to = own + ((which * R + row[:, None]) * kept + step) * D + head * WIDTH
    tl.store(to + at_first, (first * cos - second * sin).to(own.dtype.element_ty), mask=mask)
    tl.store(to + at_second, (first * sin + second * cos).to(own.dtype.element_ty), mask=mask)


@triton.jit
def _begin(number, zero, step, noise, stream, stats, R, samples, n_b, n_s, n_h, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """A tile of the stream of a step that begins: its noise."""
    tiles: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    row = _rows(number, zero, tiles, ROWS)
    number = number % tiles
    column = number * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    base = noise + ((row // samples).to(tl.int64) * n_b + (row % samples).to(tl.int64) * n_s + tl.cast(step, tl.int64) * n_h)[:, None]
    value = tl.load(base + column, mask=(row[:, None] < R) & (column < D), other=0.0).to(tl.float32)
    _store_stream(stream, stats, value, row, R, number, D, COLUMNS)


@triton.jit
def _add(
    number, zero, x, R, weight, bias, stream, stats,
    K: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr, DEEP: tl.constexpr,
):  # fmt: skip
    """A tile of the stream, plus that tile of a projection of x (R,K)."""
    tiles: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    row = _rows(number, zero, tiles, ROWS)
    number = number % tiles
    column = number * COLUMNS + tl.arange(0, COLUMNS)
    branch = _product(x, zero, row, R, weight, bias, column, column < D, bias, 0.0, 1.0, K, K, D, SPLIT, DEEP, NORMED=False)
    mask = (row[:, None] < R) & (column[None, :] < D)
    before = tl.load(stream + row[:, None] * D + column[None, :], mask=mask, other=0.0, cache_modifier=".cg")
    _store_stream(stream, stats, before + branch, row, R, number, D, COLUMNS)


@triton.jit
def predictor_step_kernel(
    noise, keys, values, times, rates, norms, q, q_bias, kv, kv_bias, out, out_bias, up, up_bias, down, down_bias, last, last_bias,
    tokens, stream, stats, turns, mixed, hidden, own, counter, layers, steps, clips, samples, T, scale, eps,
    n_b, n_s, n_h, k_l, k_b, k_t, k_h, v_l, v_b, v_t, v_h, t_b, t_h,
    D: tl.constexpr, HIDDEN: tl.constexpr, MEMORY: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    PAIRS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
    PIECES: tl.constexpr, SPLIT: tl.constexpr, DEEP: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """All steps of all rows, ROWS at a time, and LANES where a tile is a head. COLUMNS, WIDE: columns of a tile."""
    scale = tl.cast(scale, tl.float32)
    eps = tl.cast(eps, tl.float32)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    R = clips * samples
    kept = steps - 1
    groups = tl.cdiv(R, ROWS)
    tiles: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    up_tiles: tl.constexpr = (HIDDEN + WIDE - 1) // WIDE
    last_tiles: tl.constexpr = (MEMORY + COLUMNS - 1) // COLUMNS

    for i in range(program, steps * clips, programs):
        pair = tl.arange(0, PAIRS)
        rate = tl.load(rates + pair, mask=pair < HALF, other=0.0)  # a pair that does not rotate turns by zero
        time = tl.load(times + (i % clips).to(tl.int64) * t_b + (i // clips).to(tl.int64) * t_h)
        cos, sin = cosine_sine(tl.full((PAIRS,), 0.0, tl.float64) + time.to(tl.float64), rate)
        tl.store(turns + i * (2 * PAIRS) + pair, cos)
        tl.store(turns + i * (2 * PAIRS) + PAIRS + pair, sin)
    for number in range(program, tiles * groups, programs):
        _begin(number, 0, 0, noise, stream, stats, R, samples, n_b, n_s, n_h, D, COLUMNS, ROWS)
    met = programs
    zero = _barrier(counter, met, out, D * D, PREFETCH)

    for step in range(steps):
        for index in range(layers):
            layer = tl.cast(index, tl.int64)
            norm = norms + layer * (4 * D)
            for number in range(program, HEADS * tl.cdiv(R, LANES), programs):
                _attend(
                    number, zero, layer, step, stream, stats, norm, q + layer * (D * D), q_bias + layer * D, keys, values, own, turns,
                    mixed, R, clips, samples, T, kept, scale, eps, k_l, k_b, k_t, k_h, v_l, v_b, v_t, v_h,
                    D, HEADS, WIDTH, HALF, PAIRS, TOKENS, LANES, COLUMNS, PIECES, SPLIT, DEEP,
                )  # fmt: skip
            met += programs
            zero = _barrier(counter, met, up + layer * (HIDDEN * D), HIDDEN * D, PREFETCH)

            for number in range(program, tiles * groups, programs):
                _add(
                    number, zero, mixed, R, out + layer * (D * D), out_bias + layer * D, stream, stats,
                    D, D, COLUMNS, ROWS, SPLIT, DEEP,
                )  # fmt: skip
            met += programs
            zero = _barrier(counter, met, down + layer * (D * HIDDEN), D * HIDDEN, PREFETCH)

            for number in range(program, up_tiles * groups, programs):
                row = _rows(number, zero, up_tiles, ROWS)
                column = (number % up_tiles) * WIDE + tl.arange(0, WIDE)
                mean, rstd = _statistics(stats, zero, row, R, eps, D, COLUMNS, PIECES)
                value = _product(
                    stream, zero, row, R, up + layer * (HIDDEN * D), up_bias + layer * HIDDEN, column, column < HIDDEN,
                    norm + 2 * D, mean, rstd, D, D, D, SPLIT, DEEP, NORMED=True,
                )  # fmt: skip
                value = value * normal_cdf(value)
                to = hidden + row[:, None] * HIDDEN + column[None, :]
                tl.store(to, value.to(hidden.dtype.element_ty), mask=(row[:, None] < R) & (column[None, :] < HIDDEN))
            met += programs
            if index + 1 < layers:
                zero = _barrier(counter, met, q + (layer + 1) * (D * D), D * D, PREFETCH)
            else:
                zero = _barrier(counter, met, last, MEMORY * D, PREFETCH)

            for number in range(program, tiles * groups, programs):
                _add(
                    number, zero, hidden, R, down + layer * (D * HIDDEN), down_bias + layer * D, stream, stats,
                    HIDDEN, D, COLUMNS, ROWS, SPLIT, DEEP,
                )  # fmt: skip
            met += programs
            # the output projection of the next block; after the last block, that of the next step's first
            zero = _barrier(counter, met, out + ((layer + 1) % layers) * (D * D), D * D, PREFETCH)

        for number in range(program, last_tiles * groups, programs):
            row = _rows(number, zero, last_tiles, ROWS)
            column = (number % last_tiles) * COLUMNS + tl.arange(0, COLUMNS)
            mean, rstd = _statistics(stats, zero, row, R, eps, D, COLUMNS, PIECES)
            value = _product(
                stream, zero, row, R, last, last_bias, column, column < MEMORY,
                norms + tl.cast(layers, tl.int64) * (4 * D), mean, rstd, D, D, D, SPLIT, DEEP, NORMED=True,
            )  # fmt: skip
            to = tokens + (row.to(tl.int64)[:, None] * steps + step) * MEMORY + column[None, :]
            tl.store(to, value.to(tokens.dtype.element_ty), mask=(row[:, None] < R) & (column[None, :] < MEMORY))

        if step + 1 < steps:
            met += programs
            zero = _barrier(counter, met, q, D * D, PREFETCH)
            for number in range(program, (PAIRS // 16) * HEADS * 2 * layers * groups, programs):
                _remember(
                    number, zero, layers, step, steps, tokens, kv, kv_bias, own, turns, R, clips, samples, kept,
                    D, MEMORY, HEADS, WIDTH, HALF, PAIRS, ROWS, SPLIT, DEEP,
                )  # fmt: skip
            for number in range(program, tiles * groups, programs):
                _begin(number, zero, step + 1, noise, stream, stats, R, samples, n_b, n_s, n_h, D, COLUMNS, ROWS)
            met += programs
            zero = _barrier(counter, met, out, D * D, PREFETCH)


def _sizes(size: Tile, rows: int, tokens: int, width: int, channels: int) -> dict[str, int]:
    return {
        "PAIRS": max(16, triton.next_power_of_2(channels) // 2),
        "TOKENS": max(16, triton.next_power_of_2(tokens)),
        "ROWS": 16 if rows <= 16 else 32,
        "LANES": 16,
        "COLUMNS": size.rows,
        "WIDE": 4 * size.rows,  # an MLP is four times as wide as the stream: as many tiles up as down
        "PIECES": triton.next_power_of_2(triton.cdiv(width, size.rows)),
        "SPLIT": size.num_warps,
        "DEEP": size.block // size.num_warps,
    }


def predictor_step_forward(
    noise: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    times: torch.Tensor,
    norms: torch.Tensor,
    q: torch.Tensor,
    q_bias: torch.Tensor,
    kv: torch.Tensor,
    kv_bias: torch.Tensor,
    out: torch.Tensor,
    out_bias: torch.Tensor,
    up: torch.Tensor,
    up_bias: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor,
    head: torch.Tensor,
    head_bias: torch.Tensor,
    rope_size: int,
    eps: float,
    scale: float,
) -> torch.Tensor:
    clips, samples, steps, width = noise.shape
    layers, _, context, heads, channels = keys.shape
    hidden_width, memory, rows = up.shape[1], head.shape[0], clips * samples
    device, dtype = noise.device, keys.dtype
    tokens = torch.empty((clips, samples, steps, memory), dtype=noise.dtype, device=device)
    if not tokens.numel():
        return tokens
    architecture = _triton.architecture(device)
    size = tile("predictor_step", width, dtype, architecture)
    sizes = _sizes(size, rows, clips * context, width, channels)
    stream = torch.empty((rows, width), dtype=torch.float32, device=device)
    stats = torch.empty((2, rows, triton.cdiv(width, sizes["COLUMNS"])), dtype=torch.float32, device=device)
    turns = torch.empty((steps, clips, 2, sizes["PAIRS"]), dtype=torch.float32, device=device)
    mixed = torch.empty((rows, width), dtype=dtype, device=device)
    hidden = torch.empty((rows, hidden_width), dtype=dtype, device=device)
    own = torch.empty((layers, 2, rows, steps - 1, width), dtype=dtype, device=device)
    counter = torch.zeros((1,), dtype=torch.int32, device=device)
    noise, keys, values = _triton.unit(noise), _triton.unit(keys), _triton.unit(values)
    weights = (norms, q, q_bias, kv, kv_bias, out, out_bias, up, up_bias, down, down_bias, head, head_bias)
    most = max(triton.cdiv(n, sizes["COLUMNS"]) for n in (width, memory, hidden_width // 4))
    _triton.launch(
        predictor_step_kernel, (min(_triton.processors(device), max(most, 2 * layers * heads)),), size,
        noise, keys, values, times, turns_a_second(rope_size // 2, device), *(w.contiguous() for w in weights),
        tokens, stream, stats, turns, mixed, hidden, own, counter, layers, steps, clips, samples, context, scale, eps,
        *noise.stride()[:3], *keys.stride()[:4], *values.stride()[:4], *times.stride(), cooperative=True,
        D=width, HIDDEN=hidden_width, MEMORY=memory, HEADS=heads, WIDTH=channels, HALF=rope_size // 2, **sizes,
        PREFETCH=architecture > 0,
    )  # fmt: skip
    return tokens
