"""Kernels of ``rope_qk_norm``. A row is a token and a head; its halves, which rotate into each other, are two tiles.

q and k go through one launch and read the table once. A token's place in the table is its number modulo N, so the doubled
table of a pair of frames does not exist. The backward recomputes from the projection and keeps nothing. ``split_qkv`` runs
these kernels too, the backward into its packed gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from deltakern.ops import _triton
from deltakern.ops.kernels.common import load_rows, store_rows
from deltakern.ops.kernels.tiles import tile
from deltakern.ops.split_qkv import gradient_to_fill, slices


@triton.jit
def _load_table(cos, sin, token, prefix, period, cos_stride, sin_stride, column, half, mask):
    """cos and sin of each row's token, as halves; a prefix token turns by nothing."""
    place = ((token - prefix) % period).to(tl.int64)
    turns = mask & (token >= prefix)[:, None]
    c = cos + (place * cos_stride)[:, None] + column[None, :]
    s = sin + (place * sin_stride)[:, None] + column[None, :]
    c1 = tl.load(c, mask=turns, other=1.0).to(tl.float32)
    c2 = tl.load(c + half, mask=turns, other=1.0).to(tl.float32)
    s1 = tl.load(s, mask=turns, other=0.0).to(tl.float32)
    s2 = tl.load(s + half, mask=turns, other=0.0).to(tl.float32)
    return c1, c2, s1, s2


@triton.jit
def _load_weight(weight, column, half):
    inside = column < half
    w1 = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    w2 = tl.load(weight + column + half, mask=inside, other=0.0).to(tl.float32)
    return w1[None, :], w2[None, :]


@triton.jit
def _rotate(x1, x2, c1, c2, s1, s2):
    return x1 * c1 - x2 * s1, x2 * c2 + x1 * s2


@triton.jit
def _rotate_back(g1, g2, c1, c2, s1, s2):
    """The transpose of the rotation."""
    return g1 * c1 + g2 * s2, g2 * c2 - g1 * s1


@triton.jit
def _standardise(x1, x2, mask, half, eps):
    """Rows less their mean over their deviation, and the reciprocal deviation. Two passes over registers."""
    mean = (tl.sum(x1 + x2, axis=1) / (2 * half))[:, None]
    x1 = tl.where(mask, x1 - mean, 0.0)
    x2 = tl.where(mask, x2 - mean, 0.0)
    rstd = (1.0 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / (2 * half) + eps))[:, None]
    return x1 * rstd, x2 * rstd, rstd


