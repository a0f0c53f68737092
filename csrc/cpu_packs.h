// Packs of a fixed number of floats, so that sums over lanes come out the same on every instruction set. Nothing here may be inline
// with external linkage; see numbers.h.
#pragma once

#include "cpu_vectors.h"

namespace deltakern {
namespace {

constexpr int kLanes = 16;
constexpr int kParts = kLanes / kWidth;

// kLanes floats, in as many vectors as the machine needs
struct Pack {
  Vec v[kParts];
};

#define DK_EACH _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i)
DK_INLINE Pack operator+(Pack a, const Pack& b) {
  DK_EACH a.v[i] += b.v[i];
  return a;
}
DK_INLINE Pack operator-(Pack a, const Pack& b) {
  DK_EACH a.v[i] -= b.v[i];
  return a;
}
DK_INLINE Pack operator*(Pack a, const Pack& b) {
  DK_EACH a.v[i] *= b.v[i];
  return a;
}
DK_INLINE Pack add_product(Pack c, const Pack& a, const Pack& b) {  // a * b + c, rounded once
  DK_EACH c.v[i] = fused<Vec>(a.v[i], b.v[i], c.v[i]);
  return c;
}
DK_INLINE Pack take_product(Pack c, const Pack& a, const Pack& b) {  // c - a * b
  DK_EACH c.v[i] = fused<Vec>(-a.v[i], b.v[i], c.v[i]);
  return c;
}
DK_INLINE Pack filled(float x) {
  Pack a;
  DK_EACH a.v[i] = splat<Vec>(x);
  return a;
}
// Of the lanes from `count` on, 0
DK_INLINE Pack only(Pack a, int64_t count) {
  if (count == kLanes) return a;
  static constexpr int32_t kept[2 * kLanes] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  DK_EACH a.v[i] = bit_cast<Vec>(static_cast<Ints>(bit_cast<Ints>(a.v[i]) & load<Ints>(kept + kLanes - count + i * kWidth)));
  return a;
}
// The sum of all lanes: l + 8 onto l, then l + 4, l + 2, l + 1
DK_INLINE float total(Pack a) {
#pragma GCC unroll 4
  for (int n = kParts / 2; n > 0; n /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) a.v[i] += a.v[i + n];
  return add_across<kWidth / 2>(a.v[0])[0];
}

DK_INLINE Vec read(Float32, const char* from) { return load<Vec>(from); }
DK_INLINE Vec read(Bfloat16, const char* from) {
  return bit_cast<Vec>(static_cast<Words>(__builtin_convertvector(load<Halves>(from), Words) << 16));
}
DK_INLINE Vec read(Float16, const char* from) { return widen_halves(from); }

DK_INLINE void write(Float32, char* to, Vec x) { memcpy(to, &x, sizeof x); }
DK_INLINE void write(Bfloat16, char* to, Vec x) {  // to the nearest, ties to even
  const Words bits = bit_cast<Words>(x), number = (Words)(x == x);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Halves out = __builtin_convertvector((rounded & number) | (0x7fc0u & ~number), Halves);
  memcpy(to, &out, sizeof out);
}
DK_INLINE void write(Float16, char* to, Vec x) {
#if defined(__AVX512F__)
  const __m256i out = _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  const __m128i out = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  Halves out;
  for (int i = 0; i < kWidth; ++i) out[i] = narrow_float16(x[i]);
#endif
  memcpy(to, &out, sizeof out);
}

template <class T>
DK_INLINE Pack read(const char* from) {
  Pack a;
  DK_EACH a.v[i] = read(T{}, from + i * kWidth * kSize<T>);
  return a;
}
template <class T>
DK_INLINE void write(char* to, const Pack& a) {
  DK_EACH write(T{}, to + i * kWidth * kSize<T>, a.v[i]);
}

#undef DK_EACH

}  // namespace
}  // namespace deltakern
