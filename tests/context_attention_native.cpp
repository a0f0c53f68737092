// A program that compares the CPU kernels of context_attention with plain loops in double, for AddressSanitizer
// (tests/test_extension_sanitizers.py): every instruction set, forward and backward, tensors that end where their last element does.
#include <algorithm>
#include <string>

#include "../csrc/context_attention.h"
#include "../csrc/cpu_isa.h"
#include "native_tensor.h"

using namespace deltakern;

namespace {

using Values = std::vector<double>;

struct Problem {
  ContextAttention p{};
  std::vector<float> seconds[3];  // of queries, tokens, own tokens
  std::vector<int64_t> visible;
  std::vector<float> rates;
  std::vector<Tensor> q, shared, own;  // q, out, grad, dq; k, v, dk, dv; own_k, own_v and theirs

  Values row(const Tensor& t, int64_t at) const {
    Values out(p.width);
    for (int64_t i = 0; i < p.width; ++i) out[i] = t[at + i];
    return out;
  }
  // Rotated by `seconds`, or back
  Values rotated(Values x, double time, bool back) const {
    for (int64_t i = 0; i < p.half; ++i) {
      const double rate = 2 * M_PI * rates[i];
      const double c = std::cos(time * rate), s = (back ? -1 : 1) * std::sin(time * rate), a = x[i], b = x[p.half + i];
      x[i] = a * c - b * s, x[p.half + i] = b * c + a * s;
    }
    return x;
  }
};

Rows rows_of(Tensor& t) {
  Rows rows{t.storage.get(), t.type, {}};
  std::copy(t.stride.begin(), t.stride.end(), rows.stride);
  return rows;
}

double dot(const Values& a, const Values& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}
void add(Values& to, const Values& x, double factor) {
  for (size_t i = 0; i < to.size(); ++i) to[i] += factor * x[i];
}

int try_one(int trial) {
  Problem x;
  ContextAttention& p = x.p;
  p.batch = 1 + below(2), p.groups = 1 + below(3), p.queries = p.groups * (1 + below(30)), p.tokens = 1 + below(20), p.own = below(4);
  p.heads = 1 + below(2), p.width = trial % 3 ? 2 + below(kMostWidth - 1) : 64, p.half = 1 + below(p.width / 2);
  p.scale = 0.5f / std::sqrt(static_cast<float>(p.width));
  for (int64_t i = 0; i < p.half; ++i) x.rates.push_back(std::pow(10.0f, 2.0f * below(2) - 1.0f));
  p.rates = x.rates.data();
  const auto type = [] { return static_cast<DType>(below(3)); };
  const DType of_q = type(), of_k = type(), of_own = type();
  for (int i = 0; i < 4; ++i) x.q.emplace_back(std::vector<int64_t>{p.batch, p.queries, p.heads, p.width}, of_q, i % 2 && below(2));
  for (int i = 0; i < 4; ++i) x.shared.emplace_back(std::vector<int64_t>{p.batch, p.tokens, p.heads, p.width}, of_k, i > 1 && below(2));
  for (int i = 0; i < 4 && p.own; ++i)
    x.own.emplace_back(std::vector<int64_t>{p.batch, p.queries, p.own, p.heads, p.width}, of_own, i > 1 && below(2));
  p.q = rows_of(x.q[0]), p.grad = rows_of(x.q[2]);
  p.k = rows_of(x.shared[0]), p.v = rows_of(x.shared[1]), p.dk = rows_of(x.shared[2]), p.dv = rows_of(x.shared[3]);
  if (p.own) p.own_k = rows_of(x.own[0]), p.own_v = rows_of(x.own[1]), p.d_own_k = rows_of(x.own[2]), p.d_own_v = rows_of(x.own[3]);
  std::uniform_real_distribution<float> uniform;
  const int64_t counts[3] = {p.groups, p.tokens, p.own};
  for (int i = 0; i < 3; ++i)
    for (int64_t j = 0; j < p.batch * counts[i]; ++j) x.seconds[i].push_back(uniform(generator));
  const bool turned = below(2);
  p.q_time = {x.seconds[0].data(), false};
  if (!turned) p.k_time = {x.seconds[1].data(), false};
  if (!turned && p.own) p.own_time = {x.seconds[2].data(), false};
  if (below(2)) {
    for (int64_t g = 0; g < p.groups; ++g) x.visible.push_back(1 + below(p.tokens));
    p.visible = x.visible.data();
  }

  const std::string isas = cpu_instruction_sets();
  for (size_t from = 0; from < isas.size();) {
    const size_t to = std::min(isas.find(' ', from), isas.size());
    const std::string isa = isas.substr(from, to - from);
    from = to + 1;
    const int threads = 1 + static_cast<int>(below(3));
    p.out = rows_of(x.q[1]);
    context_attention_forward_cpu(p, threads, isa.c_str());
    p.out = rows_of(x.q[3]);
    context_attention_backward_cpu(p, threads, isa.c_str());

    const auto wrong = [&](const Tensor& t, int64_t at, const Values& truth) {
      double scale = 0.1;
      for (double v : truth) scale = std::max(scale, std::fabs(v));
      for (int64_t i = 0; i < p.width; ++i)
        if (!close(t[at + i], truth[i], t.type, scale)) return true;
      return false;
    };
    for (int64_t b = 0; b < p.batch; ++b)
      for (int64_t h = 0; h < p.heads; ++h) {
        std::vector<Values> keys, values, dk(p.tokens, Values(p.width)), dv(p.tokens, Values(p.width));
        for (int64_t t = 0; t < p.tokens; ++t) {
          const Values key = x.row(x.shared[0], x.shared[0].place(b, t, h));
          keys.push_back(turned ? key : x.rotated(key, x.seconds[1][b * p.tokens + t], false));
          values.push_back(x.row(x.shared[1], x.shared[1].place(b, t, h)));
        }
        for (int64_t i = 0; i < p.queries; ++i) {
          const int64_t group = i / (p.queries / p.groups), seen = p.visible ? p.visible[group] : p.tokens;
          const double now = x.seconds[0][b * p.groups + group];
          const Values query = x.rotated(x.row(x.q[0], x.q[0].place(b, i, h)), now, false), grad = x.row(x.q[2], x.q[2].place(b, i, h));
          std::vector<Values> k(keys.begin(), keys.begin() + seen), v(values.begin(), values.begin() + seen);
          for (int64_t j = 0; j < p.own; ++j) {
            const Values key = x.row(x.own[0], x.own[0].place(b, i, j, h));
            k.push_back(turned ? key : x.rotated(key, x.seconds[2][b * p.own + j], false));
            v.push_back(x.row(x.own[1], x.own[1].place(b, i, j, h)));
          }
          Values weight, out(p.width), dq(p.width);
          double sum = 0, mean = 0;
          for (const Values& key : k) weight.push_back(std::exp(p.scale * dot(query, key))), sum += weight.back();
          for (size_t t = 0; t < k.size(); ++t) weight[t] /= sum, add(out, v[t], weight[t]), mean += weight[t] * dot(grad, v[t]);
          if (wrong(x.q[1], x.q[1].place(b, i, h), out)) return failed("an output is wrong", trial, isa);
          for (int64_t t = 0; t < static_cast<int64_t>(k.size()); ++t) {
            const double ds = p.scale * weight[t] * (dot(grad, v[t]) - mean);
            add(dq, k[t], ds);
            if (t < seen) {
              add(dk[t], query, ds), add(dv[t], grad, weight[t]);
              continue;
            }
            Values d_key(p.width), d_value(p.width);
            add(d_key, query, ds), add(d_value, grad, weight[t]);
            const int64_t j = t - seen;
            if (!turned) d_key = x.rotated(d_key, x.seconds[2][b * p.own + j], true);
            if (wrong(x.own[2], x.own[2].place(b, i, j, h), d_key)) return failed("an own key's gradient is wrong", trial, isa);
            if (wrong(x.own[3], x.own[3].place(b, i, j, h), d_value)) return failed("an own value's gradient is wrong", trial, isa);
          }
          if (wrong(x.q[3], x.q[3].place(b, i, h), x.rotated(dq, now, true))) return failed("a query's gradient is wrong", trial, isa);
        }
        for (int64_t t = 0; t < p.tokens; ++t) {
          const Values key = turned ? dk[t] : x.rotated(dk[t], x.seconds[1][b * p.tokens + t], true);
          if (wrong(x.shared[2], x.shared[2].place(b, t, h), key)) return failed("a key's gradient is wrong", trial, isa);
          if (wrong(x.shared[3], x.shared[3].place(b, t, h), dv[t])) return failed("a value's gradient is wrong", trial, isa);
        }
      }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return run(argc, argv, try_one); }