@triton.jit
def _forward(
    x, offsets, weight, out, here, column, half, mask, c1, c2, s1, s2, eps, NORM: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    x1 = load_rows(x, offsets, column, mask)
    x2 = load_rows(x, offsets + half, column, mask)
    if NORM and PRE:
        w1, w2 = _load_weight(weight, column, half)
        x1, x2, _ = _standardise(x1, x2, mask, half, eps)
        x1, x2 = x1 * w1, x2 * w2
    x1, x2 = _rotate(x1, x2, c1, c2, s1, s2)
    if NORM and not PRE:
        w1, w2 = _load_weight(weight, column, half)
        x1, x2, _ = _standardise(x1, x2, mask, half, eps)
        x1, x2 = x1 * w1, x2 * w2
    store_rows(out, here, column, x1, mask)
    store_rows(out, here + half, column, x2, mask)


@triton.jit
def rope_qk_norm_forward_kernel(
    k, q, cos, sin, q_weight, k_weight, q_out, k_out, length, prefix, period, eps,
    q_b, q_l, q_h, k_b, k_l, k_h, cos_stride, sin_stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    PRE: tl.constexpr, HAS_Q: tl.constexpr, NORM_Q: tl.constexpr, NORM_K: tl.constexpr,
):  # fmt: skip
    """HALF lanes hold half a row. PRE: the norm comes before the rotation."""
    eps = tl.cast(eps, tl.float32)
    half: tl.constexpr = WIDTH // 2
    per_clip = tl.cdiv(length * HEADS, ROWS)
    clip = (tl.program_id(0) // per_clip).to(tl.int64)
    row = (tl.program_id(0) % per_clip) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, HALF)
    mask = (row < length * HEADS)[:, None] & (column < half)[None, :]
    c1, c2, s1, s2 = _load_table(cos, sin, row // HEADS, prefix, period, cos_stride, sin_stride, column, half, mask)
    token, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    here = (clip * length * HEADS + row) * WIDTH  # the outputs are contiguous
    if HAS_Q:
        _forward(q, clip * q_b + token * q_l + head * q_h, q_weight, q_out, here, column, half, mask, c1, c2, s1, s2, eps, NORM_Q, PRE)
    _forward(k, clip * k_b + token * k_l + head * k_h, k_weight, k_out, here, column, half, mask, c1, c2, s1, s2, eps, NORM_K, PRE)


@triton.jit
def _backward(
    x, offsets, weight, grad, grad_offsets, out, here, column, half, mask, c1, c2, s1, s2, eps, sum1, sum2,
    NORM: tl.constexpr, PRE: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of a tile and returns the weight's sums, a term of this tile richer."""
    g1 = load_rows(grad, grad_offsets, column, mask)
    g2 = load_rows(grad, grad_offsets + half, column, mask)
    if PRE or not NORM:
        g1, g2 = _rotate_back(g1, g2, c1, c2, s1, s2)
    if NORM:
        x1 = load_rows(x, offsets, column, mask)
        x2 = load_rows(x, offsets + half, column, mask)
        if not PRE:
            x1, x2 = _rotate(x1, x2, c1, c2, s1, s2)
        x1, x2, rstd = _standardise(x1, x2, mask, half, eps)
        sum1 += g1 * x1
        sum2 += g2 * x2
        w1, w2 = _load_weight(weight, column, half)
        g1, g2 = g1 * w1, g2 * w2
        mean = (tl.sum(g1 + g2, axis=1) / (2 * half))[:, None]
        along = (tl.sum(g1 * x1 + g2 * x2, axis=1) / (2 * half))[:, None]
        g1 = (g1 - mean - x1 * along) * rstd
        g2 = (g2 - mean - x2 * along) * rstd
        if not PRE:
            g1, g2 = _rotate_back(g1, g2, c1, c2, s1, s2)
    store_rows(out, here, column, g1, mask)
    store_rows(out, here + half, column, g2, mask)
    return sum1, sum2


@triton.jit
def rope_qk_norm_backward_kernel(
    k, q, cos, sin, q_weight, k_weight, grad_q, grad_k, dq, dk, partials, length, prefix, period, eps, tiles, each,
    q_b, q_l, q_h, k_b, k_l, k_h, grad_q_b, grad_q_l, grad_q_h, grad_k_b, grad_k_l, grad_k_h, out_b, out_l, cos_stride, sin_stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    PRE: tl.constexpr, DO_Q: tl.constexpr, DO_K: tl.constexpr, NORM_Q: tl.constexpr, NORM_K: tl.constexpr,
):  # fmt: skip
    """Program p walks over the tiles p * each and on; partials (programs, 2, d) are its sums for the weights of q and of k.

    out_b and out_l are the strides of dq and of dk, whose heads are neighbours.
    """
    eps = tl.cast(eps, tl.float32)
    half: tl.constexpr = WIDTH // 2
    per_clip = tl.cdiv(length * HEADS, ROWS)
    column = tl.arange(0, HALF)
    q1 = tl.zeros((ROWS, HALF), tl.float32)
    q2 = tl.zeros((ROWS, HALF), tl.float32)
    k1 = tl.zeros((ROWS, HALF), tl.float32)
    k2 = tl.zeros((ROWS, HALF), tl.float32)
    first = tl.program_id(0) * each
    for index in range(first, tl.minimum(first + each, tiles)):
        clip = tl.cast(index // per_clip, tl.int64)
        row = (index % per_clip) * ROWS + tl.arange(0, ROWS)
        mask = (row < length * HEADS)[:, None] & (column < half)[None, :]
        c1, c2, s1, s2 = _load_table(cos, sin, row // HEADS, prefix, period, cos_stride, sin_stride, column, half, mask)
        token, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
        here = clip * out_b + token * out_l + head * WIDTH
        if DO_Q:
            offsets = clip * q_b + token * q_l + head * q_h
            upstream = clip * grad_q_b + token * grad_q_l + head * grad_q_h
            q1, q2 = _backward(
                q, offsets, q_weight, grad_q, upstream, dq, here, column, half, mask, c1, c2, s1, s2, eps, q1, q2, NORM_Q, PRE
            )
        if DO_K:
            offsets = clip * k_b + token * k_l + head * k_h
            upstream = clip * grad_k_b + token * grad_k_l + head * grad_k_h
            k1, k2 = _backward(
                k, offsets, k_weight, grad_k, upstream, dk, here, column, half, mask, c1, c2, s1, s2, eps, k1, k2, NORM_K, PRE
            )
    to = partials + tl.program_id(0).to(tl.int64) * 2 * WIDTH + column
    tl.store(to, tl.sum(q1, axis=0), mask=column < half)
    tl.store(to + half, tl.sum(q2, axis=0), mask=column < half)
    tl.store(to + WIDTH, tl.sum(k1, axis=0), mask=column < half)
    tl.store(to + WIDTH + half, tl.sum(k2, axis=0), mask=column < half)


def rope_qk_norm_forward(
    q: torch.Tensor | None,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    pre_rope: bool,
    num_prefix: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(q, k)``; the first is empty without a q."""
    batch, length, heads, width = k.shape
    q_out = torch.empty((0,) if q is None else q.shape, dtype=k.dtype if q is None else q.dtype, device=k.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    size = tile("rope_qk_norm_forward", width, k.dtype, _triton.architecture(k.device))
    k, cos, sin = _triton.unit(k), _triton.unit(cos), _triton.unit(sin)
    q_in = k if q is None else _triton.unit(q)
    _triton.launch(
        rope_qk_norm_forward_kernel, (batch * triton.cdiv(length * heads, size.rows),), size,
        k, q_in, cos, sin, q_weight, k_weight, q_out, k_out, length, num_prefix, cos.shape[0], eps,
        *q_in.stride()[:3], *k.stride()[:3], cos.stride(0), sin.stride(0),
        HEADS=heads, WIDTH=width, ROWS=size.rows, HALF=size.block // 2,
        PRE=pre_rope, HAS_Q=q is not None, NORM_Q=q is not None and q_weight is not None, NORM_K=k_weight is not None,
    )  # fmt: skip
    return q_out, k_out


def rope_qk_norm_backward(
    q: torch.Tensor | None,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    grad_q: torch.Tensor | None,
    grad_k: torch.Tensor | None,
    pre_rope: bool,
    num_prefix: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(dq, dk, sums)``, the sums (2, d) float32 of the weights of q and of k; what has no incoming gradient is empty, or zero."""
    do_q, do_k = q is not None and grad_q is not None, grad_k is not None
    dq = torch.empty(q.shape if do_q else (0,), dtype=q.dtype if do_q else k.dtype, device=k.device)
    dk = torch.empty(k.shape if do_k else (0,), dtype=k.dtype, device=k.device)
    where = dq if do_q else dk
    out = where.stride()[:2] if do_q or do_k else (0, 0)
    options = (pre_rope, num_prefix, eps)
    return dq, dk, _backward_into(dq, dk, out, q, k, cos, sin, q_weight, k_weight, grad_q if do_q else None, grad_k, *options)


def split_qkv_backward(
    packed: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    grad_q: torch.Tensor | None,
    grad_k: torch.Tensor | None,
    grad_v: torch.Tensor | None,
    grad_gate: torch.Tensor | None,
    heads: int,
    pre_rope: bool,
    num_prefix: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(d_packed, sums)``."""
    d_packed, dq, dk = gradient_to_fill(packed, heads, cos.shape[1], grad_q, grad_k, grad_v, grad_gate)
    q, k = slices(packed, heads, cos.shape[1], False)[:2]
    options = (pre_rope, num_prefix, eps)
    out = d_packed.stride()[:2]
    return d_packed, _backward_into(dq, dk, out, q, k, cos, sin, q_weight, k_weight, grad_q, grad_k, *options)


def _backward_into(dq, dk, out, q, k, cos, sin, q_weight, k_weight, grad_q, grad_k, pre_rope, num_prefix, eps) -> torch.Tensor:
    """Fills dq and dk, whose strides of clips and tokens are ``out``, where there is a gradient; returns the weights' sums (2, d)."""
    batch, length, heads, width = k.shape
    device, do_q, do_k = k.device, grad_q is not None, grad_k is not None
    size = tile("rope_qk_norm_backward", width, k.dtype, _triton.architecture(device))
    tiles = batch * triton.cdiv(length * heads, size.rows) if do_q or do_k else 0
    programs = _triton.programs(device, size, tiles)
    partials = torch.empty((programs if tiles else 0, 2, width), dtype=torch.float32, device=device)
    k, cos, sin = _triton.unit(k), _triton.unit(cos), _triton.unit(sin)
    q_in = _triton.unit(q) if do_q else k
    g_q = _triton.unit(grad_q) if do_q else k
    g_k = _triton.unit(grad_k) if do_k else k
    _triton.launch(
        rope_qk_norm_backward_kernel, (programs if tiles else 0,), size,
        k, q_in, cos, sin, q_weight, k_weight, g_q, g_k, dq, dk, partials,
        length, num_prefix, cos.shape[0], eps, tiles, triton.cdiv(tiles, programs),
        *q_in.stride()[:3], *k.stride()[:3], *g_q.stride()[:3], *g_k.stride()[:3], *out, cos.stride(0), sin.stride(0),
        HEADS=heads, WIDTH=width, ROWS=size.rows, HALF=size.block // 2,
        PRE=pre_rope, DO_Q=do_q, DO_K=do_k, NORM_Q=q_weight is not None, NORM_K=k_weight is not None,
    )  # fmt: skip
    return partials.sum(0)
