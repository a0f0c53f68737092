// Best of N on the CPU: divides a problem into items, runs the row sums of the best instruction set, and orders the candidates.
#include "best_of_n_cpu.h"

#include <algorithm>
#include <memory>

#include "cpu_isa.h"

namespace deltakern {
namespace {

float read(const void* base, DType type, int64_t offset) {
  if (type == DType::float32) return static_cast<const float*>(base)[offset];
  const uint16_t bits = static_cast<const uint16_t*>(base)[offset];
  return type == DType::bfloat16 ? widen_bfloat16(bits) : widen_float16(bits);
}

template <DType Type>
void gather_run(const void* base, int64_t offset, int64_t stride, int64_t n, float* out) {
  if (stride == 1)
    for (int64_t i = 0; i < n; ++i) out[i] = read(base, Type, offset + i);
  else
    for (int64_t i = 0; i < n; ++i) out[i] = read(base, Type, offset + i * stride);
}

// Elements first, ..., first + n - 1 of the row that starts at `offset`, widened
void gather(const void* base, DType type, const Span& span, int64_t offset, int64_t first, int64_t n, float* out) {
  const int last = span.dims - 1;
  while (n > 0) {
    const int64_t run = std::min(n, span.size[last] - first % span.size[last]), from = offset + offset_of(span, first);
    const int64_t stride = span.stride[last];
    if (type == DType::float32) gather_run<DType::float32>(base, from, stride, run, out);
    else if (type == DType::bfloat16) gather_run<DType::bfloat16>(base, from, stride, run, out);
    else gather_run<DType::float16>(base, from, stride, run, out);
    first += run;
    n -= run;
    out += run;
  }
}

struct Worker {
  Worker(const Problem& problem, const CpuKernels& table) : p(problem), kernels(table) {}

  const Problem& p;
  const CpuKernels& kernels;
  alignas(64) float target[kBlock];
  alignas(64) float scratch[kBlock];

  // Sums of block `block` of candidates [start, stop) of one group
  void sum(int64_t group, int64_t block, int64_t start, int64_t stop, float* sums) {
    const int64_t first = block * kBlock, n = std::min(kBlock, p.width - first);
    const int size = p.candidate_type == DType::float32 ? 4 : 2, loss = static_cast<int>(p.loss);
    int64_t candidate, target_start;
    group_offsets(p, group, &candidate, &target_start);
    gather(p.target, p.target_type, p.target_span, target_start, first, n, target);
    const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
    std::fill(target + n, target + padded, 0.0f);
    if (contiguous(p.candidate_span)) {
      const int type = static_cast<int>(p.candidate_type);
      kernels.arrange[type](target, padded);
      const char* rows = static_cast<const char*>(p.candidates) + (candidate + start * p.count_stride + first) * size;
      kernels.sum[type][loss](rows, p.count_stride, stop - start, target, n, p.beta, sums);
      return;
    }
    const int type = static_cast<int>(DType::float32);
    kernels.arrange[type](target, padded);
    for (int64_t i = start; i < stop; ++i) {
      gather(p.candidates, p.candidate_type, p.candidate_span, candidate + i * p.count_stride, first, n, scratch);
      kernels.sum[type][loss](scratch, 0, 1, target, n, p.beta, sums + (i - start));
    }
  }
};

constexpr int64_t kTile = 256;  // most candidates an item takes: its sums live on the stack

}  // namespace

void best_of_n_cpu(const Problem& p, int64_t* index, float* loss, float* losses, int threads, const char* isa) {
  const CpuKernels& kernels = DK_TABLE_OF(isa_named(isa), kernels);
  if (p.groups == 0) return;
  const int64_t blocks = (p.width + kBlock - 1) / kBlock;
  const double elements = static_cast<double>(p.groups) * static_cast<double>(p.count) * static_cast<double>(p.width);
  if (elements < 1 << 15) threads = 1;  // starting a team costs more

  // An item is (group, block, tile of candidates). The tiling follows the threads; what an item computes of a candidate does not.
  const int64_t wanted = threads > 1 ? 8 * static_cast<int64_t>(threads) : 1;
  const int64_t tiles_wanted = (wanted + p.groups * blocks - 1) / (p.groups * blocks);
  const int64_t tile = std::min(kTile, std::max<int64_t>(1, p.count / tiles_wanted));
  const int64_t tiles = (p.count + tile - 1) / tile;
  const int64_t items = p.groups * blocks * tiles;
  const double scale = scale_of(p);

  std::unique_ptr<float[]> partial(blocks > 1 ? new float[p.groups * p.count * blocks] : nullptr);
  std::unique_ptr<Best[]> bests(blocks == 1 && tiles > 1 ? new Best[p.groups * tiles] : nullptr);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Worker worker(p, kernels);
    float sums[kTile];
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t t = item % tiles, block = item / tiles % blocks, group = item / tiles / blocks;
      const int64_t start = t * tile, stop = std::min(p.count, start + tile);
      worker.sum(group, block, start, stop, sums);
      if (blocks > 1) {
        for (int64_t i = start; i < stop; ++i) partial[(group * p.count + i) * blocks + block] = sums[i - start];
        continue;
      }
      Best best{loss_of(sums[0], scale), start};
      for (int64_t i = start; i < stop; ++i) {
        const Best here{loss_of(sums[i - start], scale), i};
        if (losses) losses[group * p.count + i] = here.loss;
        best = better(best, here);
      }
      if (tiles > 1) {
        bests[group * tiles + t] = best;
      } else {
        index[group] = best.index;
        loss[group] = best.loss;
      }
    }
    const int64_t unfinished = blocks > 1 || tiles > 1 ? p.groups : 0;
#pragma omp for schedule(static)
    for (int64_t group = 0; group < unfinished; ++group) {
      Best best;
      if (blocks == 1) {
        best = bests[group * tiles];
        for (int64_t t = 1; t < tiles; ++t) best = better(best, bests[group * tiles + t]);
      } else {
        for (int64_t i = 0; i < p.count; ++i) {
          const float* sum = partial.get() + (group * p.count + i) * blocks;
          double total = 0;
          for (int64_t b = 0; b < blocks; ++b) total += static_cast<double>(sum[b]);
          const Best here{loss_of(total, scale), i};
          if (losses) losses[group * p.count + i] = here.loss;
          best = i ? better(best, here) : here;
        }
      }
      index[group] = best.index;
      loss[group] = best.loss;
    }
  }
}

}  // namespace deltakern
