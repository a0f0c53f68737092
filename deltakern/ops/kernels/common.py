"""Device functions that several kernels share. Everything is float32: callers cast after the load and before the store."""

import triton
import triton.language as tl


@triton.jit
def row_offsets(row, inner, outer_stride, inner_stride):
    """Offset of each row of an (outer, inner, D) view, in int64, from its flat int32 number."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def load_rows(pointer, offsets, column, mask):
    """A (ROWS, BLOCK) tile in float32, zero where masked; the columns have unit stride."""
    return tl.load(pointer + offsets[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(pointer, offsets, column, value, mask):
    tl.store(pointer + offsets[:, None] + column[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def row_statistics(x, inside, eps, WIDTH: tl.constexpr):
    """Mean and reciprocal deviation of the rows of ``x`` (ROWS, BLOCK), zero outside ``inside``. Two passes over registers:
    the variance is that of the centred row, so a large mean costs no digits."""
    mean = tl.sum(x, axis=1) / WIDTH
    centred = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / WIDTH
    return mean, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def norm_backward(g, xhat, rstd, WIDTH: tl.constexpr):
    """Gradient of the rows before a LayerNorm; ``g`` is the output's gradient times the weight, zero outside the row."""
    along = tl.sum(g * xhat, axis=1) / WIDTH
    mean = tl.sum(g, axis=1) / WIDTH
    return rstd[:, None] * (g - mean[:, None] - xhat * along[:, None])


@triton.jit
def segment_tile(number, length, BLOCK: tl.constexpr):
    """Tile ``number`` of (S, length), counted along a segment first: ``(segment, column, mask)``, the first two int64."""
    tiles = tl.cdiv(length, BLOCK)
    column = (number % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return (number // tiles).to(tl.int64), column, column < length


@triton.jit
def elementwise_loss(d, beta, KIND: tl.constexpr):
    """The loss of the differences ``d``: smooth_l1, log_cosh, mse or l1."""
    size = tl.abs(d)
    if KIND == "mse":
        loss = d * d
    elif KIND == "l1":
        loss = size
    elif KIND == "smooth_l1":
        loss = tl.where(size < beta, d * d / (2.0 * beta), size - 0.5 * beta)
    else:
        # Near zero the closed form cancels, so there a series takes over; where it ends its first omitted term is below float32's eps
        square = d * d
        loss = tl.where(
            size < 0.125,
            square * (0.5 + square * (-1.0 / 12.0 + square * (1.0 / 45.0))),
            size + (tl.log(1.0 + tl.exp(-2.0 * size)) - 0.6931471805599453),
        )
    return loss


@triton.jit
def cosine_sine(seconds, rate):
    """Of the angles of times, float64 seconds and turns a second, which broadcast; the results are float32.

    An angle is kept in turns, and its whole turns leave in one fused multiply-add: however large it is, no digit of the rest is lost.
    """
    rate_high = rate.to(tl.float32)
    rate_low = (rate - rate_high.to(tl.float64)).to(tl.float32)
    time_high = seconds.to(tl.float32)
    time_low = (seconds - time_high.to(tl.float64)).to(tl.float32)
    whole = tl.floor(time_high * rate_high + 0.5)
    part = tl.fma(time_high, rate_high, -whole) + (time_high * rate_low + time_low * rate_high)
    quarter = tl.floor(part * 4.0 + 0.5)
    x = (part - quarter * 0.25) * 6.283185307179586
    y = x * x  # x is within an eighth of a turn, where these minimax polynomials (Cephes, sinf and cosf) err by an ulp
    s = x + x * y * (-1.6666654611e-1 + y * (8.3321608736e-3 + y * -1.9515295891e-4))
    c = 1.0 - 0.5 * y + y * y * (4.166664568298827e-2 + y * (-1.388731625493765e-3 + y * 2.443315711809948e-5))
    quadrant = quarter.to(tl.int32)
    odd = (quadrant & 1) != 0
    sin = tl.where(odd, c, s)
    cos = tl.where(odd, s, c)
    sin = tl.where((quadrant & 2) != 0, -sin, sin)
    cos = tl.where(((quadrant + 1) & 2) != 0, -cos, cos)
    return cos, sin


@triton.jit
def narrow_parts(x, DTYPE: tl.constexpr):
    """x in float32 as the sum of two numbers of a narrow dtype."""
    high = x.to(DTYPE)
    return high, (x - high.to(tl.float32)).to(DTYPE)


@triton.jit
def dot_wide_narrow(x, y, acc):
    """``acc + x @ y`` for x in float32. Where y is narrow, x goes to the tensor cores as two narrow numbers and keeps its digits."""
    if y.dtype == tl.float32:
        return tl.dot(x, y, acc, input_precision="ieee")
    else:
        high, low = narrow_parts(x, y.dtype)
        return tl.dot(low, y, tl.dot(high, y, acc))


@triton.jit
def dot_narrow_wide(x, y, acc):
    """``acc + x @ y`` for y in float32, as :func:`dot_wide_narrow`."""
    if x.dtype == tl.float32:
        return tl.dot(x, y, acc, input_precision="ieee")
    else:
        high, low = narrow_parts(y, x.dtype)
        return tl.dot(x, low, tl.dot(x, high, acc))


@triton.jit
def dot_both_wide(x, y, acc, dtype: tl.constexpr):
    """``acc + x @ y`` for x and y in float32, on the tensor cores of dtype; the product of the two low parts is below float32's digits."""
    if dtype == tl.float32:
        return tl.dot(x, y, acc, input_precision="ieee")
    else:
        x_high, x_low = narrow_parts(x, dtype)
        y_high, y_low = narrow_parts(y, dtype)
        return tl.dot(x_high, y_high, tl.dot(x_high, y_low, tl.dot(x_low, y_high, acc)))
