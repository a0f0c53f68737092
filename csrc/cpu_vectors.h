// Vectors of the instruction set that a file is compiled for, and what the CPU kernels do with them. Nothing here may be inline
// with external linkage; see numbers.h.
#pragma once

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

#include "numbers.h"

#if defined(__AVX512F__)
#define DK_WIDTH 16
#elif defined(__AVX2__)
#define DK_WIDTH 8
#else
#define DK_WIDTH 4
#endif

namespace deltakern {
namespace {

typedef float Vec __attribute__((vector_size(4 * DK_WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * DK_WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * DK_WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * DK_WIDTH)));

constexpr int kWidth = DK_WIDTH;

}  // namespace

template <>
struct Bits<Vec> {
  using Word = Words;
};

#if defined(__AVX512DQ__)
template <>
inline __attribute__((always_inline)) Vec clamp<Vec>(Vec x, Vec limit) {
  return (Vec)_mm512_range_ps((__m512)x, (__m512)limit, 0x2);  // the lesser magnitude with the sign of x
}
#endif
#if defined(__AVX512F__)
template <>
inline __attribute__((always_inline)) Vec fused<Vec>(Vec a, Vec b, Vec c) {
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#elif defined(__FMA__)
template <>
inline __attribute__((always_inline)) Vec fused<Vec>(Vec a, Vec b, Vec c) {
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#endif

namespace {

struct Float32 {};
struct Bfloat16 {};
struct Float16 {};

template <class T>
constexpr int64_t kSize = 2;
template <>
constexpr int64_t kSize<Float32> = 4;

template <class V>
DK_INLINE V load(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

DK_INLINE Vec widen_halves(const char* from) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, load<__m256i>(from));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(load<__m128i>(from));
#else
  const Words bits = __builtin_convertvector(load<Halves>(from), Words);
  const Words shifted = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  const Words scaled = bit_cast<Words>(static_cast<Vec>(bit_cast<Vec>(shifted) * 5.192296858534828e33f));
  const Words special = (Words)(bit_cast<Ints>(shifted) >= 0x0f800000);
  return bit_cast<Vec>(static_cast<Words>(((scaled & ~special) | ((shifted | 0x7f800000u) & special)) | sign));
#endif
}

// Places for a shuffle: i ^ Step; or, of two vectors joined, the halves that begin at From (its places in the second count from kWidth).
template <int Step>
struct Across {
  int32_t at[kWidth];
  constexpr Across() : at() {
    for (int i = 0; i < kWidth; ++i) at[i] = i ^ Step;
  }
};
template <int From>
struct Halved {
  int32_t at[kWidth];
  constexpr Halved() : at() {
    for (int i = 0; i < kWidth; ++i) at[i] = From + (i < kWidth / 2 ? i : i + kWidth / 2);
  }
};

// Every second place of two vectors joined
template <int From>
struct Second {
  int32_t at[kWidth];
  constexpr Second() : at() {
    for (int i = 0; i < kWidth; ++i) at[i] = From + 2 * i;
  }
};

template <class Places>
DK_INLINE Vec shuffle(Vec a, Vec b) {
  static constexpr Places places;
#ifdef __clang__
  Vec out;
  for (int i = 0; i < kWidth; ++i) out[i] = places.at[i] < kWidth ? a[places.at[i]] : b[places.at[i] - kWidth];
  return out;
#else
  return __builtin_shuffle(a, b, load<Ints>(places.at));
#endif
}

// Adds lane i + Step to lane i, for Step and its halves down to 1
template <int Step>
DK_INLINE Vec add_across(Vec x) {
  if constexpr (Step == 0) {
    return x;
  } else {
    return add_across<Step / 2>(x + shuffle<Across<Step>>(x, x));
  }
}

}  // namespace
}  // namespace deltakern
