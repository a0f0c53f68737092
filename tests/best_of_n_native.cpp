// The C++ of best_of_n without Python: the CUDA source run by cuda_shim.h for tests/test_best_of_n_cuda_source.py, and a program that
// compares every kernel with plain loops in double, for AddressSanitizer and valgrind (tests/test_extension_sanitizers.py).
#include <cmath>
#include <memory>
#include <random>

#include "../csrc/best_of_n_cpu.h"
#include "../csrc/best_of_n_cuda.h"
#include "../csrc/best_of_n_problem.h"
#include "../csrc/cpu_isa.h"

using namespace deltakern;

namespace {

TensorView view(const void* address, int dtype, int rank, const int64_t* sizes, const int64_t* strides) {
  return {reinterpret_cast<uintptr_t>(address), dtype, {sizes, sizes + rank}, {strides, strides + rank}};
}

// Runs the CUDA source; the workspace is exactly as large as asked for and full of NaN.
void run_shim(const Problem& p, int64_t* index, float* loss, float* losses, int multiprocessors, int64_t max_grid) {
  const int64_t bytes = cuda_plan(p.groups, p.count, p.width, multiprocessors).workspace;
  std::unique_ptr<char, void (*)(void*)> workspace(static_cast<char*>(aligned_alloc(16, (bytes + 15) / 16 * 16 + 16)), std::free);
  memset(workspace.get(), 0xff, (bytes + 15) / 16 * 16 + 16);
  best_of_n_cuda(p, index, loss, losses, workspace.get(), bytes, 0, multiprocessors, nullptr, max_grid);
  for (int64_t i = bytes; i < (bytes + 15) / 16 * 16 + 16; ++i)
    if (workspace.get()[i] != static_cast<char>(0xff)) throw std::runtime_error("written past the end of the workspace");
}

}  // namespace

// 0, or -1 with the reason in `error`
extern "C" int shim_best_of_n(const void* candidates, int candidates_dtype, int rank, const int64_t* sizes, const int64_t* strides,
                              const void* target, int target_dtype, const int64_t* target_sizes, const int64_t* target_strides,
                              int reduce_dims, int loss_kind, double beta, int64_t* index, float* loss, float* losses, int multiprocessors,
                              int64_t max_grid, int order, int64_t* launches, char* error, int64_t error_size) {
  try {
    const Problem p = make_problem(view(candidates, candidates_dtype, rank, sizes, strides),
                                   view(target, target_dtype, rank - 1, target_sizes, target_strides), reduce_dims, loss_kind, beta);
    shim::order = order;
    shim::launches = 0;
    run_shim(p, index, loss, losses, multiprocessors, max_grid);
    *launches = shim::launches;
    return 0;
  } catch (const std::exception& problem) {
    snprintf(error, error_size, "%s", problem.what());
    return -1;
  }
}

#ifdef BEST_OF_N_PROGRAM

namespace {

std::mt19937 generator(1);
int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(generator); }

uint16_t narrow(float value, int dtype) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (dtype == 1) return static_cast<uint16_t>(bits >> 16);
  // float16 by truncation, for values that it has: enough to draw test data
  const int exponent = static_cast<int>(bits >> 23 & 0xff) - 112;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (exponent <= 0) return sign;
  if (exponent >= 31) return sign | 0x7c00;
  return static_cast<uint16_t>(sign | exponent << 10 | (bits >> 13 & 0x3ff));
}

// A heap block of exactly the elements that the strides reach, so that a read outside of it is found
struct Tensor {
  std::vector<int64_t> sizes, strides;
  int dtype = 0;
  std::unique_ptr<char[]> storage;

  void fill() {
    int64_t elements = 1;
    for (size_t d = 0; d < sizes.size(); ++d) elements += sizes[d] ? (sizes[d] - 1) * strides[d] : 0;
    storage.reset(new char[elements * (dtype ? 2 : 4)]);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < elements; ++i) {
      float value = normal(generator) * 0.3f;
      if (below(2000) == 0) value = below(2) ? INFINITY : NAN;
      if (dtype) reinterpret_cast<uint16_t*>(storage.get())[i] = narrow(value, dtype);
      else reinterpret_cast<float*>(storage.get())[i] = value;
    }
  }
  double at(const std::vector<int64_t>& place) const {
    int64_t offset = 0;
    for (size_t d = 0; d < place.size(); ++d) offset += place[d] * strides[d];
    if (dtype == 0) return reinterpret_cast<float*>(storage.get())[offset];
    const uint16_t bits = reinterpret_cast<uint16_t*>(storage.get())[offset];
    return dtype == 1 ? widen_bfloat16(bits) : widen_float16(bits);
  }
  TensorView view() const { return {reinterpret_cast<uintptr_t>(storage.get()), dtype, sizes, strides}; }
};

double plain(int loss, double d, double beta) {
  const double a = std::fabs(d);
  if (loss == 0) return a < beta ? d * d / (2 * beta) : a - beta / 2;
  if (loss == 1) return a + std::log1p(std::exp(-2 * a)) - std::log(2.0);
  return loss == 2 ? d * d : a;
}

