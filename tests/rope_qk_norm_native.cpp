// A program that compares the CPU kernels of rope_qk_norm with plain loops in double, for AddressSanitizer
// (tests/test_extension_sanitizers.py): every instruction set, forward and backward, tensors that end where their last element does.
#include <string>
#include <vector>

#include "../csrc/cpu_isa.h"
#include "../csrc/rope_qk_norm.h"
#include "native_tensor.h"

using namespace deltakern;

namespace {

using Values = std::vector<double>;

Values rotated(const Values& x, const Values& cos, const Values& sin, int back) {
  const size_t half = x.size() / 2;
  Values out(x.size());
  for (size_t i = 0; i < half; ++i) {
    out[i] = x[i] * cos[i] - (back ? -x[half + i] * sin[half + i] : x[half + i] * sin[i]);
    out[half + i] = x[half + i] * cos[half + i] + (back ? -x[i] * sin[i] : x[i] * sin[half + i]);
  }
  return out;
}

double standardise(Values& x, double eps) {
  double mean = 0, square = 0;
  for (double v : x) mean += v / static_cast<double>(x.size());
  for (double v : x) square += (v - mean) * (v - mean) / static_cast<double>(x.size());
  const double scale = 1 / std::sqrt(square + eps);
  for (double& v : x) v = (v - mean) * scale;
  return scale;
}

struct Problem {
  int64_t size[4];
  Rope rope{};
  std::vector<float> cos, sin, weight[2];

  Values table(const std::vector<float>& from, int64_t token, double still) const {
    if (token < rope.prefix) return Values(size[3], still);
    const auto row = from.begin() + (token - rope.prefix) % rope.period * size[3];
    return Values(row, row + size[3]);
  }
  Values forward(Values x, int side, int64_t token) const {
    const Values c = table(cos, token, 1), s = table(sin, token, 0);
    const bool norm = !weight[side].empty();
    if (!rope.norm_first || !norm) x = rotated(x, c, s, 0);
    if (norm) {
      standardise(x, rope.eps);
      for (size_t i = 0; i < x.size(); ++i) x[i] *= weight[side][i];
      if (rope.norm_first) x = rotated(x, c, s, 0);
    }
    return x;
  }
  // The gradient of x; adds to the weight's
  Values backward(Values x, Values g, int side, int64_t token, double* sums) const {
    const Values c = table(cos, token, 1), s = table(sin, token, 0);
    if (weight[side].empty()) return rotated(g, c, s, 1);
    if (rope.norm_first) g = rotated(g, c, s, 1);
    else x = rotated(x, c, s, 0);
    const double scale = standardise(x, rope.eps), n = static_cast<double>(x.size());
    double mean = 0, along = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      sums[i] += g[i] * x[i];
      g[i] *= weight[side][i];
      mean += g[i] / n;
      along += g[i] * x[i] / n;
    }
    for (size_t i = 0; i < x.size(); ++i) g[i] = (g[i] - mean - x[i] * along) * scale;
    return rope.norm_first ? g : rotated(g, c, s, 1);
  }
};

int try_one(int trial) {
  Problem p;
  const int64_t width = trial % 3 == 0 ? 64 : 2 * (1 + below(kMostChannels / 2));
  const int64_t period = 1 + below(9), prefix = below(4);
  const int64_t sizes[4] = {1 + below(3), prefix + period * below(6), 1 + below(3), width};
  std::copy(sizes, sizes + 4, p.size);
  if (sizes[1] == 0) return 0;
  std::normal_distribution<float> normal;
  for (auto* table : {&p.cos, &p.sin})
    for (int64_t i = 0; i < period * width; ++i) table->push_back(normal(generator));
  p.rope.batch = sizes[0], p.rope.length = sizes[1], p.rope.heads = sizes[2], p.rope.width = width;
  p.rope.prefix = prefix, p.rope.period = period, p.rope.cos = p.cos.data(), p.rope.sin = p.sin.data();
  p.rope.cos_stride = p.rope.sin_stride = width, p.rope.eps = 1e-3f, p.rope.norm_first = below(2) == 0;
  const std::vector<int64_t> shape(sizes, sizes + 4);
  std::vector<Tensor> x, grad, out;
  for (int side = 0; side < 2; ++side) {
    const DType type = static_cast<DType>(below(3));
    x.emplace_back(shape, type, false);
    grad.emplace_back(shape, type, false);
    out.emplace_back(shape, type, below(2) == 0);
    if (below(4))
      for (int64_t i = 0; i < width; ++i) p.weight[side].push_back(1 + 0.1f * normal(generator));
    RopeSide& s = p.rope.side[side];
    s.weight = p.weight[side].empty() ? nullptr : p.weight[side].data();
    s.type = type;
    s.x = side == 0 && below(4) == 0 ? nullptr : x[side].storage.get();
    s.grad = grad[side].storage.get(), s.out = out[side].storage.get();
    std::copy(x[side].stride.begin(), x[side].stride.end(), s.x_stride);
    std::copy(grad[side].stride.begin(), grad[side].stride.end(), s.grad_stride);
    std::copy(out[side].stride.begin(), out[side].stride.end(), s.out_stride);
  }

  std::string isas = cpu_instruction_sets();
  for (size_t from = 0; from < isas.size();) {
    const size_t to = std::min(isas.find(' ', from), isas.size());
    const std::string isa = isas.substr(from, to - from);
    from = to + 1;
    for (bool backward : {false, true}) {
      std::unique_ptr<float[]> sums(new float[2 * width]);
      const int threads = 1 + static_cast<int>(below(3));
      if (backward) rope_qk_norm_backward_cpu(p.rope, sums.get(), threads, isa.c_str());
      else rope_qk_norm_forward_cpu(p.rope, threads, isa.c_str());
      for (int side = 0; side < 2; ++side) {
        std::vector<double> total(width);
        for (int64_t row = 0; p.rope.side[side].x && row < sizes[0] * sizes[1] * sizes[2]; ++row) {
          const int64_t h = row % sizes[2], l = row / sizes[2] % sizes[1], b = row / sizes[2] / sizes[1];
          Values value(width), g(width);
          for (int64_t i = 0; i < width; ++i) value[i] = x[side][x[side].place(b, l, h) + i], g[i] = grad[side][grad[side].place(b, l, h) + i];
          const Values truth = backward ? p.backward(value, g, side, l, total.data()) : p.forward(value, side, l);
          double scale = 0;
          for (double v : truth) scale = std::max(scale, std::fabs(v));
          for (int64_t i = 0; i < width; ++i)
            if (!close(out[side][out[side].place(b, l, h) + i], truth[i], x[side].type, scale))
              return failed(backward ? "a gradient is wrong" : "an output is wrong", trial, isa);
        }
        for (int64_t i = 0; backward && i < width; ++i)
          if (!close(sums[side * width + i], total[i], DType::float32, 10)) return failed("a weight's gradient is wrong", trial, isa);
      }
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return run(argc, argv, try_one); }
