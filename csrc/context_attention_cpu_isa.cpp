// context_attention on the CPU: queries and keys. Compiled once for every instruction set with that set's flags (setup.py), each
// time into its own table: DELTAKERN_TABLE is that table's name. Nothing here may be inline with external linkage; see numbers.h.
#include "context_attention.h"
#include "cpu_packs.h"

#ifndef DELTAKERN_TABLE
#define DELTAKERN_TABLE context_baseline
#endif

namespace deltakern {
namespace {

constexpr int kTogether = kWidth == 16 ? 4 : 2;  // as many as registers hold the sums of; results do not depend on it
static_assert(kTogether <= kMostTogether && kLanes == kPack, "");

DK_INLINE Pack at(const float* from) { return read<Float32>(reinterpret_cast<const char*>(from)); }
DK_INLINE void put(float* to, const Pack& a) { write<Float32>(reinterpret_cast<char*>(to), a); }

// --- rows ---------------------------------------------------------------------------------------------------------------------

DK_INLINE int64_t size_of(DType type) { return type == DType::float32 ? 4 : 2; }

template <class T>
DK_INLINE void widen_row(const char* from, int64_t width, int64_t row, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) put(to + i, read<T>(from + i * kSize<T>));
  if (i < width) {
    char padded[kLanes * kSize<T>] = {};
    memcpy(padded, from + i * kSize<T>, (width - i) * kSize<T>);
    put(to + i, read<T>(padded));
  }
  put(to + row, filled(0.0f));
}

template <class T>
DK_INLINE void narrow_row(char* to, int64_t width, const float* from) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) write<T>(to + i * kSize<T>, at(from + i));
  if (i < width) {
    char padded[kLanes * kSize<T>];
    write<T>(padded, at(from + i));
    memcpy(to + i * kSize<T>, padded, (width - i) * kSize<T>);
  }
}

// Of a row of `rows`: zero beyond the width, and in the pack behind
DK_INLINE void get_row(const Rows& rows, int64_t offset, const ContextAttention& p, const ContextLayout& layout, float* to) {
  const char* from = static_cast<const char*>(rows.data) + offset * size_of(rows.type);
  switch (rows.type) {
    case DType::float32: return widen_row<Float32>(from, p.width, layout.row, to);
    case DType::bfloat16: return widen_row<Bfloat16>(from, p.width, layout.row, to);
    case DType::float16: return widen_row<Float16>(from, p.width, layout.row, to);
  }
}
DK_INLINE void put_row(const Rows& rows, int64_t offset, const ContextAttention& p, const float* from) {
  char* to = static_cast<char*>(rows.data) + offset * size_of(rows.type);
  switch (rows.type) {
    case DType::float32: return narrow_row<Float32>(to, p.width, from);
    case DType::bfloat16: return narrow_row<Bfloat16>(to, p.width, from);
    case DType::float16: return narrow_row<Float16>(to, p.width, from);
  }
}

// x rotated by a row of the tables, cosines first, times `scale`; without a table, only that. A pack that reaches beyond its channels
// is written before those that own them.
template <bool Back>
DK_INLINE void rotate(const ContextAttention& p, const ContextLayout& layout, const float* turn, float scale, const float* x, float* to) {
  const Pack factor = filled(scale);
  if (turn == nullptr) {
    for (int64_t i = 0; i < layout.row; i += kLanes) put(to + i, at(x + i) * factor);
    return put(to + layout.row, filled(0.0f));
  }
  const float *cos = turn, *sin = turn + layout.table;
  for (int64_t i = 0; i < p.half; i += kLanes) {
    const Pack a = at(x + i), b = at(x + p.half + i), c = at(cos + i), s = at(sin + i);
    put(to + i, (Back ? add_product(a * c, b, s) : take_product(a * c, b, s)) * factor);
  }
  for (int64_t i = 0; i < p.half; i += kLanes) {
    const Pack a = at(x + i), b = at(x + p.half + i), c = at(cos + i), s = at(sin + i);
    put(to + p.half + i, (Back ? take_product(b * c, a, s) : add_product(b * c, a, s)) * factor);
  }
  for (int64_t i = 2 * p.half; i < layout.row_room; ++i) to[i] = x[i] * scale;
}

