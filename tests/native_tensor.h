// Random tensors for the programs that compare kernels with plain loops: memory that ends where the last element does.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../csrc/cpu_isa.h"
#include "../csrc/numbers.h"

namespace {

using deltakern::DType;

std::mt19937 generator(1);
int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(generator); }

struct Tensor {
  std::vector<int64_t> stride;  // of all dimensions but the last, whose elements lie side by side
  int64_t elements = 0;
  DType type = DType::float32;
  std::unique_ptr<char[]> storage;

  // The dimensions between the first and the last in some order, with gaps or without
  Tensor(const std::vector<int64_t>& size, DType t, bool dense) : stride(size.size() - 1), type(t) {
    const int outer = static_cast<int>(stride.size());
    int64_t step = size.back() + (dense ? 0 : below(5));
    const bool swapped = !dense && below(2);
    for (int d = outer - 1; d >= 0; --d) {
      const int at = swapped && d > 0 ? outer - d : d;
      stride[at] = step;
      step *= size[at];
    }
    elements = size.back();
    for (int d = 0; d < outer; ++d) elements += (size[d] - 1) * stride[d];
    storage.reset(new char[elements * bytes()]);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < elements; ++i) {
      const float value = normal(generator);
      uint32_t bits;
      memcpy(&bits, &value, 4);
      if (type == DType::float32) memcpy(storage.get() + 4 * i, &value, 4);
      const uint16_t half = type == DType::bfloat16 ? static_cast<uint16_t>(bits >> 16) : deltakern::narrow_float16(value);
      if (type != DType::float32) memcpy(storage.get() + 2 * i, &half, 2);
    }
  }
  int64_t bytes() const { return type == DType::float32 ? 4 : 2; }
  template <class... Index>
  int64_t place(Index... index) const {
    int64_t at = 0;
    int d = 0;
    for (int64_t i : {static_cast<int64_t>(index)...}) at += i * stride[d++];
    return at;
  }
  double operator[](int64_t i) const {
    if (type == DType::float32) return reinterpret_cast<const float*>(storage.get())[i];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(storage.get())[i];
    return type == DType::bfloat16 ? deltakern::widen_bfloat16(bits) : deltakern::widen_float16(bits);
  }
};

bool close(double value, double truth, DType type, double scale) {
  const double eps = type == DType::float32 ? 4e-5 : type == DType::bfloat16 ? 8e-3 : 1e-3;
  return std::fabs(value - truth) <= eps * (std::fabs(truth) + scale);
}

int failed(const char* what, int trial, const std::string& isa) {
  fprintf(stderr, "trial %d, %s: %s\n", trial, isa.c_str(), what);
  return 1;
}

// A program's main: as many problems as its argument says, each of which returns 0 where all is right
int run(int argc, char** argv, int (*try_one)(int trial)) {
  const int trials = argc > 1 ? atoi(argv[1]) : 100;
  for (int trial = 0; trial < trials; ++trial)
    if (try_one(trial)) return 1;
  printf("%d problems, all as plain loops in double; instruction sets: %s\n", trials, deltakern::cpu_instruction_sets());
  return 0;
}

}  // namespace
