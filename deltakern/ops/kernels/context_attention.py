"""Kernels of ``context_attention``: a head's few keys and values stay with the program while the queries of a group pass by.

<rope(q, s), rope(k, t)> depends on t - s alone and a group shares s, so the keys are turned by t - s, once a program, and the queries
are not turned at all. Products take a float32 factor as the sum of two narrow numbers: scores and sums are as exact as in float32,
on tensor cores. The backward recomputes the probabilities, which are all at hand, and keeps nothing but the inputs.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from deltakern.ops import _triton
from deltakern.ops.kernels.common import cosine_sine, dot_both_wide, dot_narrow_wide, dot_wide_narrow
from deltakern.ops.kernels.tiles import Tile, tile

QUERIES = 256
"""Queries a program, at most: they share the turning of the keys."""


@triton.jit
def _turn(seconds, rates, column, HALF: tl.constexpr):
    """Cosine and signed sine of the rotation by a time's angles: seconds (N,1) float64, column (1,C), the results (N,C) float32.

    Channel i < HALF pairs with i + HALF, and x turned is x * cos + x[partner] * sin; channels beyond do not turn.
    """
    rate = tl.load(rates + tl.where(column < HALF, column, column - HALF), mask=column < 2 * HALF, other=0.0)
    cos, sin = cosine_sine(seconds, rate)
    return cos, tl.where(column < HALF, -sin, sin)


@triton.jit
def _partner(column, HALF: tl.constexpr):
    return tl.where(column < HALF, column + HALF, tl.where(column < 2 * HALF, column - HALF, column))


@triton.jit
def _elapsed(time, offset, now, TURNED: tl.constexpr):
    """Seconds from the query to a token, (1,1) float64; a token that is turned already stands at time zero."""
    then = -now
    if not TURNED:
        then += tl.load(time + offset).to(tl.float64)
    return tl.full((1, 1), 0.0, tl.float64) + then


@triton.jit
def _load_keys(
    k, v, k_time, rates, now, clip, head, T, k_b, k_l, k_h, v_b, v_l, v_h, k_time_b, k_time_t,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, HALF: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """A head's keys, turned by the time from the query to them, (TOKENS, BLOCK) float32, and its values as they are."""
    token = tl.arange(0, TOKENS).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (token < T) & (column < WIDTH)
    seconds = tl.zeros((TOKENS, 1), tl.float64) - now
    if not TURNED:
        seconds += tl.load(k_time + clip * k_time_b + token * k_time_t, mask=token < T, other=0.0).to(tl.float64)
    cos, sin = _turn(seconds, rates, column, HALF)
    rows = k + clip * k_b + token * k_l + head * k_h
    key = tl.load(rows + column, mask=mask, other=0.0).to(tl.float32)
    beside = tl.load(rows + _partner(column, HALF), mask=mask, other=0.0).to(tl.float32)
    value = tl.load(v + clip * v_b + token * v_l + head * v_h + column, mask=mask, other=0.0)
    return key * cos + beside * sin, value


