// context_attention on the CPU: checks, tables of the rotation, and the division of work among threads.
#include "context_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu_isa.h"
#include "refuse.h"

namespace deltakern {
namespace {

constexpr char kOp[] = "context_attention";

void check_rows(const Rows& rows, const std::string& name, bool needed) {
  if (rows.type != DType::float32 && rows.type != DType::bfloat16 && rows.type != DType::float16)
    refuse(kOp, name + ": dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got " + std::to_string(static_cast<int>(rows.type)));
  check_address(kOp, rows.data, rows.type == DType::float32 ? 4 : 2, name, needed);
  for (int64_t stride : rows.stride)
    if (stride < 0) refuse(kOp, name + ": strides must not be negative");
}

void check_times(const Times& times, const std::string& name, bool needed) { check_address(kOp, times.data, times.wide ? 8 : 4, name, needed); }

bool no_keys(const ContextAttention& p) { return p.batch == 0 || p.heads == 0; }
bool empty(const ContextAttention& p) { return no_keys(p) || p.queries == 0; }

// Multiplications of queries with keys, own ones too
double work(const ContextAttention& p) {
  return static_cast<double>(p.batch * p.queries) * static_cast<double>(p.heads * p.width) * static_cast<double>(p.tokens + p.own);
}

constexpr double kSerial = 1 << 15;  // below this starting a team costs more

double at(const Times& times, int64_t i) {
  return times.wide ? static_cast<const double*>(times.data)[i] : static_cast<double>(static_cast<const float*>(times.data)[i]);
}

// As the reference has them: angles of float32 times in float32, in its order of operations, of float64 times in float64. Where all
// times are float64 angles are taken from the time of the clip's first query on, so that they keep their digits however late the clip
// is: only the differences of times matter. Keys that are rotated already stand at time zero.
class Tables {
 public:
  Tables(const ContextAttention& p, const ContextLayout& layout, int threads)
      : single_(p.rates), rates_(p.half), times_{{p.q_time, p.groups}, {p.k_time, p.tokens}, {p.own_time, p.own}} {
    for (int64_t i = 0; i < p.half; ++i) {
      const double exponent = p.half == 1 ? -2.0 : -2.0 + 4.0 * static_cast<double>(i) / static_cast<double>(p.half - 1);
      rates_[i] = 2.0 * M_PI / std::pow(10.0, exponent);
    }
    int64_t rows = 0;
    bool relative = p.k_time.data != nullptr;
    for (const Kind& kind : times_) {
      if (kind.times.data == nullptr) continue;
      rows += p.batch * kind.count;
      relative = relative && kind.times.wide;
    }
    room_.reset(new float[2 * rows * layout.table]);
    float* to = room_.get();
    const float* found[3] = {};
    for (int kind = 0; kind < 3; ++kind) {
      const auto& [times, count] = times_[kind];
      if (times.data == nullptr) continue;
      found[kind] = to;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && p.batch * count > 64)
      for (int64_t i = 0; i < p.batch * count; ++i) {
        const double seconds = at(times, i) - (relative ? at(p.q_time, i / count * p.groups) : 0.0);
        fill(seconds, times.wide, to + 2 * i * layout.table, layout.table);
      }
      to += 2 * p.batch * count * layout.table;
    }
    turns = {found[0], found[1], found[2]};
  }
  Turns turns;

 private:
  struct Kind {
    Times times;
    int64_t count;
  };
  void fill(double seconds, bool wide, float* to, int64_t length) const {
    const int64_t half = static_cast<int64_t>(rates_.size());
    const float turns = static_cast<float>(2.0 * M_PI) * static_cast<float>(seconds);
    for (int64_t i = 0; i < length; ++i) {
      const double angle = i >= half ? 0.0 : wide ? seconds * rates_[i] : static_cast<double>(turns * single_[i]);
      to[i] = i < half ? static_cast<float>(std::cos(angle)) : 0.0f;
      to[length + i] = i < half ? static_cast<float>(std::sin(angle)) : 0.0f;
    }
  }
  const float* single_;
  std::vector<double> rates_;
  Kind times_[3];
  std::unique_ptr<float[]> room_;
};

template <class Run>
void divide(const ContextAttention& p, int64_t units, int threads, bool backward, const Run& run) {
  const ContextLayout layout(p, backward);
  if (work(p) < kSerial) threads = 1;
  const Tables tables(p, layout, threads);
  const int64_t parts = std::min<int64_t>(threads, units);
  const std::unique_ptr<float[]> room(new float[parts * layout.floats]);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t part = 0; part < parts; ++part)
    run(p, layout, tables.turns, units * part / parts, units * (part + 1) / parts, room.get() + part * layout.floats);
}

}  // namespace

