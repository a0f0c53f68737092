// Best of N on a GPU. One thread block takes one group, one block of the row's elements, and a tile of candidates: the target goes to
// shared memory in float32 once, every warp then sums four candidates at a time with eight 16-byte loads in flight.
// No float atomics: what several thread blocks found is combined by a second kernel in a fixed order.
// With the shim of tests/cuda_shim.h this file builds with g++ as well, and runs on a CPU.
#include "best_of_n_cuda.h"

#include <stdexcept>
#include <string>

#ifdef DELTAKERN_CUDA_SHIM
#define DK_LAUNCH LAUNCH
#define DK_NOINLINE __attribute__((noinline))
#else
#include <cuda_runtime.h>
#define DK_NOINLINE __noinline__
#define DK_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#endif

namespace deltakern {
namespace {

constexpr unsigned kFull = 0xffffffffu;
constexpr int64_t kNone = INT64_MAX;
constexpr int64_t kMaxTile = 1 << 20;  // candidates of a thread block are counted in 32 bits

struct Outputs {
  int64_t* index;
  float* loss;
  float* losses;   // null: not asked for
  float* partial;  // (groups, count, blocks) sums, where blocks > 1
  Best* bests;     // (groups, tiles), where several thread blocks share a group
};

struct alignas(16) Chunk {
  uint32_t word[4];
};

__device__ __forceinline__ Best nobody() { return Best{from_bits(0x7fc00000u), kNone}; }

template <DType Type>
__device__ __forceinline__ float widen(uint16_t bits) {
  if constexpr (Type == DType::bfloat16) return widen_bfloat16(bits);
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  return widen_float16(bits);
#endif
}

__device__ __forceinline__ float read(const void* base, DType type, int64_t offset) {
  if (type == DType::float32) return static_cast<const float*>(base)[offset];
  const uint16_t bits = static_cast<const uint16_t*>(base)[offset];
  return type == DType::bfloat16 ? widen<DType::bfloat16>(bits) : widen<DType::float16>(bits);
}

// Formulas chosen while compiling (contiguous rows), or at run time (every other layout)
template <Loss L>
struct Fixed {
  static constexpr int kAtOnce = L == Loss::log_cosh ? 1 : 2;  // steps whose loads are in flight together
  __device__ static float add(const Problem&, float sum, float difference, float beta) { return add_value<L, float>(sum, difference, beta); }
};
struct Chosen {
  static constexpr int kAtOnce = 1;
  __device__ DK_NOINLINE static float add(const Problem& p, float sum, float difference, float beta) {
    switch (p.loss) {
      case Loss::smooth_l1: return add_value<Loss::smooth_l1, float>(sum, difference, beta);
      case Loss::log_cosh: return add_value<Loss::log_cosh, float>(sum, difference, beta);
      case Loss::mse: return add_value<Loss::mse, float>(sum, difference, beta);
      default: return add_value<Loss::l1, float>(sum, difference, beta);
    }
  }
};

// Rows whose elements are contiguous and whose addresses are multiples of 16. A piece is 16 bytes of a row; a lane's row begins at its
// first piece of the block.
template <DType Type>
struct Vectors {
  static constexpr int kPiece = Type == DType::float32 ? 4 : 8;
  static constexpr int kSize = Type == DType::float32 ? 4 : 2;
  static constexpr int kResident = 2;  // thread blocks of a multiprocessor that the registers must suffice for
  using Piece = Chunk;
  using Row = const char*;

  __device__ static Row row(const Problem& p, int64_t offset, int64_t first) {
    return static_cast<const char*>(p.candidates) + (offset + first) * kSize;
  }

  __device__ static Piece load(const Problem&, Row row, int64_t, int at) {
    const char* from = row + at * kSize;
#ifdef __CUDA_ARCH__
    const uint4 four = __ldcs(reinterpret_cast<const uint4*>(from));  // read once: first to leave the cache
    return Chunk{{four.x, four.y, four.z, four.w}};
#else
    Chunk chunk;
    memcpy(&chunk, __builtin_assume_aligned(from, 16), sizeof chunk);
    return chunk;
#endif
  }

