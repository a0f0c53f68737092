// Element types, and the arithmetic that is written once for a float and for a vector of floats (GCC's vector extension).
//
// Every function is static (or a template instantiated on a type local to its file): the CPU kernels are compiled several times
// for different instruction sets, and nothing compiled for one of them may be linked in place of another's.
//
// The build switches contraction of a * b + c off: what rounds once says so by `fused`, so that every machine with such an
// instruction computes the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DK_INLINE static __host__ __device__ __forceinline__
#else
#define DK_INLINE static inline __attribute__((always_inline))
#endif

namespace deltakern {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// Widening. bfloat16 is the upper half of a float; float16 is shifted into place and multiplied by 2^112 (exact, subnormals too).
DK_INLINE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
DK_INLINE float widen_bfloat16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }
DK_INLINE float widen_float16(uint16_t bits) {
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13, sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const float value = from_bits(magnitude) * 5.192296858534828e33f;
  uint32_t out;
  memcpy(&out, &value, sizeof out);
  if (magnitude >= 0x0f800000u) out = magnitude | 0x7f800000u;  // infinity and NaN
  return from_bits(out | sign);
}

// To the nearest, ties to even: below the least normal number by an addition that leaves the fraction in the low bits
DK_INLINE uint16_t narrow_float16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits >= 0x47800000u) return static_cast<uint16_t>(sign | (bits > 0x7f800000u ? 0x7e00u : 0x7c00u));
  if (bits < 0x38800000u) {
    const float shifted = from_bits(bits) + 0.5f;
    memcpy(&bits, &shifted, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | (bits + 0xc8000fffu + (bits >> 13 & 1u)) >> 13);
}

template <class V>
struct Bits;  // the unsigned integers of V's width
template <>
struct Bits<float> {
  using Word = uint32_t;
};

template <class To, class From>
DK_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
DK_INLINE V splat(float x) {
  return V{} + x;
}

template <class V>
DK_INLINE V magnitude(V x) {
  using Word = typename Bits<V>::Word;
  return bit_cast<V>(static_cast<Word>(bit_cast<Word>(x) & 0x7fffffffu));
}

// x within [-limit, limit], with the sign of x; some finite value where x is NaN
template <class V>
DK_INLINE V clamp(V x, V limit) {
  const V least = x > -limit ? x : -limit;
  return least < limit ? least : limit;
}

// a * b + c, rounded once where the machine has an instruction for it (a CPU without FMA rounds twice)
template <class V>
DK_INLINE V fused(V a, V b, V c) {
  return a * b + c;
}

#ifdef __CUDA_ARCH__
template <>
__device__ __forceinline__ float magnitude<float>(float x) {
  return fabsf(x);
}
template <>
__device__ __forceinline__ float clamp<float>(float x, float limit) {
  return fminf(fmaxf(x, -limit), limit);
}
template <>
__device__ __forceinline__ float fused<float>(float a, float b, float c) {
  return fmaf(a, b, c);
}
#endif

}  // namespace deltakern