@triton.jit
def _place(R, G, HEADS: tl.constexpr, QUERIES: tl.constexpr, STEPS: tl.constexpr):
    """This program's clip, group, part of the group and head; neighbours have neighbouring heads, which share the rows in memory."""
    parts = tl.cdiv(R, QUERIES * STEPS)
    number = tl.program_id(0)
    head = (number % HEADS).to(tl.int64)
    part = (number // HEADS) % parts
    group = ((number // (HEADS * parts)) % G).to(tl.int64)
    return (number // (HEADS * parts * G)).to(tl.int64), group, part, head


@triton.jit
def context_attention_forward_kernel(
    q, k, v, q_time, k_time, visible, own_k, own_v, own_time, rates, out, R, G, T, J, scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, own_k_b, own_k_l, own_k_j, own_k_h, own_v_b, own_v_l, own_v_j, own_v_h,
    q_time_b, q_time_g, k_time_b, k_time_t, own_time_b, own_time_j, visible_g,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, QUERIES: tl.constexpr, STEPS: tl.constexpr,
    HALF: tl.constexpr, TURNED: tl.constexpr, ALL: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """One program: one head of up to QUERIES * STEPS of the R queries of one group. TOKENS lanes hold the T keys.

    HALF: pairs that turn. TURNED: the keys are turned already. ALL: no ``visible``. OWN: each query has J keys of its own.
    """
    scale = tl.cast(scale, tl.float32)
    clip, group, part, head = _place(R, G, HEADS, QUERIES, STEPS)
    column = tl.arange(0, BLOCK)[None, :]
    now = tl.load(q_time + clip * q_time_b + group * q_time_g).to(tl.float64)
    key, value = _load_keys(
        k, v, k_time, rates, now, clip, head, T, k_b, k_l, k_h, v_b, v_l, v_h, k_time_b, k_time_t, WIDTH, BLOCK, TOKENS, HALF, TURNED
    )
    key = tl.trans(key)
    token = tl.arange(0, TOKENS)[None, :]
    hidden = token >= T
    if not ALL:
        hidden |= token >= tl.load(visible + group * visible_g)
    for step in range(STEPS):
        row = (part * STEPS + step) * QUERIES + tl.arange(0, QUERIES)[:, None]
        mask = (row < R) & (column < WIDTH)
        row = group * R + row
        rows = q + clip * q_b + row * q_l + head * q_h
        query = tl.load(rows + column, mask=mask, other=0.0)
        score = dot_narrow_wide(query, key, tl.zeros((QUERIES, TOKENS), tl.float32)) * scale
        score = tl.where(hidden, float("-inf"), score)
        peak = tl.max(score, axis=1)[:, None]
        weight = tl.exp(score - peak)
        total = tl.sum(weight, axis=1)[:, None]
        acc = dot_wide_narrow(weight, value, tl.zeros((QUERIES, BLOCK), tl.float32))
        if OWN:
            straight = query.to(tl.float32)
            beside = tl.load(rows + _partner(column, HALF), mask=mask, other=0.0).to(tl.float32)
            own_keys = own_k + clip * own_k_b + row * own_k_l + head * own_k_h + column
            own_values = own_v + clip * own_v_b + row * own_v_l + head * own_v_h + column
            for index in range(J):
                j = tl.cast(index, tl.int64)
                cos, sin = _turn(_elapsed(own_time, clip * own_time_b + j * own_time_j, now, TURNED), rates, column, HALF)
                turned = straight * cos - beside * sin  # the query turned back, for a key that is loaded once
                own_key = tl.load(own_keys + j * own_k_j, mask=mask, other=0.0).to(tl.float32)
                own_value = tl.load(own_values + j * own_v_j, mask=mask, other=0.0).to(tl.float32)
                own_score = tl.sum(turned * own_key, axis=1)[:, None] * scale
                higher = tl.maximum(peak, own_score)
                shrink = tl.exp(peak - higher)
                own_weight = tl.exp(own_score - higher)
                total = total * shrink + own_weight
                acc = acc * shrink + own_weight * own_value
                peak = higher
        to = out + ((clip * G * R + row) * HEADS + head) * WIDTH + column
        tl.store(to, (acc * (1.0 / total)).to(out.dtype.element_ty), mask=mask)


@triton.jit
def context_attention_backward_kernel(
    q, k, v, q_time, k_time, visible, own_k, own_v, own_time, rates, grad, dq, dk, dv, d_own_k, d_own_v, R, G, T, J, scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, own_k_b, own_k_l, own_k_j, own_k_h, own_v_b, own_v_l, own_v_j, own_v_h,
    q_time_b, q_time_g, k_time_b, k_time_t, own_time_b, own_time_j, visible_g, grad_b, grad_l, grad_h,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, QUERIES: tl.constexpr, STEPS: tl.constexpr,
    HALF: tl.constexpr, TURNED: tl.constexpr, ALL: tl.constexpr, OWN: tl.constexpr, WANT_KEYS: tl.constexpr,
):  # fmt: skip
    """As the forward. dk and dv are this program's parts, (B,G,parts,T,H,d) float32, those of dk still turned.

    A score's gradient is its probability times the excess of its product <grad, value> over the products' mean under the
    probabilities.
    """
    scale = tl.cast(scale, tl.float32)
    clip, group, part, head = _place(R, G, HEADS, QUERIES, STEPS)
    column = tl.arange(0, BLOCK)[None, :]
    now = tl.load(q_time + clip * q_time_b + group * q_time_g).to(tl.float64)
    key, value = _load_keys(
        k, v, k_time, rates, now, clip, head, T, k_b, k_l, k_h, v_b, v_l, v_h, k_time_b, k_time_t, WIDTH, BLOCK, TOKENS, HALF, TURNED
    )
    token = tl.arange(0, TOKENS)[None, :]
    hidden = token >= T
    if not ALL:
        hidden |= token >= tl.load(visible + group * visible_g)
    key_sum = tl.zeros((TOKENS, BLOCK), tl.float32)
    value_sum = tl.zeros((TOKENS, BLOCK), tl.float32)
    for step in range(STEPS):
        row = (part * STEPS + step) * QUERIES + tl.arange(0, QUERIES)[:, None]
        mask = (row < R) & (column < WIDTH)
        row = group * R + row
        rows = q + clip * q_b + row * q_l + head * q_h
        query = tl.load(rows + column, mask=mask, other=0.0)
        g = tl.load(grad + clip * grad_b + row * grad_l + head * grad_h + column, mask=mask, other=0.0)
        score = dot_narrow_wide(query, tl.trans(key), tl.zeros((QUERIES, TOKENS), tl.float32)) * scale
        score = tl.where(hidden, float("-inf"), score)
        product = tl.dot(g, tl.trans(value), input_precision="ieee")
        peak = tl.max(score, axis=1)[:, None]
        weight = tl.exp(score - peak)
        total = tl.sum(weight, axis=1)[:, None]
        mean = tl.sum(weight * product, axis=1)[:, None]
        if OWN:
            straight = query.to(tl.float32)
            beside = tl.load(rows + _partner(column, HALF), mask=mask, other=0.0).to(tl.float32)
            upstream = g.to(tl.float32)
            own_keys = own_k + clip * own_k_b + row * own_k_l + head * own_k_h
            own_values = own_v + clip * own_v_b + row * own_v_l + head * own_v_h + column
            for index in range(J):
                j = tl.cast(index, tl.int64)
                cos, sin = _turn(_elapsed(own_time, clip * own_time_b + j * own_time_j, now, TURNED), rates, column, HALF)
                own_key = tl.load(own_keys + j * own_k_j + column, mask=mask, other=0.0).to(tl.float32)
                own_value = tl.load(own_values + j * own_v_j, mask=mask, other=0.0).to(tl.float32)
                own_score = tl.sum((straight * cos - beside * sin) * own_key, axis=1)[:, None] * scale
                higher = tl.maximum(peak, own_score)
                shrink = tl.exp(peak - higher)
                own_weight = tl.exp(own_score - higher)
                total = total * shrink + own_weight
                mean = mean * shrink + own_weight * tl.sum(upstream * own_value, axis=1)[:, None]
                peak = higher
        total = 1.0 / total
        mean *= total
        weight = tl.exp(score - peak) * total
        slope = weight * (product - mean) * scale
        query_grad = dot_both_wide(slope, key, tl.zeros((QUERIES, BLOCK), tl.float32), query.dtype)
        if WANT_KEYS:
            key_sum = dot_wide_narrow(tl.trans(slope), query, key_sum)
            value_sum = dot_wide_narrow(tl.trans(weight), g, value_sum)
        if OWN:
            for index in range(J):
                j = tl.cast(index, tl.int64)
                cos, sin = _turn(_elapsed(own_time, clip * own_time_b + j * own_time_j, now, TURNED), rates, column, HALF)
                turned = straight * cos - beside * sin
                own_key = tl.load(own_keys + j * own_k_j + column, mask=mask, other=0.0).to(tl.float32)
                aside = tl.load(own_keys + j * own_k_j + _partner(column, HALF), mask=mask, other=0.0).to(tl.float32)
                own_value = tl.load(own_values + j * own_v_j, mask=mask, other=0.0).to(tl.float32)
                own_weight = tl.exp(tl.sum(turned * own_key, axis=1)[:, None] * scale - peak) * total
                own_slope = own_weight * (tl.sum(upstream * own_value, axis=1)[:, None] - mean) * scale
                query_grad += own_slope * (own_key * cos + aside * sin)
                to = (((clip * G * R + row) * J + j) * HEADS + head) * WIDTH + column
                tl.store(d_own_k + to, (own_slope * turned).to(d_own_k.dtype.element_ty), mask=mask)
                tl.store(d_own_v + to, (own_weight * upstream).to(d_own_v.dtype.element_ty), mask=mask)
        to = dq + ((clip * G * R + row) * HEADS + head) * WIDTH + column
        tl.store(to, query_grad.to(dq.dtype.element_ty), mask=mask)
    if WANT_KEYS:
        parts = tl.cdiv(R, QUERIES * STEPS)
        row = ((clip * G + group) * parts + part) * T + tl.arange(0, TOKENS)[:, None]
        mask = (tl.arange(0, TOKENS)[:, None] < T) & (column < WIDTH)
        tl.store(dk + (row * HEADS + head) * WIDTH + column, key_sum, mask=mask)
        tl.store(dv + (row * HEADS + head) * WIDTH + column, value_sum, mask=mask)


@triton.jit
def context_attention_reduce_kernel(
    dk_parts, dv_parts, q_time, k_time, rates, dk, dv, G, T, parts, q_time_b, q_time_g, k_time_b, k_time_t,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """One program: one key of one clip, LANES heads at a time. Its parts are turned back and added in the order of the queries."""
    chunks = tl.cdiv(HEADS, LANES)
    head = (tl.program_id(0) % chunks) * LANES + tl.arange(0, LANES)[:, None]
    token = ((tl.program_id(0) // chunks) % T).to(tl.int64)
    clip = (tl.program_id(0) // (chunks * T)).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    mask = (head < HEADS) & (column < WIDTH)
    key_sum = tl.zeros((LANES, BLOCK), tl.float32)
    value_sum = tl.zeros((LANES, BLOCK), tl.float32)
    for group in range(G):
        now = tl.load(q_time + clip * q_time_b + tl.cast(group, tl.int64) * q_time_g).to(tl.float64)
        cos, sin = _turn(_elapsed(k_time, clip * k_time_b + token * k_time_t, now, TURNED), rates, column, HALF)
        for part in range(parts):
            row = ((((clip * G + group) * parts + part) * T + token) * HEADS + head) * WIDTH
            straight = tl.load(dk_parts + row + column, mask=mask, other=0.0)
            beside = tl.load(dk_parts + row + _partner(column, HALF), mask=mask, other=0.0)
            key_sum += straight * cos - beside * sin
            value_sum += tl.load(dv_parts + row + column, mask=mask, other=0.0)
    row = ((clip * T + token) * HEADS + head) * WIDTH
    tl.store(dk + row + column, key_sum.to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + row + column, value_sum.to(dv.dtype.element_ty), mask=mask)


@functools.cache
def turns_a_second(half: int, device: torch.device) -> torch.Tensor:
    """Turns a second of each pair, (half,) float64."""
    return (1.0 / 10.0 ** torch.linspace(-2, 2, half, dtype=torch.float64)).to(device)


def _sizes(size: Tile, each: int, tokens: int) -> dict[str, int]:
    """A tile of queries no higher than the group asks for; tensor cores take at least 16 of queries and of keys."""
    queries = min(size.rows, max(16, triton.next_power_of_2(each)))
    return {
        "BLOCK": max(16, size.block),
        "TOKENS": max(16, triton.next_power_of_2(tokens)),
        "QUERIES": queries,
        "STEPS": triton.cdiv(max(1, min(each, QUERIES)), queries),
    }


def context_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_time: torch.Tensor,
    k_time: torch.Tensor | None,
    visible: torch.Tensor | None,
    own_k: torch.Tensor | None,
    own_v: torch.Tensor | None,
    own_time: torch.Tensor | None,
    rope_size: int,
    scale: float,
) -> torch.Tensor:
    batch, queries, heads, width = q.shape
    groups, tokens = q_time.shape[1], k.shape[1]
    own = 0 if own_k is None else own_k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    size = tile("context_attention_forward", width, q.dtype, _triton.architecture(q.device))
    sizes = _sizes(size, queries // groups, tokens)
    programs = batch * groups * triton.cdiv(queries // groups, sizes["QUERIES"] * sizes["STEPS"]) * heads
    q, k, v = _triton.unit(q), _triton.unit(k), _triton.unit(v)
    own_k, own_v = (_triton.unit(own_k), _triton.unit(own_v)) if own else (None, None)
    _triton.launch(
        context_attention_forward_kernel, (programs,), size,
        q, k, v, q_time, k_time, visible, own_k, own_v, own_time, turns_a_second(rope_size // 2, q.device), out,
        queries // groups, groups, tokens, own, scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_strides(own_k, 4), *_strides(own_v, 4),
        *q_time.stride(), *_strides(k_time, 2), *_strides(own_time, 2), *_strides(visible, 1),
        HEADS=heads, WIDTH=width, **sizes, HALF=rope_size // 2, TURNED=k_time is None, ALL=visible is None, OWN=own > 0,
    )  # fmt: skip
    return out


def context_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_time: torch.Tensor,
    k_time: torch.Tensor | None,
    visible: torch.Tensor | None,
    own_k: torch.Tensor | None,
    own_v: torch.Tensor | None,
    own_time: torch.Tensor | None,
    grad: torch.Tensor,
    rope_size: int,
    scale: float,
    want_keys: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(dq, dk, dv, d_own_k, d_own_v)``; dk and dv are empty where they are not wanted, the last two without own keys."""
    batch, queries, heads, width = q.shape
    device, architecture = q.device, _triton.architecture(q.device)
    groups, tokens = q_time.shape[1], k.shape[1]
    own = 0 if own_k is None else own_k.shape[2]
    dq = torch.empty(q.shape, dtype=q.dtype, device=device)
    dk = torch.empty(k.shape if want_keys else (0,), dtype=k.dtype, device=device)
    dv = torch.empty(v.shape if want_keys else (0,), dtype=v.dtype, device=device)
    d_own_k = torch.empty((0,) if own_k is None else own_k.shape, dtype=q.dtype if own_k is None else own_k.dtype, device=device)
    d_own_v = torch.empty((0,) if own_v is None else own_v.shape, dtype=q.dtype if own_v is None else own_v.dtype, device=device)
    size = tile("context_attention_backward", width, q.dtype, architecture)
    sizes = _sizes(size, queries // groups, tokens)
    parts = triton.cdiv(queries // groups, sizes["QUERIES"] * sizes["STEPS"])
    shape = (batch, groups, parts, tokens, heads, width) if want_keys else (0,)
    dk_parts = torch.empty(shape, dtype=torch.float32, device=device)
    dv_parts = torch.empty(shape, dtype=torch.float32, device=device)
    q, k, v, grad = _triton.unit(q), _triton.unit(k), _triton.unit(v), _triton.unit(grad)
    own_k, own_v = (_triton.unit(own_k), _triton.unit(own_v)) if own else (None, None)
    rates = turns_a_second(rope_size // 2, device)
    _triton.launch(
        context_attention_backward_kernel, (batch * groups * parts * heads,), size,
        q, k, v, q_time, k_time, visible, own_k, own_v, own_time, rates, grad, dq, dk_parts, dv_parts, d_own_k, d_own_v,
        queries // groups, groups, tokens, own, scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_strides(own_k, 4), *_strides(own_v, 4),
        *q_time.stride(), *_strides(k_time, 2), *_strides(own_time, 2), *_strides(visible, 1), *grad.stride()[:3],
        HEADS=heads, WIDTH=width, **sizes, HALF=rope_size // 2, TURNED=k_time is None, ALL=visible is None, OWN=own > 0,
        WANT_KEYS=want_keys,
    )  # fmt: skip
    if want_keys:
        size = tile("context_attention_reduce", width, torch.float32, architecture)
        _triton.launch(
            context_attention_reduce_kernel, (batch * tokens * triton.cdiv(heads, size.rows),), size,
            dk_parts, dv_parts, q_time, k_time, rates, dk, dv, groups, tokens, parts, *q_time.stride(), *_strides(k_time, 2),
            HEADS=heads, WIDTH=width, LANES=size.rows, BLOCK=size.block, HALF=rope_size // 2, TURNED=k_time is None,
        )  # fmt: skip
    return dq, dk, dv, d_own_k, d_own_v


def _strides(tensor: torch.Tensor | None, count: int) -> tuple[int, ...]:
    """The first ``count`` strides; zeros for a tensor that is not there."""
    return (0,) * count if tensor is None else tensor.stride()[:count]
