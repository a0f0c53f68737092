// The CUDA kernels' interface.
#pragma once

#include "best_of_n.h"

namespace deltakern {

// A row is summed in blocks of kCudaBlock elements by one warp: lane l takes the 16-byte pieces l, l + 32, ... of a block in order, the
// 32 sums are folded in halves; a row of several blocks adds their sums in float64, likewise by one warp. This depends on the row's
// width and on the element's size: not on strides, the number of candidates or groups, or the device.
constexpr int kCudaBlock = 2048;
constexpr int kWarpRows = 4;  // candidates that a warp sums at once, so that as many loads are in flight
constexpr int kMaxWarps = 10;  // of a thread block: two of them leave 96 registers a thread, which suffice without spills

// How a problem is spread over a device. Only speed depends on it.
struct CudaPlan {
  int64_t blocks;  // of a row
  int64_t tile;    // candidates that one thread block takes
  int64_t tiles;
  int warps;            // of a thread block
  int64_t total_tile;   // the same, for the kernel that adds the blocks' sums (blocks > 1)
  int64_t total_tiles;
  int64_t workspace;  // bytes
};

CudaPlan cuda_plan(int64_t groups, int64_t count, int64_t width, int multiprocessors);

// Enqueues on `stream` (a cudaStream_t) and returns without waiting; allocates nothing, so that it can be captured in a graph.
// index and loss have p.groups elements; losses, unless null, p.groups * p.count; workspace has cuda_plan(...).workspace bytes,
// aligned to 16. Throws std::invalid_argument, and std::runtime_error with CUDA's own words.
void best_of_n_cuda(const Problem& p, int64_t* index, float* loss, float* losses, void* workspace, int64_t workspace_bytes, int device,
                    int multiprocessors, void* stream, int64_t max_grid = 2147483647);

}  // namespace deltakern
