// The CPU kernels' interface: one table of functions for every instruction set that was compiled.
#pragma once

#include "best_of_n.h"

namespace deltakern {

// A row is summed in blocks of kBlock elements. Within a block element i goes to lane i % kLanes, every lane adds in order, and the
// lanes are folded in halves; the blocks' sums are added in float64, in order. This depends on the row's width alone: not on
// strides, dtype, threads, the tiling, or the instruction set (but without FMA every addition of a product rounds twice).
constexpr int64_t kBlock = 1024;
constexpr int kLanes = 64;

// Sums of `value` over n <= kBlock elements of `rows` rows that start `row_stride` elements apart, against one target block.
using SumRows = void (*)(const void* rows_start, int64_t row_stride, int64_t rows, const float* target, int64_t n, float beta, float* sums);

struct CpuKernels {
  SumRows sum[3][4];                             // [DType][Loss]
  void (*arrange[3])(float* target, int64_t n);  // [DType]: puts a target, padded to n % kLanes == 0, in the order that sum reads
};

extern const CpuKernels kernels_baseline;
extern const CpuKernels kernels_avx2;
extern const CpuKernels kernels_avx512;

// index and loss have p.groups elements; losses, unless null, p.groups * p.count. `isa` is a name of cpu_isa.h.
// Throws std::invalid_argument for an unknown isa, std::bad_alloc.
void best_of_n_cpu(const Problem& p, int64_t* index, float* loss, float* losses, int threads, const char* isa);

}  // namespace deltakern
