// Best of N: what the CPU and the CUDA kernels share. The formulas, the rule that orders candidates, and the description of a problem.
#pragma once

#include "numbers.h"

namespace deltakern {

enum class Loss : int { smooth_l1 = 0, log_cosh = 1, mse = 2, l1 = 3 };

constexpr int kMaxBatchDims = 6;
constexpr int kMaxReducedDims = 4;

// The reduced dimensions of one row, after merging: element i (row-major) lies at `offset_of(span, i)`.
struct Span {
  int dims;
  int64_t size[kMaxReducedDims];
  int64_t stride[kMaxReducedDims];  // in elements
};

// groups x count rows of `width` elements, each compared with its group's target. All offsets are in elements, 64 bits wide.
struct Problem {
  const void* candidates;
  const void* target;
  DType candidate_type;
  DType target_type;
  Loss loss;
  float beta;
  int64_t groups, count, width;
  int batch_dims;
  int64_t batch_size[kMaxBatchDims];
  int64_t batch_candidate[kMaxBatchDims];
  int64_t batch_target[kMaxBatchDims];
  int64_t count_stride;
  Span candidate_span;
  Span target_span;
};

struct Best {
  float loss;
  int64_t index;
};

// True when a comes before b: the lesser loss, then the lower index; NaN comes after everything, infinity included.
DK_INLINE bool before(const Best& a, const Best& b) {
  const bool a_nan = a.loss != a.loss, b_nan = b.loss != b.loss;
  if (a_nan || b_nan) return a_nan == b_nan ? a.index < b.index : b_nan;
  return a.loss < b.loss || (a.loss == b.loss && a.index < b.index);
}

// `before` is a total order, so a fold of `better` gives the same answer in any order.
DK_INLINE Best better(const Best& a, const Best& b) { return before(b, a) ? b : a; }

DK_INLINE int64_t offset_of(const Span& span, int64_t i) {
  int64_t offset = 0;
  for (int d = span.dims - 1; d > 0; --d) {
    const int64_t above = i / span.size[d];
    offset += (i - above * span.size[d]) * span.stride[d];
    i = above;
  }
  return offset + i * span.stride[0];
}

DK_INLINE bool contiguous(const Span& span) { return span.dims == 1 && (span.stride[0] == 1 || span.size[0] == 1); }

DK_INLINE void group_offsets(const Problem& p, int64_t group, int64_t* candidate, int64_t* target) {
  int64_t c = 0, t = 0;
  for (int d = p.batch_dims - 1; d >= 0; --d) {
    const int64_t above = group / p.batch_size[d], here = group - above * p.batch_size[d];
    c += here * p.batch_candidate[d];
    t += here * p.batch_target[d];
    group = above;
  }
  *candidate = c;
  *target = t;
}

// What turns a row's sum of `value` into its loss. The sum of smooth_l1 is kept free of its division by beta.
DK_INLINE double scale_of(const Problem& p) {
  const double mean = 1.0 / static_cast<double>(p.width);
  return p.loss == Loss::smooth_l1 ? mean / static_cast<double>(p.beta) : mean;
}

DK_INLINE float loss_of(double sum, double scale) {
  const float loss = static_cast<float>(sum * scale);
  if (loss == loss) return loss;
  const uint32_t quiet = 0x7fc00000u;  // one NaN, whatever the sign and payload of those that came in
  float nan;
  memcpy(&nan, &quiet, sizeof nan);
  return nan;
}

// log(cosh(x)) for x >= 0. Below 1 an even polynomial (so that small losses keep their digits: |x| + log1p(exp(-2|x|)) - log 2
// cancels there), above 1 that formula with polynomials for exp2 on [-1/2, 1/2] and log1p(e)/e on [0, e^-2].
// Both are within 3e-7 relative; see tests/test_extension.py.
template <class V>
DK_INLINE V log_cosh(V x) {
  using Word = typename Bits<V>::Word;
  const V z = x * x;
  V small = splat<V>(-2.56173025e-05f);
  small = fused<V>(small, z, splat<V>(0.00017619862f));
  small = fused<V>(small, z, splat<V>(-0.000679409888f));
  small = fused<V>(small, z, splat<V>(0.00216129189f));
  small = fused<V>(small, z, splat<V>(-0.0067397994f));
  small = fused<V>(small, z, splat<V>(0.0222214647f));
  small = fused<V>(small, z, splat<V>(-0.0833332986f));
  small = fused<V>(small, z, splat<V>(0.5f)) * z;

  V y = x * -2.885390082f;  // -2 / log 2
  y = y > splat<V>(-120.0f) ? y : splat<V>(-120.0f);
  const V shifted = y + 12582912.0f;  // 1.5 * 2^23: the low bits now hold y rounded
  const V f = y - (shifted - 12582912.0f);
  V e = splat<V>(0.00133908633f);
  e = fused<V>(e, f, splat<V>(0.00967603177f));
  e = fused<V>(e, f, splat<V>(0.0555035695f));
  e = fused<V>(e, f, splat<V>(0.240221068f));
  e = fused<V>(e, f, splat<V>(0.693147182f));
  e = fused<V>(e, f, splat<V>(1.00000012f));
  e = bit_cast<V>(static_cast<Word>(bit_cast<Word>(e) + (bit_cast<Word>(shifted) << 23)));  // times 2^round(y)
  V q = splat<V>(0.152762681f);
  q = fused<V>(q, e, splat<V>(-0.244727269f));
  q = fused<V>(q, e, splat<V>(0.333085179f));
  q = fused<V>(q, e, splat<V>(-0.499995857f));
  q = fused<V>(q, e, splat<V>(1.0f));
  const V large = x + fused<V>(q, e, splat<V>(-0.693147181f));
  return x < splat<V>(1.0f) ? small : large;
}

// Adds one element's value (see scale_of) to a row's sum. A difference of 0 adds exactly 0, so rows may be padded with equal elements.
template <Loss L, class V>
DK_INLINE V add_value(V sum, V difference, V beta) {
  if constexpr (L == Loss::smooth_l1) {
    // beta * smooth_l1 without a branch: m = d within beta of 0 gives d^2 / 2, m = +-beta beyond gives beta * (|d| - beta / 2)
    const V m = clamp<V>(difference, beta);
    return fused<V>(m, fused<V>(m, splat<V>(-0.5f), difference), sum);
  } else if constexpr (L == Loss::mse) {
    return fused<V>(difference, difference, sum);
  } else if constexpr (L == Loss::log_cosh) {
    return sum + log_cosh<V>(magnitude<V>(difference));
  } else {
    return sum + magnitude<V>(difference);
  }
}

}  // namespace deltakern