// --- scores -------------------------------------------------------------------------------------------------------------------

// Of N queries (or gradients) with all keys (or values) across: two sums a score, of the even and of the odd channels
template <int N>
DK_INLINE void multiply(const ContextLayout& layout, const float* x, const float* across, float* out) {
  for (int64_t block = 0; block < layout.columns; block += kLanes) {
    Pack even[N], odd[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) even[n] = odd[n] = filled(0.0f);
    for (int64_t c = 0; c < layout.pairs; c += 2) {
      const Pack first = at(across + c * layout.columns + block), second = at(across + (c + 1) * layout.columns + block);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        even[n] = add_product(even[n], first, filled(x[n * layout.row_room + c]));
        odd[n] = add_product(odd[n], second, filled(x[n * layout.row_room + c + 1]));
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) put(out + n * layout.scores_room + block, even[n] + odd[n]);
  }
}

DK_INLINE float dot(const float* x, const float* y, int64_t row) {
  Pack sum = filled(0.0f);
  for (int64_t i = 0; i < row; i += kLanes) sum = add_product(sum, at(x + i), at(y + i));
  return total(sum);
}

// e^x for x <= 0, 0 where that is not a normal number; NaN stays. Within 2 units in the last place.
DK_INLINE Vec exp_of(Vec x) {
  const Vec bounded = x < splat<Vec>(-87.0f) ? splat<Vec>(-87.0f) : x;
  const Vec shifted = fused<Vec>(bounded, splat<Vec>(1.44269504f), splat<Vec>(12582912.0f));  // 1.5 * 2^23: the low bits hold the exponent
  const Vec whole = shifted - 12582912.0f;
  const Vec r = fused<Vec>(whole, splat<Vec>(-1.42860682e-6f), fused<Vec>(whole, splat<Vec>(-0.693145752f), bounded));  // log 2 in two parts
  Vec e = splat<Vec>(1.0f / 5040);
  e = fused<Vec>(e, r, splat<Vec>(1.0f / 720));
  e = fused<Vec>(e, r, splat<Vec>(1.0f / 120));
  e = fused<Vec>(e, r, splat<Vec>(1.0f / 24));
  e = fused<Vec>(e, r, splat<Vec>(1.0f / 6));
  e = fused<Vec>(e, r, splat<Vec>(0.5f));
  e = fused<Vec>(e, r, splat<Vec>(1.0f));
  e = fused<Vec>(e, r, splat<Vec>(1.0f));
  const Vec scaled = bit_cast<Vec>(static_cast<Words>(bit_cast<Words>(e) + (bit_cast<Words>(shifted) << 23)));
  const Vec found = x < splat<Vec>(-87.0f) ? splat<Vec>(0.0f) : scaled;
  return x == x ? found : x;
}

// Lane i and lane i ^ Step, and so on for half of Step
template <int Step>
DK_INLINE Vec greatest_across(Vec x) {
  if constexpr (Step == 0) {
    return x;
  } else {
    const Vec other = shuffle<Across<Step>>(x, x);
    return greatest_across<Step / 2>(x > other ? x : other);
  }
}

#define DK_PARTS _Pragma("GCC unroll 4") for (int part = 0; part < kParts; ++part)

// Scores to probabilities, in place; what was not scored is minus infinity. A NaN among them makes all of them NaN.
DK_INLINE void softmax(float* scores, int64_t count) {
  Pack most = at(scores);
  for (int64_t i = kLanes; i < count; i += kLanes) {
    const Pack other = at(scores + i);
    DK_PARTS most.v[part] = most.v[part] > other.v[part] ? most.v[part] : other.v[part];
  }
  Vec top = most.v[0];
#pragma GCC unroll 4
  for (int part = 1; part < kParts; ++part) top = top > most.v[part] ? top : most.v[part];
  top = greatest_across<kWidth / 2>(top);
  Pack sum = filled(0.0f);
  for (int64_t i = 0; i < count; i += kLanes) {
    Pack e = at(scores + i);
    DK_PARTS e.v[part] = exp_of(e.v[part] - top);
    sum = sum + e;
    put(scores + i, e);
  }
  const Pack share = filled(1.0f / total(sum));
  for (int64_t i = 0; i < count; i += kLanes) put(scores + i, at(scores + i) * share);
}