ContextLayout::ContextLayout(const ContextAttention& p, bool backward)
    : table(rounded_up(p.half, kPack)),
      row(rounded_up(p.width, kPack)),
      columns(rounded_up(p.tokens, kPack)),
      own(rounded_up(p.own, kPack)),
      pairs(rounded_up(p.width, 2)),
      row_room(row + kPack),
      scores_room(columns + own),
      floats(0) {
  const auto take = [this](int64_t length, bool wanted) {
    const int64_t at = floats;
    if (wanted) floats += rounded_up(length, kPack);
    return at;
  };
  raw = take(row_room, true);
  queries = take(kMostTogether * row_room, true);
  scores = take(kMostTogether * scores_room, true);
  own_keys = take(p.own * row_room, true);
  own_values = take(p.own * row_room, true);
  keys_across = take(pairs * columns, true);
  values = take(p.tokens * row_room, true);
  keys = take(p.tokens * row_room, backward);
  values_across = take(pairs * columns, backward);
  grads = take(kMostTogether * row_room, backward);
  score_grads = take(kMostTogether * scores_room, backward);
  key_grads = take(p.tokens * row_room, backward);
  value_grads = take(p.tokens * row_room, backward);
  turned_back = take(row_room, backward);
}

void check_context(const ContextAttention& p, bool backward) {
  int64_t elements = 1;
  for (int64_t size : {p.batch, p.queries, p.heads, p.width, p.tokens + p.own}) {
    if (size < 0) refuse(kOp, "sizes must not be negative");
    if (size != 0 && elements > std::numeric_limits<int64_t>::max() / 64 / size) refuse(kOp, "sizes overflow 64 bits");
    elements *= std::max<int64_t>(size, 1);
  }
  if (p.tokens < 1) refuse(kOp, "there must be a context token, got " + std::to_string(p.tokens));
  if (p.own < 0) refuse(kOp, "sizes must not be negative");
  if (p.groups < 1 || p.queries % p.groups) refuse(kOp, "queries must be a multiple of groups, got " + std::to_string(p.queries) + " and " + std::to_string(p.groups));
  if (p.width < 2 || p.width > kMostWidth) refuse(kOp, "a head must have from 2 to " + std::to_string(kMostWidth) + " channels, got " + std::to_string(p.width));
  if (p.half < 1 || 2 * p.half > p.width) refuse(kOp, "from 1 to half of the channels rotate with another one, got " + std::to_string(p.half));
  const bool there = !empty(p);
  check_rows(p.q, "q", there);
  check_rows(p.k, "k", !no_keys(p));
  check_rows(p.v, "v", !no_keys(p));
  check_rows(p.own_k, "own_k", there && p.own > 0);
  check_rows(p.own_v, "own_v", there && p.own > 0);
  check_rows(p.out, backward ? "dq" : "out", there);
  check_times(p.q_time, "q_time", p.batch > 0);
  check_times(p.k_time, "k_time", false);
  check_times(p.own_time, "own_time", there && p.own > 0 && p.k_time.data != nullptr);
  if (p.own_time.data != nullptr && p.k_time.data == nullptr) refuse(kOp, "own_time comes with k_time alone");
  check_address(kOp, p.rates, 4, "rates", true);
  check_address(kOp, p.visible, 8, "visible", false);
  if (p.visible)
    for (int64_t g = 0; g < p.groups; ++g)
      if (p.visible[g] < 1 || p.visible[g] > p.tokens) refuse(kOp, "visible must be from 1 to " + std::to_string(p.tokens) + ", got " + std::to_string(p.visible[g]));
  if (!backward) return;
  check_rows(p.grad, "the incoming gradient", there);
  check_rows(p.dk, "dk", !no_keys(p));
  check_rows(p.dv, "dv", !no_keys(p));
  check_rows(p.d_own_k, "d_own_k", there && p.own > 0);
  check_rows(p.d_own_v, "d_own_v", there && p.own > 0);
}

void context_attention_forward_cpu(const ContextAttention& p, int threads, const char* isa) {
  check_context(p, false);
  const ContextKernels& kernels = DK_TABLE_OF(isa_named(isa), context);
  if (empty(p)) return;
  divide(p, p.batch * ((p.queries + kQueriesAtOnce - 1) / kQueriesAtOnce) * p.heads, threads, false, kernels.forward);
}

void context_attention_backward_cpu(const ContextAttention& p, int threads, const char* isa) {
  check_context(p, true);
  const ContextKernels& kernels = DK_TABLE_OF(isa_named(isa), context);
  if (no_keys(p)) return;  // without queries the keys have a gradient all the same: zero
  divide(p, p.batch * p.heads, threads, true, kernels.backward);
}

}  // namespace deltakern
