// Best of N on the CPU: the row sums. Compiled once for every instruction set with that set's flags (setup.py), each time into
// its own table: DELTAKERN_TABLE is that table's name. Nothing here may be inline with external linkage; see numbers.h.
#include "best_of_n_cpu.h"
#include "cpu_vectors.h"

#ifndef DELTAKERN_TABLE
#define DELTAKERN_TABLE kernels_baseline
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "bfloat16 pairs are taken apart as little-endian words"
#endif

namespace deltakern {
namespace {

constexpr int kVectors = kLanes / kWidth;

// Element i of a group of kLanes goes to vector i / kWidth, place i % kWidth. But bfloat16 is read in pairs: of two vectors the first
// then holds the even elements and the second the odd ones, and the target is arranged likewise.
template <class T>
constexpr bool kPaired = false;
template <>
constexpr bool kPaired<Bfloat16> = true;

// The kLanes elements at `from`, widened
DK_INLINE void widen(Float32, const char* from, Vec (&out)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) out[v] = load<Vec>(from + v * sizeof(Vec));
}
DK_INLINE void widen(Bfloat16, const char* from, Vec (&out)[kVectors]) {
  for (int v = 0; v < kVectors; v += 2) {
    const Words pairs = load<Words>(from + v / 2 * sizeof(Words));
    out[v] = bit_cast<Vec>(static_cast<Words>(pairs << 16));
    out[v + 1] = bit_cast<Vec>(static_cast<Words>(pairs & 0xffff0000u));
  }
}
DK_INLINE void widen(Float16, const char* from, Vec (&out)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) out[v] = widen_halves(from + v * sizeof(Halves));
}

// The sum of all lanes: l + 32 onto l, then l + 16, ..., l + 1. The first steps add whole vectors.
template <class T>
DK_INLINE float fold(Vec (&sum)[kVectors]) {
  constexpr int kKept = kPaired<T> ? 2 : 1;
#pragma GCC unroll 16
  for (int n = kVectors / 2; n >= kKept; n /= 2)
#pragma GCC unroll 16
    for (int v = 0; v < n; ++v) sum[v] += sum[v + n];
  if constexpr (!kPaired<T>) return add_across<kWidth / 2>(sum[0])[0];
  // Even lanes are in sum[0], odd ones in sum[1]: the last step, l + 1 onto l, is the one from half to half.
  const Vec x = add_across<kWidth / 4>(shuffle<Halved<0>>(sum[0], sum[1]) + shuffle<Halved<kWidth / 2>>(sum[0], sum[1]));
  return x[0] + x[kWidth / 2];
}

template <class T, Loss L>
void sum_rows(const void* rows_start, int64_t row_stride, int64_t rows, const float* target, int64_t n, float beta_value, float* sums) {
  const Vec beta = splat<Vec>(beta_value);
  const int64_t whole = n / kLanes * kLanes, rest = n - whole;
  const char* row = static_cast<const char*>(rows_start);
  for (int64_t r = 0; r < rows; ++r, row += row_stride * kSize<T>) {
    Vec sum[kVectors] = {}, here[kVectors];
    for (int64_t i = 0; i < whole; i += kLanes) {
      widen(T{}, row + i * kSize<T>, here);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[v] = add_value<L, Vec>(sum[v], here[v] - load<Vec>(target + i + v * kWidth), beta);
    }
    if (rest) {
      char padded[kLanes * kSize<T>] = {};
      memcpy(padded, row + whole * kSize<T>, rest * kSize<T>);
      widen(T{}, padded, here);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[v] = add_value<L, Vec>(sum[v], here[v] - load<Vec>(target + whole + v * kWidth), beta);
    }
    sums[r] = fold<T>(sum);
  }
}

template <class T>
void arrange(float* target, int64_t n) {
  if (!kPaired<T>) return;
  for (float* at = target; at < target + n; at += 2 * kWidth) {
    const Vec a = load<Vec>(at), b = load<Vec>(at + kWidth);
    const Vec even = shuffle<Second<0>>(a, b), odd = shuffle<Second<1>>(a, b);
    memcpy(at, &even, sizeof even);
    memcpy(at + kWidth, &odd, sizeof odd);
  }
}

}  // namespace

#define DK_LOSSES(T) {sum_rows<T, Loss::smooth_l1>, sum_rows<T, Loss::log_cosh>, sum_rows<T, Loss::mse>, sum_rows<T, Loss::l1>}
extern const CpuKernels DELTAKERN_TABLE;
const CpuKernels DELTAKERN_TABLE = {
    {DK_LOSSES(Float32), DK_LOSSES(Bfloat16), DK_LOSSES(Float16)},
    {arrange<Float32>, arrange<Bfloat16>, arrange<Float16>},
};

}  // namespace deltakern