// --- a head's keys and queries ----------------------------------------------------------------------------------------------------

struct Head {
  int64_t clip, head;
};

DK_INLINE const float* turn_of(const float* table, int64_t row, const ContextLayout& layout) {
  return table ? table + 2 * row * layout.table : nullptr;
}
DK_INLINE int64_t token_offset(const Rows& rows, const Head& h, int64_t token) {
  return h.clip * rows.stride[0] + token * rows.stride[1] + h.head * rows.stride[2];
}
DK_INLINE int64_t own_offset(const Rows& rows, const Head& h, int64_t query, int64_t j) {
  return h.clip * rows.stride[0] + query * rows.stride[1] + j * rows.stride[2] + h.head * rows.stride[3];
}

struct Work {
  const ContextAttention& p;
  const ContextLayout& layout;
  const Turns& turns;
  float* memory;

  float* raw() const { return memory + layout.raw; }
  float* query(int64_t n) const { return memory + layout.queries + n * layout.row_room; }
  float* grad(int64_t n) const { return memory + layout.grads + n * layout.row_room; }
  float* scores(int64_t n) const { return memory + layout.scores + n * layout.scores_room; }
  float* score_grads(int64_t n) const { return memory + layout.score_grads + n * layout.scores_room; }
  float* own_key(int64_t j) const { return memory + layout.own_keys + j * layout.row_room; }
  float* own_value(int64_t j) const { return memory + layout.own_values + j * layout.row_room; }
  float* value(int64_t t) const { return memory + layout.values + t * layout.row_room; }
  float* key(int64_t t) const { return memory + layout.keys + t * layout.row_room; }
  int64_t group(int64_t query) const { return query / (p.queries / p.groups); }
  int64_t seen(int64_t query) const { return p.visible ? p.visible[group(query)] : p.tokens; }
  const float* query_turn(const Head& h, int64_t query) const { return turn_of(turns.q, h.clip * p.groups + group(query), layout); }
};

DK_INLINE void lay_across(const Work& w, const float* row, int64_t token, float* across) {
  for (int64_t c = 0; c < w.layout.pairs; ++c) across[c * w.layout.columns + token] = row[c];
}

DK_INLINE void get_keys(const Work& w, const Head& h, bool backward) {
  float *keys_across = w.memory + w.layout.keys_across, *values_across = w.memory + w.layout.values_across;
  for (int64_t t = w.p.tokens; t < w.layout.columns; ++t)  // the columns beyond the keys
    for (int64_t c = 0; c < w.layout.pairs; ++c) {
      keys_across[c * w.layout.columns + t] = 0.0f;
      if (backward) values_across[c * w.layout.columns + t] = 0.0f;
    }
  for (int64_t t = 0; t < w.p.tokens; ++t) {
    float* key = backward ? w.key(t) : w.query(0);
    get_row(w.p.k, token_offset(w.p.k, h, t), w.p, w.layout, w.raw());
    rotate<false>(w.p, w.layout, turn_of(w.turns.k, h.clip * w.p.tokens + t, w.layout), 1.0f, w.raw(), key);
    lay_across(w, key, t, keys_across);
    get_row(w.p.v, token_offset(w.p.v, h, t), w.p, w.layout, w.value(t));
    if (backward) lay_across(w, w.value(t), t, values_across);
  }
}

