// Runs simple CUDA C++ on the CPU, for tests: g++ -std=c++17 -x c++ -DDELTAKERN_CUDA_SHIM -include cuda_shim.h kernel.cu
//
// One thread block at a time; every CUDA thread is a fiber that runs until its next barrier or shuffle, then the next one runs.
// shim::order says in which order: a kernel that lacks a barrier gives other results when the order is reversed.
// Barriers and full-warp shuffles are exact. A block whose threads do not all reach a barrier, or a warp whose lanes do not all
// reach a shuffle, ends the process with a message. Not supported: partial masks, matrix instructions, asynchronous copies,
// waiting between blocks. Shared memory is static storage: it keeps what the block before left in it.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)
#define __syncthreads() shim::wait(shim::kAtBarrier)
#define LAUNCH(kernel, grid, block, shared, stream, ...) (static_cast<void>(stream), shim::run(grid, block, [=] { kernel(__VA_ARGS__); }))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;  // threadIdx is set at every switch
typedef int cudaError_t;
typedef void* cudaStream_t;
inline cudaError_t cudaGetLastError() { return 0; }
inline cudaError_t cudaSetDevice(int) { return 0; }

namespace shim {

enum Order { kForward, kBackward, kScattered };
enum State { kRunning, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state;
};

inline int order = kForward;
inline long launches = 0, blocks = 0;
inline std::vector<Fiber> fibers;
inline std::vector<uint64_t> exchanged;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline int current;

inline void wait(State state) {
  const int me = current;
  fibers[me].state = state;
  swapcontext(&fibers[me].context, &scheduler);
}

inline void entry() {
  body();
  wait(kDone);
}

template <class T>
T shuffle(T value, int lane) {
  static_assert(sizeof(T) <= 8, "");
  const int me = current;
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  exchanged[me] = bits;
  wait(kAtShuffle);
  memcpy(&value, &exchanged[me / 32 * 32 + lane % 32], sizeof value);
  wait(kAtShuffle);
  return value;
}

inline int turn(int i, int n) {
  if (order == kForward) return i;
  if (order == kBackward) return n - 1 - i;
  return static_cast<int>((static_cast<int64_t>(i) * 37 + 7) % n);  // a permutation: n is 32 k, k at most 32, and 37 a prime
}

inline void run(dim3 grid, dim3 block, std::function<void()> kernel) {
  const int n = static_cast<int>(block.x * block.y * block.z);
  if (n % 32 || n < 32 || n > 1024) fprintf(stderr, "cuda_shim: a block has 32 to 1024 threads in whole warps, got %d\n", n), abort();
  gridDim = grid;
  blockDim = block;
  body = std::move(kernel);
  if (static_cast<int>(fibers.size()) < n) fibers.resize(n);
  exchanged.resize(n);
  ++launches;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        ++blocks;
        blockIdx = dim3(x, y, z);
        for (int i = 0; i < n; ++i) {
          Fiber& fiber = fibers[i];
          fiber.stack.resize(64 << 10);
          fiber.state = kRunning;
          getcontext(&fiber.context);
          fiber.context.uc_stack.ss_sp = fiber.stack.data();
          fiber.context.uc_stack.ss_size = fiber.stack.size();
          fiber.context.uc_link = nullptr;
          makecontext(&fiber.context, entry, 0);
        }
        for (;;) {
          for (int k = 0; k < n; ++k) {
            const int i = turn(k, n);
            if (fibers[i].state != kRunning) continue;
            current = i;
            threadIdx = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
            swapcontext(&scheduler, &fibers[i].context);
          }
          bool moved = false, alive = false, barrier = true;
          for (int warp = 0; warp < n; warp += 32) {
            int waiting = 0, done = 0;
            for (int i = warp; i < warp + 32; ++i) {
              waiting += fibers[i].state == kAtShuffle;
              done += fibers[i].state == kDone;
              barrier = barrier && fibers[i].state == kAtBarrier;
            }
            alive = alive || done < 32;
            if (waiting < 32) continue;
            moved = true;
            for (int i = warp; i < warp + 32; ++i) fibers[i].state = kRunning;
          }
          if (!alive) break;
          if (!moved && barrier) {
            moved = true;
            for (int i = 0; i < n; ++i) fibers[i].state = kRunning;
          }
          if (!moved) fprintf(stderr, "cuda_shim: deadlock in block %u: not every thread reached the barrier or the shuffle\n", x), abort();
        }
      }
}

}  // namespace shim

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  if (mask != 0xffffffffu) fprintf(stderr, "cuda_shim: only full warps can shuffle\n"), abort();
  return shim::shuffle(value, (shim::current % 32) ^ step);
}
