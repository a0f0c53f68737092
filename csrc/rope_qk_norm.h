// Rotary position embedding and per-head LayerNorm of q and k on the CPU: the problem, and the functions of every instruction set.
#pragma once

#include "numbers.h"

namespace deltakern {

constexpr int64_t kMostChannels = 256;  // of a head

// q or k. Strides are in elements, of batch, token and head; channels lie side by side.
struct RopeSide {
  const void* x;        // null where there is no such tensor, or nothing to do
  const void* grad;     // of what comes out; backward only
  void* out;            // the rotated tensor, or x's gradient
  const float* weight;  // null without norm
  DType type;           // of all three
  int64_t x_stride[3], grad_stride[3], out_stride[3];
};

struct Rope {
  int64_t batch, length, heads, width;  // width: channels of a head
  int64_t prefix, period;               // leading tokens that do not rotate; rows of the tables, used over and over
  const float *cos, *sin;
  int64_t cos_stride, sin_stride;
  float eps;
  bool norm_first;
  RopeSide side[2];  // q, k
};

// Tokens are numbered through the batch. The weights' sums are taken a chunk of tokens at a time and the chunks' added in order, so
// that they do not depend on the threads. A row's own sums go over the lanes of a pack (cpu_packs.h), on every instruction set alike.
constexpr int64_t kChunk = 32;

struct RopeKernels {
  void (*forward)(const Rope& r, int64_t first, int64_t last);
  void (*backward)(const Rope& r, int64_t first, int64_t last, float* sums);  // adds to sums (2, width)
};

extern const RopeKernels rope_baseline;
extern const RopeKernels rope_avx2;
extern const RopeKernels rope_avx512;

// Throws std::invalid_argument for what the kernels do not take.
void check_rope(const Rope& r, bool backward);

// Both check. `sums` (2, width) is written whole: the gradients of q's and k's weight, zero where there is none.
// `isa` is a name of cpu_isa.h.
void rope_qk_norm_forward_cpu(const Rope& r, int threads, const char* isa);
void rope_qk_norm_backward_cpu(const Rope& r, float* sums, int threads, const char* isa);

}  // namespace deltakern