DK_INLINE void get_own(const Work& w, const Head& h, int64_t query) {
  for (int64_t j = 0; j < w.p.own; ++j) {
    get_row(w.p.own_k, own_offset(w.p.own_k, h, query, j), w.p, w.layout, w.raw());
    rotate<false>(w.p, w.layout, turn_of(w.turns.own, h.clip * w.p.own + j, w.layout), 1.0f, w.raw(), w.own_key(j));
    get_row(w.p.own_v, own_offset(w.p.own_v, h, query, j), w.p, w.layout, w.own_value(j));
  }
}

// Rotated, scaled, and multiplied with the keys
template <int N>
DK_INLINE void get_queries(const Work& w, const Head& h, int64_t query) {
  for (int n = 0; n < N; ++n) {
    get_row(w.p.q, token_offset(w.p.q, h, query + n), w.p, w.layout, w.raw());
    rotate<false>(w.p, w.layout, w.query_turn(h, query + n), w.p.scale, w.raw(), w.query(n));
  }
  multiply<N>(w.layout, w.query(0), w.memory + w.layout.keys_across, w.scores(0));
}

// The probabilities of query n of those together, own keys behind the shared ones
DK_INLINE void weigh(const Work& w, int64_t n, int64_t seen) {
  const float hidden = -__builtin_inff();
  float* scores = w.scores(n);
  for (int64_t t = seen; t < w.layout.columns; ++t) scores[t] = hidden;
  float* own = scores + w.layout.columns;
  for (int64_t j = 0; j < w.layout.own; ++j) own[j] = j < w.p.own ? dot(w.query(n), w.own_key(j), w.layout.row) : hidden;
  softmax(scores, w.layout.scores_room);
}

// to = the sum of weights[t] * rows[t] for the shared rows that are seen, then for the own ones
DK_INLINE void mix(const Work& w, const float* weights, const float* rows, int64_t seen, const float* own_rows, float* to) {
  const int64_t room = w.layout.row_room;
  const float* own_weights = weights + w.layout.columns;
  for (int64_t i = 0; i < w.layout.row; i += kLanes) {
    Pack sum = filled(0.0f);
    for (int64_t t = 0; t < seen; ++t) sum = add_product(sum, at(rows + t * room + i), filled(weights[t]));
    for (int64_t j = 0; j < w.p.own; ++j) sum = add_product(sum, at(own_rows + j * room + i), filled(own_weights[j]));
    put(to + i, sum);
  }
  put(to + w.layout.row, filled(0.0f));
}

template <int N>
DK_INLINE void forward_together(const Work& w, const Head& h, int64_t query) {
  get_queries<N>(w, h, query);
  for (int n = 0; n < N; ++n) {
    const int64_t seen = w.seen(query + n);
    get_own(w, h, query + n);
    weigh(w, n, seen);
    mix(w, w.scores(n), w.value(0), seen, w.own_value(0), w.raw());
    put_row(w.p.out, token_offset(w.p.out, h, query + n), w.p, w.raw());
  }
}

void forward(const ContextAttention& p, const ContextLayout& layout, const Turns& turns, int64_t first, int64_t last, float* memory) {
  const Work w{p, layout, turns, memory};
  const int64_t portions = (p.queries + kQueriesAtOnce - 1) / kQueriesAtOnce;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t portion = unit / p.heads, from = portion % portions * kQueriesAtOnce;
    const int64_t to = from + kQueriesAtOnce < p.queries ? from + kQueriesAtOnce : p.queries;
    const Head h{portion / portions, unit % p.heads};
    get_keys(w, h, false);
    int64_t query = from;
    for (; query + kTogether <= to; query += kTogether) forward_together<kTogether>(w, h, query);
    for (; query < to; ++query) forward_together<1>(w, h, query);
  }
}

// --- backward -----------------------------------------------------------------------------------------------------------------

DK_INLINE void add_scaled(float* to, const float* row, float factor, int64_t length) {
  for (int64_t i = 0; i < length; i += kLanes) put(to + i, add_product(at(to + i), at(row + i), filled(factor)));
}