  // The piece of which only the elements before n are in the row; zeros elsewhere
  __device__ static Piece load_part(const Problem&, Row row, int64_t, int at, int n) {
    Piece piece{};
    const char* from = row + at * kSize;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      if (at + j >= n) continue;
      if constexpr (kSize == 4) {
        piece.word[j] = reinterpret_cast<const uint32_t*>(from)[j];
      } else {
        piece.word[j / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(from)[j]) << (j % 2 * 16);
      }
    }
    return piece;
  }

  __device__ static float element(const Piece& piece, int j) {
    if constexpr (Type == DType::float32) {
      return from_bits(piece.word[j]);
    } else if constexpr (Type == DType::bfloat16) {
      const uint32_t word = piece.word[j / 2];
      return from_bits(j % 2 ? word & 0xffff0000u : word << 16);
    } else {
      return widen<Type>(static_cast<uint16_t>(piece.word[j / 2] >> (j % 2 * 16)));
    }
  }
};

__device__ DK_NOINLINE float read_element(const Problem& p, int64_t row, int64_t i) {
  return read(p.candidates, p.candidate_type, row + offset_of(p.candidate_span, i));
}

// Any strides and any alignment, element by element. The order of summation is that of Vectors.
template <int Size>
struct Elements {
  static constexpr int kPiece = 16 / Size;
  static constexpr int kResident = 1;
  struct Piece {
    float element[kPiece];
  };
  using Row = int64_t;

  __device__ static Row row(const Problem&, int64_t offset, int64_t) { return offset; }

  __device__ static Piece load_part(const Problem& p, Row row, int64_t first, int at, int n) {
    Piece piece{};
#pragma unroll
    for (int j = 0; j < kPiece; ++j)
      if (at + j < n) piece.element[j] = read_element(p, row, first + at + j);
    return piece;
  }

  __device__ static Piece load(const Problem& p, Row row, int64_t first, int at) { return load_part(p, row, first, at, at + kPiece); }

  __device__ static float element(const Piece& piece, int j) { return piece.element[j]; }
};

__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
  for (int step = 16; step >= 1; step /= 2) {
    const Best other{__shfl_xor_sync(kFull, best.loss, step), __shfl_xor_sync(kFull, best.index, step)};
    best = better(best, other);
  }
  return best;
}

// The best of all threads, in thread 0. `before` is a total order: the shape of this tree does not show in the result.
__device__ __forceinline__ Best block_best(Best best) {
  __shared__ Best of_warp[kMaxWarps];
  best = warp_best(best);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x < 32) best = warp_best(threadIdx.x < blockDim.x / 32 ? of_warp[threadIdx.x] : nobody());
  __syncthreads();
  return best;
}

// Four sums a lane to four sums a warp in six shuffles: lanes 0-7, 8-15, 16-23, 24-31 end with the total of candidate 0, 1, 2, 3.
// Whichever of the four a candidate is, its 32 values are folded by halves: 16 apart, 8, 4, 2, 1.
__device__ __forceinline__ float fold_four(const float (&sum)[kWarpRows], int lane) {
  const bool high = lane & 16, odd = lane & 8;
  const float a = (high ? sum[2] : sum[0]) + __shfl_xor_sync(kFull, high ? sum[0] : sum[2], 16);
  const float b = (high ? sum[3] : sum[1]) + __shfl_xor_sync(kFull, high ? sum[1] : sum[3], 16);
  float c = (odd ? b : a) + __shfl_xor_sync(kFull, odd ? a : b, 8);
  c += __shfl_xor_sync(kFull, c, 4);
  c += __shfl_xor_sync(kFull, c, 2);
  c += __shfl_xor_sync(kFull, c, 1);
  return c;
}

// Adds `Steps` consecutive steps of four rows to the lane's sums. All loads come first.
template <class Rows, class Formula, int Steps>
__device__ __forceinline__ void add_steps(const Problem& p, const typename Rows::Row (&row)[kWarpRows], int64_t first, int at, int n,
                                          const float* target, float beta, float (&sum)[kWarpRows]) {
  constexpr int kPiece = Rows::kPiece, kStep = 32 * kPiece;
  typename Rows::Piece piece[Steps][kWarpRows];
#pragma unroll
  for (int s = 0; s < Steps; ++s)
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r)
      piece[s][r] = n ? Rows::load_part(p, row[r], first, at + s * kStep, n) : Rows::load(p, row[r], first, at + s * kStep);