// Strides of the sizes in a random order of dimensions, some rows padded, now and then a dimension expanded
std::vector<int64_t> some_strides(const std::vector<int64_t>& sizes, int kind) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t k = 0; k < sizes.size(); ++k) {
    const size_t d = kind == 2 ? k : sizes.size() - 1 - k;
    strides[d] = kind == 3 && k == 1 ? 0 : step;
    step *= sizes[d];
    if (kind == 1 && k == 0) step += 1 + below(9);
  }
  return strides;
}

bool close(float value, double truth) {
  if (std::isnan(truth) || std::isnan(value)) return std::isnan(truth) && std::isnan(value);
  if (std::isinf(truth)) return value == truth;
  return std::fabs(value - truth) <= 2e-6 * std::fabs(truth) + 1e-9;
}

int failed(const char* what, int trial) {
  fprintf(stderr, "trial %d: %s\n", trial, what);
  return 1;
}

int try_one(int trial, int64_t widest) {
  const int reduce_dims = 1 + static_cast<int>(below(2)), leading = static_cast<int>(below(3));
  Tensor candidates, target;
  int64_t groups = 1, width = 1;
  for (int d = 0; d < leading; ++d) candidates.sizes.push_back(below(4)), groups *= candidates.sizes.back();
  const int64_t count = 1 + below(40);
  candidates.sizes.push_back(count);
  for (int d = 0; d < reduce_dims; ++d) candidates.sizes.push_back(1 + below(d == 0 && reduce_dims == 2 ? 5 : widest)), width *= candidates.sizes.back();
  target.sizes = candidates.sizes;
  target.sizes.erase(target.sizes.begin() + leading);
  candidates.dtype = static_cast<int>(below(3));
  target.dtype = static_cast<int>(below(3));
  candidates.strides = some_strides(candidates.sizes, static_cast<int>(below(4)));
  target.strides = some_strides(target.sizes, static_cast<int>(below(3)));
  candidates.fill();
  target.fill();
  const int loss = static_cast<int>(below(4));
  const double beta = static_cast<float>(0.05 + 0.01 * static_cast<double>(below(20)));

  const Problem p = make_problem(candidates.view(), target.view(), reduce_dims, loss, beta);
  std::unique_ptr<int64_t[]> index(new int64_t[groups]), again(new int64_t[groups]);
  std::unique_ptr<float[]> best(new float[groups]), all(new float[groups * count]), best_again(new float[groups]), all_again(new float[groups * count]);
  best_of_n_cpu(p, index.get(), best.get(), all.get(), 1 + static_cast<int>(below(3)), "auto");

  std::vector<int64_t> place(candidates.sizes.size());
  for (int64_t row = 0; row < groups * count; ++row) {
    double sum = 0;
    for (int64_t i = 0; i < width; ++i) {
      int64_t rest = row * width + i;
      for (size_t d = place.size(); d-- > 0;) place[d] = rest % candidates.sizes[d], rest /= candidates.sizes[d];
      std::vector<int64_t> of_target = place;
      of_target.erase(of_target.begin() + leading);
      sum += plain(loss, candidates.at(place) - target.at(of_target), beta);
    }
    if (!close(all[row], sum / static_cast<double>(width))) return failed("a loss is wrong", trial);
  }
  for (int64_t g = 0; g < groups; ++g) {
    Best want{all[g * count], 0};
    for (int64_t i = 1; i < count; ++i) want = better(want, Best{all[g * count + i], i});
    if (index[g] != want.index || memcmp(&best[g], &want.loss, 4)) return failed("the best is wrong", trial);
  }

  std::string isas = cpu_instruction_sets();
  for (size_t from = 0; from < isas.size();) {
    const size_t to = std::min(isas.find(' ', from), isas.size());
    const std::string isa = isas.substr(from, to - from);
    best_of_n_cpu(p, again.get(), best_again.get(), all_again.get(), 1, isa.c_str());
    for (int64_t i = 0; i < groups * count; ++i)
      if (!close(all_again[i], all[i])) return failed("an instruction set is wrong", trial);
    if (isa != "baseline" && (memcmp(again.get(), index.get(), groups * 8) || memcmp(all_again.get(), all.get(), groups * count * 4)))
      return failed("instruction sets with FMA differ", trial);
    from = to + 1;
  }

  run_shim(p, again.get(), best_again.get(), all_again.get(), 1 + static_cast<int>(below(30)), below(3) ? 1 << 30 : 3);
  for (int64_t i = 0; i < groups * count; ++i)
    if (!close(all_again[i], all[i])) return failed("the CUDA source's loss is wrong", trial);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const int trials = argc > 1 ? atoi(argv[1]) : 100;
  const int64_t widest = argc > 2 ? atoi(argv[2]) : 5000;
  for (int trial = 0; trial < trials; ++trial)
    if (try_one(trial, trial % 4 ? 200 : widest)) return 1;
  printf("%d problems, all as plain loops in double; instruction sets: %s\n", trials, cpu_instruction_sets());
  return 0;
}
#endif