// Products of the gradient with the values, in place, to gradients of the scores
DK_INLINE void softmax_back(const float* weights, float* grads, int64_t count) {
  Pack sum = filled(0.0f);
  for (int64_t i = 0; i < count; i += kLanes) sum = add_product(sum, at(weights + i), at(grads + i));
  const Pack mean = filled(total(sum));
  for (int64_t i = 0; i < count; i += kLanes) put(grads + i, at(weights + i) * (at(grads + i) - mean));
}

template <int N>
DK_INLINE void backward_together(const Work& w, const Head& h, int64_t query) {
  const ContextLayout& layout = w.layout;
  get_queries<N>(w, h, query);
  for (int n = 0; n < N; ++n) get_row(w.p.grad, token_offset(w.p.grad, h, query + n), w.p, layout, w.grad(n));
  multiply<N>(layout, w.grad(0), w.memory + layout.values_across, w.score_grads(0));
  for (int n = 0; n < N; ++n) {
    const int64_t seen = w.seen(query + n);
    get_own(w, h, query + n);
    weigh(w, n, seen);
    const float* weights = w.scores(n);
    float* grads = w.score_grads(n);
    for (int64_t t = seen; t < layout.columns; ++t) grads[t] = 0.0f;
    for (int64_t j = 0; j < layout.own; ++j)
      grads[layout.columns + j] = j < w.p.own ? dot(w.grad(n), w.own_value(j), layout.row) : 0.0f;
    softmax_back(weights, grads, layout.scores_room);
    mix(w, grads, w.key(0), seen, w.own_key(0), w.raw());
    rotate<true>(w.p, layout, w.query_turn(h, query + n), w.p.scale, w.raw(), w.memory + layout.turned_back);
    put_row(w.p.out, token_offset(w.p.out, h, query + n), w.p, w.memory + layout.turned_back);
    for (int64_t t = 0; t < seen; ++t) {
      add_scaled(w.memory + layout.key_grads + t * layout.row_room, w.query(n), grads[t], layout.row);
      add_scaled(w.memory + layout.value_grads + t * layout.row_room, w.grad(n), weights[t], layout.row);
    }
    for (int64_t j = 0; j < w.p.own; ++j) {
      rotate<false>(w.p, layout, nullptr, grads[layout.columns + j], w.query(n), w.raw());
      rotate<true>(w.p, layout, turn_of(w.turns.own, h.clip * w.p.own + j, layout), 1.0f, w.raw(), w.memory + layout.turned_back);
      put_row(w.p.d_own_k, own_offset(w.p.d_own_k, h, query + n, j), w.p, w.memory + layout.turned_back);
      rotate<false>(w.p, layout, nullptr, weights[layout.columns + j], w.grad(n), w.raw());
      put_row(w.p.d_own_v, own_offset(w.p.d_own_v, h, query + n, j), w.p, w.raw());
    }
  }
}

void backward(const ContextAttention& p, const ContextLayout& layout, const Turns& turns, int64_t first, int64_t last, float* memory) {
  const Work w{p, layout, turns, memory};
  for (int64_t unit = first; unit < last; ++unit) {
    const Head h{unit / p.heads, unit % p.heads};
    get_keys(w, h, true);
    for (int64_t i = 0; i < p.tokens * layout.row_room; ++i) memory[layout.key_grads + i] = memory[layout.value_grads + i] = 0.0f;
    int64_t query = 0;
    for (; query + kTogether <= p.queries; query += kTogether) backward_together<kTogether>(w, h, query);
    for (; query < p.queries; ++query) backward_together<1>(w, h, query);
    for (int64_t t = 0; t < p.tokens; ++t) {
      const float* turn = turn_of(turns.k, h.clip * p.tokens + t, layout);
      rotate<true>(p, layout, turn, 1.0f, memory + layout.key_grads + t * layout.row_room, w.raw());
      put_row(p.dk, token_offset(p.dk, h, t), p, w.raw());
      put_row(p.dv, token_offset(p.dv, h, t), p, memory + layout.value_grads + t * layout.row_room);
    }
  }
}

}  // namespace

extern const ContextKernels DELTAKERN_TABLE;
const ContextKernels DELTAKERN_TABLE = {forward, backward};

}  // namespace deltakern