#pragma unroll
  for (int s = 0; s < Steps; ++s)
#pragma unroll
    for (int q = 0; q < kPiece / 4; ++q) {
      const float4 t = *reinterpret_cast<const float4*>(target + s * kStep + q * 128);
      const float wanted[4] = {t.x, t.y, t.z, t.w};
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[r] = Formula::add(p, sum[r], Rows::element(piece[s][r], q * 4 + j) - wanted[j], beta);
    }
}

template <class Rows, class Formula>
__global__ void __launch_bounds__(kMaxWarps * 32, Rows::kResident)
    best_rows(const __grid_constant__ Problem p, const CudaPlan plan, const Outputs out, const double scale, const int64_t first_item) {
  constexpr int kPiece = Rows::kPiece, kStep = 32 * kPiece;
  alignas(16) __shared__ float target[kCudaBlock];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t item = first_item + blockIdx.x;
  const int64_t tile = item % plan.tiles, block = item / plan.tiles % plan.blocks, group = item / plan.tiles / plan.blocks;
  const int64_t start = tile * plan.tile, first = block * kCudaBlock;
  const int rows = static_cast<int>(p.count - start < plan.tile ? p.count - start : plan.tile);
  const int n = static_cast<int>(p.width - first < kCudaBlock ? p.width - first : kCudaBlock);
  const int whole = n - n % kStep;
  int64_t candidate, target_row;
  group_offsets(p, group, &candidate, &target_row);
  candidate += start * p.count_stride;

  // Element e of a step belongs to lane e / kPiece; its pieces of four floats lie side by side over the lanes, so that reads of 16
  // bytes touch every bank once.
  for (int i = threadIdx.x; i < (whole < n ? whole + kStep : n); i += blockDim.x) {
    const int within = i % kStep, j = within % kPiece;
    const int place = i - within + j / 4 * 128 + within / kPiece * 4 + j % 4;
    target[place] = i < n ? read(p.target, p.target_type, target_row + offset_of(p.target_span, first + i)) : 0.0f;
  }
  __syncthreads();

  float best_loss = from_bits(0x7fc00000u);
  int best_at = INT32_MAX;
  for (int i = warp * kWarpRows; i < rows; i += warps * kWarpRows) {
    typename Rows::Row row[kWarpRows];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) row[r] = Rows::row(p, candidate + (i + r < rows ? i + r : rows - 1) * p.count_stride, first);
    float sum[kWarpRows] = {};
    int at = 0;
#pragma unroll 1
    for (; at + Formula::kAtOnce * kStep <= whole; at += Formula::kAtOnce * kStep)
      add_steps<Rows, Formula, Formula::kAtOnce>(p, row, first, at + lane * kPiece, 0, target + at + lane * 4, p.beta, sum);
    if (Formula::kAtOnce > 1 && at < whole) {
      add_steps<Rows, Formula, 1>(p, row, first, at + lane * kPiece, 0, target + at + lane * 4, p.beta, sum);
      at += kStep;
    }
    if (at < n) add_steps<Rows, Formula, 1>(p, row, first, at + lane * kPiece, n, target + at + lane * 4, p.beta, sum);
    const float total = fold_four(sum, lane);
    const int mine = i + lane / 8;
    if (lane % 8 == 0 && mine < rows) {
      const int64_t at_row = group * p.count + start + mine;
      if (plan.blocks > 1) {
        out.partial[at_row * plan.blocks + block] = total;
      } else {
        const float here = loss_of(total, scale);
        if (out.losses) out.losses[at_row] = here;
        if (before(Best{here, mine}, Best{best_loss, best_at})) {
          best_loss = here;
          best_at = mine;
        }
      }
    }
  }
  if (plan.blocks > 1) return;
  const Best best = block_best(best_at == INT32_MAX ? nobody() : Best{best_loss, start + best_at});
  if (threadIdx.x == 0) {
    if (plan.tiles == 1) {
      out.index[group] = best.index;
      out.loss[group] = best.loss;
    } else {
      out.bests[group * plan.tiles + tile] = best;
    }
  }
}

