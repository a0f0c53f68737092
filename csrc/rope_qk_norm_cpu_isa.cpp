// rope_qk_norm on the CPU: rows. Compiled once for every instruction set with that set's flags (setup.py), each time into its own
// table: DELTAKERN_TABLE is that table's name. Nothing here may be inline with external linkage; see numbers.h.
#include "cpu_packs.h"
#include "rope_qk_norm.h"

#ifndef DELTAKERN_TABLE
#define DELTAKERN_TABLE rope_baseline
#endif

namespace deltakern {
namespace {

constexpr int kMostPacks = kMostChannels / 2 / kLanes;

// Half a row is `half` elements in packs; of the last one maybe a part, whose other lanes are 0. N: half == N * kLanes, known
// when this is compiled; or 0.
template <int N>
constexpr int kRoom = N ? N : kMostPacks;
template <int N>
DK_INLINE int packs(int64_t half) {
  return N ? N : static_cast<int>((half + kLanes - 1) / kLanes);
}
template <int N>
DK_INLINE int64_t lanes(int i, int64_t half) {
  return N || (i + 1) * kLanes <= half ? kLanes : half - i * kLanes;
}
#define DK_PACKS for (int i = 0; i < packs<N>(half); ++i)

template <class T, int N>
DK_INLINE Pack get(const void* base, int i, int64_t half) {
  const char* from = static_cast<const char*>(base) + i * kLanes * kSize<T>;
  const int64_t n = lanes<N>(i, half);
  if (n == kLanes) return read<T>(from);
  char padded[kLanes * kSize<T>] = {};
  memcpy(padded, from, n * kSize<T>);
  return read<T>(padded);
}
template <class T, int N>
DK_INLINE void put(void* base, int i, int64_t half, const Pack& a) {
  char* to = static_cast<char*>(base) + i * kLanes * kSize<T>;
  const int64_t n = lanes<N>(i, half);
  if (n == kLanes) return write<T>(to, a);
  char padded[kLanes * kSize<T>];
  write<T>(padded, a);
  memcpy(to, padded, n * kSize<T>);
}

// A row: its first and its last channels, which rotate into each other
template <int N>
struct Row {
  Pack a[kRoom<N>], b[kRoom<N>];
};

template <class T, int N>
DK_INLINE void get_row(Row<N>& row, const void* base, int64_t half) {
  DK_PACKS {
    row.a[i] = get<T, N>(base, i, half);
    row.b[i] = get<T, N>(static_cast<const char*>(base) + half * kSize<T>, i, half);
  }
}
template <class T, int N>
DK_INLINE void put_row(const Row<N>& row, void* base, int64_t half) {
  DK_PACKS {
    put<T, N>(base, i, half, row.a[i]);
    put<T, N>(static_cast<char*>(base) + half * kSize<T>, i, half, row.b[i]);
  }
}
template <int N>
DK_INLINE void multiply(Row<N>& x, const Row<N>& by, int64_t half) {
  DK_PACKS {
    x.a[i] = x.a[i] * by.a[i];
    x.b[i] = x.b[i] * by.b[i];
  }
}
template <int N>
DK_INLINE void rotate(Row<N>& x, const Row<N>& cos, const Row<N>& sin, int64_t half) {
  DK_PACKS {
    const Pack a = x.a[i], b = x.b[i];
    x.a[i] = take_product(a * cos.a[i], b, sin.a[i]);
    x.b[i] = add_product(b * cos.b[i], a, sin.b[i]);
  }
}
// The transpose of `rotate`
template <int N>
DK_INLINE void rotate_back(Row<N>& g, const Row<N>& cos, const Row<N>& sin, int64_t half) {
  DK_PACKS {
    const Pack a = g.a[i], b = g.b[i];
    g.a[i] = add_product(a * cos.a[i], b, sin.b[i]);
    g.b[i] = take_product(b * cos.b[i], a, sin.a[i]);
  }
}
template <int N>
DK_INLINE float mean(const Row<N>& x, int64_t half) {
  Pack sum = filled(0.0f);
  DK_PACKS sum = sum + (x.a[i] + x.b[i]);
  return total(sum) / static_cast<float>(2 * half);
}
template <int N>
DK_INLINE float mean_product(const Row<N>& x, const Row<N>& y, int64_t half) {
  Pack sum = filled(0.0f);
  DK_PACKS sum = add_product(add_product(sum, x.a[i], y.a[i]), x.b[i], y.b[i]);
  return total(sum) / static_cast<float>(2 * half);
}
// The row less its mean over its deviation; returns the reciprocal deviation. Two passes over registers.
template <int N>
DK_INLINE float standardise(Row<N>& x, int64_t half, float eps) {
  const Pack middle = filled(mean(x, half));
  DK_PACKS {
    x.a[i] = only(x.a[i] - middle, lanes<N>(i, half));
    x.b[i] = only(x.b[i] - middle, lanes<N>(i, half));
  }
  const float scale = 1.0f / __builtin_sqrtf(mean_product(x, x, half) + eps);
  DK_PACKS {
    x.a[i] = x.a[i] * filled(scale);
    x.b[i] = x.b[i] * filled(scale);
  }
  return scale;
}

// What turns or scales nothing
constexpr struct Still {
  float one[kMostChannels], zero[kMostChannels];
  constexpr Still() : one(), zero() {
    for (float& x : one) x = 1.0f;
  }
} kStill;

struct Place {
  int64_t batch, token;
  const float *cos, *sin;  // of this token
};

DK_INLINE char* at(const void* base, const int64_t (&stride)[3], const Place& place, int64_t size) {
  return static_cast<char*>(const_cast<void*>(base)) + (place.batch * stride[0] + place.token * stride[1]) * size;
}

template <class T, int N>
void forward_heads(const Rope& r, const RopeSide& side, const Place& place, float*) {
  const int64_t half = N ? N * kLanes : r.width / 2;
  const bool norm = side.weight != nullptr, first = r.norm_first;
  Row<N> cos, sin, weight, x;
  get_row<Float32, N>(cos, place.cos, half);
  get_row<Float32, N>(sin, place.sin, half);
  get_row<Float32, N>(weight, norm ? side.weight : kStill.one, half);
  const char* from = at(side.x, side.x_stride, place, kSize<T>);
  char* to = at(side.out, side.out_stride, place, kSize<T>);
  for (int64_t head = 0; head < r.heads; ++head) {
    get_row<T, N>(x, from + head * side.x_stride[2] * kSize<T>, half);
    if (norm && first) {
      standardise<N>(x, half, r.eps);
      multiply<N>(x, weight, half);
    }
    rotate<N>(x, cos, sin, half);
    if (norm && !first) {
      standardise<N>(x, half, r.eps);
      multiply<N>(x, weight, half);
    }
    put_row<T, N>(x, to + head * side.out_stride[2] * kSize<T>, half);
  }
}

// Adds to `sums`, (width), what this token's rows add to the weight's gradient
template <class T, int N>
void backward_heads(const Rope& r, const RopeSide& side, const Place& place, float* sums) {
  const int64_t half = N ? N * kLanes : r.width / 2;
  const bool norm = side.weight != nullptr, first = r.norm_first;
  Row<N> cos, sin, weight, x, g, sum;
  get_row<Float32, N>(cos, place.cos, half);
  get_row<Float32, N>(sin, place.sin, half);
  get_row<Float32, N>(weight, norm ? side.weight : kStill.one, half);
  get_row<Float32, N>(sum, sums, half);
  const char* from = at(side.x, side.x_stride, place, kSize<T>);
  const char* grad = at(side.grad, side.grad_stride, place, kSize<T>);
  char* to = at(side.out, side.out_stride, place, kSize<T>);
  for (int64_t head = 0; head < r.heads; ++head) {
    get_row<T, N>(g, grad + head * side.grad_stride[2] * kSize<T>, half);
    if (first || !norm) rotate_back<N>(g, cos, sin, half);
    if (norm) {
      get_row<T, N>(x, from + head * side.x_stride[2] * kSize<T>, half);
      if (!first) rotate<N>(x, cos, sin, half);
      const Pack scale = filled(standardise<N>(x, half, r.eps));
      DK_PACKS {
        sum.a[i] = add_product(sum.a[i], g.a[i], x.a[i]);
        sum.b[i] = add_product(sum.b[i], g.b[i], x.b[i]);
      }
      multiply<N>(g, weight, half);
      const Pack middle = filled(mean<N>(g, half)), along = filled(mean_product<N>(g, x, half));
      DK_PACKS {
        g.a[i] = take_product(g.a[i] - middle, x.a[i], along) * scale;
        g.b[i] = take_product(g.b[i] - middle, x.b[i], along) * scale;
      }
      if (!first) rotate_back<N>(g, cos, sin, half);
    }
    put_row<T, N>(g, to + head * side.out_stride[2] * kSize<T>, half);
  }
  put_row<Float32, N>(sum, sums, half);
}

using Heads = void (*)(const Rope&, const RopeSide&, const Place&, float*);

// Tokens [first, last) of both sides, by functions for [DType][half is two packs: the models' 64 channels]
DK_INLINE void walk(const Rope& r, int64_t first, int64_t last, const Heads (&heads)[3][2], float* sums) {
  const int whole = r.width == 4 * kLanes;
  for (int64_t t = first; t < last; ++t) {
    const int64_t batch = t / r.length, token = t - batch * r.length, row = (token - r.prefix) % r.period;
    const bool turns = token >= r.prefix;
    const Place place{batch, token, turns ? r.cos + row * r.cos_stride : kStill.one, turns ? r.sin + row * r.sin_stride : kStill.zero};
    for (int i = 0; i < 2; ++i)
      if (r.side[i].x) heads[static_cast<int>(r.side[i].type)][whole](r, r.side[i], place, sums ? sums + i * r.width : nullptr);
  }
}

void forward(const Rope& r, int64_t first, int64_t last) {
  static constexpr Heads heads[3][2] = {{forward_heads<Float32, 0>, forward_heads<Float32, 2>},
                                        {forward_heads<Bfloat16, 0>, forward_heads<Bfloat16, 2>},
                                        {forward_heads<Float16, 0>, forward_heads<Float16, 2>}};
  walk(r, first, last, heads, nullptr);
}
void backward(const Rope& r, int64_t first, int64_t last, float* sums) {
  static constexpr Heads heads[3][2] = {{backward_heads<Float32, 0>, backward_heads<Float32, 2>},
                                        {backward_heads<Bfloat16, 0>, backward_heads<Bfloat16, 2>},
                                        {backward_heads<Float16, 0>, backward_heads<Float16, 2>}};
  walk(r, first, last, heads, sums);
}

}  // namespace

extern const RopeKernels DELTAKERN_TABLE;
const RopeKernels DELTAKERN_TABLE = {forward, backward};

}  // namespace deltakern
