// Attention of many queries over a clip's few tokens, temporal RoPE inside, on the CPU: the problem, and the functions of every
// instruction set.
#pragma once

#include "numbers.h"

namespace deltakern {

// Strides are in elements, of all dimensions but the last: channels lie side by side.
struct Rows {
  void* data;  // null where there is no such tensor
  DType type;
  int64_t stride[4];
};

// Seconds (batch, n) side by side; float64 or float32
struct Times {
  const void* data;
  bool wide;
};

struct ContextAttention {
  int64_t batch, queries, groups, tokens, own, heads, width;  // queries: of a clip, the groups' one after another; own: of a query
  int64_t half;                                               // channels (i, i + half) rotate, those from 2 * half on do not
  float scale;
  Times q_time, k_time, own_time;  // k_time null: keys stand rotated already, own ones too
  const float* rates;              // half: revolutions a second of the channels, for times in float32
  const int64_t* visible;          // of a group, from 1 to tokens; null for all
  Rows q, out;                     // strides of batch, query, head
  Rows k, v;                       // strides of batch, token, head
  Rows own_k, own_v;               // strides of batch, query, own, head
  // Backward only: `grad` comes in, `out` and these are written whole
  Rows grad, dk, dv, d_own_k, d_own_v;
};

constexpr int64_t kMostWidth = 256;
constexpr int64_t kQueriesAtOnce = 64;  // of a unit of the forward's work

constexpr int64_t kPack = 16;           // floats that the kernels take at a time

constexpr int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What a thread works with, in floats: lengths, all but `pairs` whole packs (cpu_packs.h), and where in its memory things are.
// A row has room for another pack behind it, which may be read and written.
struct ContextLayout {
  int64_t table;           // a row of the tables: of a time's cosines, or sines
  int64_t row;             // a row of channels, zero beyond the width
  int64_t columns, own;    // keys, and own keys, of a row of scores
  int64_t pairs;           // channels of the transposed keys: an even number
  int64_t row_room;        // from row to row
  int64_t scores_room;     // from one query's scores to the next one's
  int64_t raw, queries, scores, own_keys, own_values, keys_across, values;               // of both passes
  int64_t keys, values_across, grads, score_grads, key_grads, value_grads, turned_back;  // of the backward alone
  int64_t floats;
  ContextLayout(const ContextAttention& p, bool backward);
};

constexpr int64_t kMostTogether = 4;  // queries that are multiplied with the keys at a time

// Cosines and sines, a row of `table` each, by clip and then by group, token or own token; of keys that stand rotated, null
struct Turns {
  const float* q;
  const float* k;
  const float* own;
};

struct ContextKernels {
  // Units [first, last) of batch x portions of kQueriesAtOnce queries x heads
  void (*forward)(const ContextAttention& p, const ContextLayout& layout, const Turns& turns, int64_t first, int64_t last, float* memory);
  // Units [first, last) of batch x heads: a unit adds up its own keys' gradients, in the order of the queries
  void (*backward)(const ContextAttention& p, const ContextLayout& layout, const Turns& turns, int64_t first, int64_t last, float* memory);
};

extern const ContextKernels context_baseline;
extern const ContextKernels context_avx2;
extern const ContextKernels context_avx512;

// Throws std::invalid_argument for what the kernels do not take.
void check_context(const ContextAttention& p, bool backward);

// Both check. `isa` is a name of cpu_isa.h.
void context_attention_forward_cpu(const ContextAttention& p, int threads, const char* isa);
void context_attention_backward_cpu(const ContextAttention& p, int threads, const char* isa);

}  // namespace deltakern