// Adds the blocks' sums: a warp a candidate
__global__ void __launch_bounds__(kMaxWarps * 32) best_totals(const Problem p, const CudaPlan plan, const Outputs out, const double scale) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int64_t item = blockIdx.x; item < p.groups * plan.total_tiles; item += gridDim.x) {
    const int64_t tile = item % plan.total_tiles, group = item / plan.total_tiles;
    const int64_t start = tile * plan.total_tile, stop = start + plan.total_tile < p.count ? start + plan.total_tile : p.count;
    Best best = nobody();
    for (int64_t row = start + warp; row < stop; row += warps) {
      const float* sums = out.partial + (group * p.count + row) * plan.blocks;
      double total = 0;
      for (int64_t b = lane; b < plan.blocks; b += 32) total += static_cast<double>(sums[b]);
#pragma unroll
      for (int step = 16; step >= 1; step /= 2) total += __shfl_xor_sync(kFull, total, step);
      const Best here{loss_of(total, scale), row};
      if (lane == 0 && out.losses) out.losses[group * p.count + row] = here.loss;
      best = better(best, here);
    }
    best = block_best(best);
    if (threadIdx.x == 0) {
      if (plan.total_tiles == 1) {
        out.index[group] = best.index;
        out.loss[group] = best.loss;
      } else {
        out.bests[group * plan.total_tiles + tile] = best;
      }
    }
  }
}

// The best of every group's tiles: a warp a group
__global__ void __launch_bounds__(kMaxWarps * 32) best_tiles(const int64_t groups, const int64_t tiles, const Outputs out) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int64_t group = static_cast<int64_t>(blockIdx.x) * warps + threadIdx.x / 32; group < groups;
       group += static_cast<int64_t>(gridDim.x) * warps) {
    Best best = nobody();
    for (int64_t t = lane; t < tiles; t += 32) best = better(best, out.bests[group * tiles + t]);
    best = warp_best(best);
    if (lane == 0) {
      out.index[group] = best.index;
      out.loss[group] = best.loss;
    }
  }
}

void check(cudaError_t status, const char* what) {
#ifdef DELTAKERN_CUDA_SHIM
  (void)what;
  if (status) throw std::runtime_error("shim");
#else
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("best_of_n: ") + what + ": CUDA error " + std::to_string(status) + ": " + cudaGetErrorString(status));
#endif
}

template <class Rows, class Formula>
void launch_rows(const Problem& p, const CudaPlan& plan, const Outputs& out, double scale, int64_t max_grid, cudaStream_t stream) {
  const int64_t items = p.groups * plan.blocks * plan.tiles;
  for (int64_t first = 0; first < items; first += max_grid) {
    const unsigned grid = static_cast<unsigned>(items - first < max_grid ? items - first : max_grid);
    DK_LAUNCH((best_rows<Rows, Formula>), grid, plan.warps * 32, 0, stream, p, plan, out, scale, first);
  }
}

template <DType Type>
void launch_vectors(const Problem& p, const CudaPlan& plan, const Outputs& out, double scale, int64_t max_grid, cudaStream_t stream) {
  switch (p.loss) {
    case Loss::smooth_l1: return launch_rows<Vectors<Type>, Fixed<Loss::smooth_l1>>(p, plan, out, scale, max_grid, stream);
    case Loss::log_cosh: return launch_rows<Vectors<Type>, Fixed<Loss::log_cosh>>(p, plan, out, scale, max_grid, stream);
    case Loss::mse: return launch_rows<Vectors<Type>, Fixed<Loss::mse>>(p, plan, out, scale, max_grid, stream);
    default: return launch_rows<Vectors<Type>, Fixed<Loss::l1>>(p, plan, out, scale, max_grid, stream);
  }
}

// Whether every row starts at a multiple of 16 bytes and is contiguous
bool vectors_fit(const Problem& p) {
  const int64_t size = p.candidate_type == DType::float32 ? 4 : 2;
  bool fit = contiguous(p.candidate_span) && reinterpret_cast<uintptr_t>(p.candidates) % 16 == 0;
  if (p.count > 1) fit = fit && p.count_stride * size % 16 == 0;
  for (int d = 0; d < p.batch_dims; ++d) fit = fit && p.batch_candidate[d] * size % 16 == 0;
  return fit;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t at_least_one(int64_t a) { return a < 1 ? 1 : a; }

}  // namespace

CudaPlan cuda_plan(int64_t groups, int64_t count, int64_t width, int multiprocessors) {
  if (groups < 0 || count < 1 || width < 1 || multiprocessors < 1) throw std::invalid_argument("best_of_n: sizes must be positive");
  CudaPlan plan{};
  plan.blocks = ceil_div(width, kCudaBlock);
  // A group's row blocks are split over several thread blocks only where there are fewer than 1.5 of them for every multiprocessor: all
  // are then resident at once and share the memory's bandwidth evenly, and a single kernel suffices.
  const int64_t whole = at_least_one(groups * plan.blocks), wanted = multiprocessors + multiprocessors / 2;
  const int64_t tiles = at_least_one(ceil_div(wanted, whole));
  plan.tile = ceil_div(ceil_div(count, tiles), kWarpRows) * kWarpRows;
  if (plan.tile > kMaxTile) plan.tile = kMaxTile;
  plan.tiles = ceil_div(count, plan.tile);
  const int64_t quads = plan.tile / kWarpRows, passes = ceil_div(quads, kMaxWarps);
  plan.warps = static_cast<int>(ceil_div(quads, passes));
  plan.total_tile = 16 * kMaxWarps;
  plan.total_tiles = ceil_div(count, plan.total_tile);
  const int64_t bests = plan.blocks > 1 ? (plan.total_tiles > 1 ? plan.total_tiles : 0) : (plan.tiles > 1 ? plan.tiles : 0);
  const int64_t partial = plan.blocks > 1 ? count * plan.blocks : 0;
  plan.workspace = groups * bests * static_cast<int64_t>(sizeof(Best)) + groups * partial * static_cast<int64_t>(sizeof(float));
  return plan;
}

void best_of_n_cuda(const Problem& p, int64_t* index, float* loss, float* losses, void* workspace, int64_t workspace_bytes, int device,
                    int multiprocessors, void* stream_handle, int64_t max_grid) {
  const CudaPlan plan = cuda_plan(p.groups, p.count, p.width, multiprocessors);
  if (workspace_bytes < plan.workspace || (plan.workspace && !workspace)) throw std::invalid_argument("best_of_n: the workspace is too small");
  if (reinterpret_cast<uintptr_t>(workspace) % 16) throw std::invalid_argument("best_of_n: the workspace must be aligned to 16 bytes");
  if (p.groups == 0) return;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const double scale = scale_of(p);
  const int64_t tiles = plan.blocks > 1 ? plan.total_tiles : plan.tiles;
  Best* bests = static_cast<Best*>(workspace);
  Outputs out{index, loss, losses, reinterpret_cast<float*>(bests + (tiles > 1 ? p.groups * tiles : 0)), bests};
  check(cudaSetDevice(device), "cudaSetDevice");

  if (!vectors_fit(p)) {
    if (p.candidate_type == DType::float32) launch_rows<Elements<4>, Chosen>(p, plan, out, scale, max_grid, stream);
    else launch_rows<Elements<2>, Chosen>(p, plan, out, scale, max_grid, stream);
  } else if (p.candidate_type == DType::float32) {
    launch_vectors<DType::float32>(p, plan, out, scale, max_grid, stream);
  } else if (p.candidate_type == DType::bfloat16) {
    launch_vectors<DType::bfloat16>(p, plan, out, scale, max_grid, stream);
  } else {
    launch_vectors<DType::float16>(p, plan, out, scale, max_grid, stream);
  }
  check(cudaGetLastError(), "launch of best_rows");

  if (plan.blocks > 1) {
    const int64_t items = p.groups * plan.total_tiles;
    DK_LAUNCH(best_totals, static_cast<unsigned>(items < max_grid ? items : max_grid), kMaxWarps * 32, 0, stream, p, plan, out, scale);
    check(cudaGetLastError(), "launch of best_totals");
  }
  if (tiles > 1) {
    const int64_t grid = ceil_div(p.groups, 8);
    DK_LAUNCH(best_tiles, static_cast<unsigned>(grid < max_grid ? grid : max_grid), 8 * 32, 0, stream, p.groups, tiles, out);
    check(cudaGetLastError(), "launch of best_tiles");
  }
}

}  // namespace deltakern
