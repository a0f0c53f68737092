// deltakern._C: addresses in, nothing allocated for the caller, no torch. Every argument is checked again here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "best_of_n_cpu.h"
#include "best_of_n_problem.h"
#include "context_attention.h"
#include "cpu_isa.h"
#include "rope_qk_norm.h"
#ifdef DELTAKERN_WITH_CUDA
#include <cuda_runtime_api.h>

#include "best_of_n_cuda.h"
#endif

#ifdef _OPENMP
#include <omp.h>
#endif

#ifndef DELTAKERN_CUDA_ARCHS
#define DELTAKERN_CUDA_ARCHS ""
#endif

namespace py = pybind11;
using Sizes = std::vector<int64_t>;

namespace {

template <class T>
T* output(uintptr_t address, const char* name, bool needed) {
  if (needed && address == 0) throw std::invalid_argument(std::string("best_of_n: ") + name + ": null pointer");
  if (address % sizeof(T)) throw std::invalid_argument(std::string("best_of_n: ") + name + ": misaligned address");
  return reinterpret_cast<T*>(address);
}

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  for (size_t from = 0; from < text.size();) {
    const size_t to = std::min(text.find(at, from), text.size());
    if (to > from) parts.push_back(text.substr(from, to - from));
    from = to + 1;
  }
  return parts;
}

int checked_threads(const char* op, int threads) {
  if (threads < 1 || threads > 4096) throw std::invalid_argument(std::string(op) + ": threads must be from 1 to 4096, got " + std::to_string(threads));
  return threads;
}

void best_of_n_cpu(uintptr_t candidates, int candidates_dtype, Sizes sizes, Sizes strides, uintptr_t target, int target_dtype,
                   Sizes target_sizes, Sizes target_strides, int reduce_dims, int loss_kind, double beta, uintptr_t index, uintptr_t loss,
                   uintptr_t losses, int threads, const std::string& isa) {
  const auto p = deltakern::make_problem({candidates, candidates_dtype, std::move(sizes), std::move(strides)},
                                         {target, target_dtype, std::move(target_sizes), std::move(target_strides)}, reduce_dims, loss_kind, beta);
  checked_threads("best_of_n", threads);
  auto* index_out = output<int64_t>(index, "index", p.groups > 0);
  auto* loss_out = output<float>(loss, "loss", p.groups > 0);
  auto* losses_out = output<float>(losses, "losses", false);
  py::gil_scoped_release released;
  deltakern::best_of_n_cpu(p, index_out, loss_out, losses_out, threads, isa.c_str());
}

using Strides = std::array<int64_t, 4>;                                              // of batch, token, head, channel
using ForwardSide = std::tuple<uintptr_t, int, Strides, uintptr_t, uintptr_t>;       // x, dtype, its strides, weight, out (contiguous)
using Gradient = std::tuple<uintptr_t, Strides, uintptr_t, Strides>;                 // incoming gradient, x's gradient
using BackwardSide = std::tuple<uintptr_t, int, Strides, uintptr_t, Gradient>;       // x, dtype, its strides, weight
using Tables = std::tuple<uintptr_t, int64_t, uintptr_t, int64_t, int64_t>;          // cos, its stride, sin, its stride, rows
using RopeOptions = std::tuple<bool, int64_t, double>;                               // norm first, num_prefix, eps

void put_strides(const Strides& from, int64_t (&to)[3], const char* name) {
  if (from[3] != 1) throw std::invalid_argument(std::string("rope_qk_norm: ") + name + ": channels must lie side by side");
  std::copy(from.begin(), from.begin() + 3, to);
}

template <class Side>
deltakern::RopeSide side_of(const Side& from, const char* name) {
  deltakern::RopeSide side{};
  side.x = reinterpret_cast<const void*>(std::get<0>(from));
  side.type = static_cast<deltakern::DType>(std::get<1>(from));
  if (side.x) put_strides(std::get<2>(from), side.x_stride, name);
  side.weight = reinterpret_cast<const float*>(std::get<3>(from));
  return side;
}

deltakern::Rope rope_of(const std::array<int64_t, 4>& sizes, const Tables& tables, const RopeOptions& options) {
  deltakern::Rope r{};
  r.batch = sizes[0], r.length = sizes[1], r.heads = sizes[2], r.width = sizes[3];
  r.cos = reinterpret_cast<const float*>(std::get<0>(tables)), r.cos_stride = std::get<1>(tables);
  r.sin = reinterpret_cast<const float*>(std::get<2>(tables)), r.sin_stride = std::get<3>(tables);
  r.period = std::get<4>(tables);
  r.norm_first = std::get<0>(options), r.prefix = std::get<1>(options), r.eps = static_cast<float>(std::get<2>(options));
  return r;
}

void rope_qk_norm_forward_cpu(const ForwardSide& q, const ForwardSide& k, const std::array<int64_t, 4>& sizes, const Tables& tables,
                              const RopeOptions& options, int threads, const std::string& isa) {
  deltakern::Rope r = rope_of(sizes, tables, options);
  checked_threads("rope_qk_norm", threads);
  const ForwardSide* sides[] = {&q, &k};
  for (int i = 0; i < 2; ++i) {
    r.side[i] = side_of(*sides[i], i ? "k" : "q");
    r.side[i].out = reinterpret_cast<void*>(std::get<4>(*sides[i]));
    r.side[i].out_stride[0] = sizes[1] * sizes[2] * sizes[3], r.side[i].out_stride[1] = sizes[2] * sizes[3], r.side[i].out_stride[2] = sizes[3];
  }
  py::gil_scoped_release released;
  deltakern::rope_qk_norm_forward_cpu(r, threads, isa.c_str());
}

void rope_qk_norm_backward_cpu(const BackwardSide& q, const BackwardSide& k, const std::array<int64_t, 4>& sizes, const Tables& tables,
                               const RopeOptions& options, uintptr_t sums, int threads, const std::string& isa) {
  deltakern::Rope r = rope_of(sizes, tables, options);
  checked_threads("rope_qk_norm", threads);
  const BackwardSide* sides[] = {&q, &k};
  for (int i = 0; i < 2; ++i) {
    const char* name = i ? "k" : "q";
    r.side[i] = side_of(*sides[i], name);
    const Gradient& gradient = std::get<4>(*sides[i]);
    r.side[i].grad = reinterpret_cast<const void*>(std::get<0>(gradient));
    r.side[i].out = reinterpret_cast<void*>(std::get<2>(gradient));
    if (r.side[i].x == nullptr) continue;
    put_strides(std::get<1>(gradient), r.side[i].grad_stride, name);
    put_strides(std::get<3>(gradient), r.side[i].out_stride, name);
  }
  py::gil_scoped_release released;
  deltakern::rope_qk_norm_backward_cpu(r, reinterpret_cast<float*>(sums), threads, isa.c_str());
}

using RowsOf = std::tuple<uintptr_t, int, Sizes>;    // address, dtype, strides
using TimesOf = std::pair<uintptr_t, bool>;          // address, whether float64
using TimesOfAll = std::tuple<TimesOf, TimesOf, TimesOf, uintptr_t>;  // of queries, tokens, own tokens; revolutions a second
using OwnOf = std::tuple<RowsOf, RowsOf>;            // keys, values
using KeyGradients = std::array<RowsOf, 4>;          // of k, v, own_k, own_v

deltakern::Rows rows_of(const RowsOf& from, size_t dims, const char* name) {
  deltakern::Rows rows{};
  rows.data = reinterpret_cast<void*>(std::get<0>(from));
  rows.type = static_cast<deltakern::DType>(std::get<1>(from));
  if (rows.data == nullptr) return rows;
  const Sizes& strides = std::get<2>(from);
  if (strides.size() != dims) throw std::invalid_argument(std::string("context_attention: ") + name + ": wrong number of strides");
  if (strides.back() != 1) throw std::invalid_argument(std::string("context_attention: ") + name + ": channels must lie side by side");
  std::copy(strides.begin(), strides.end() - 1, rows.stride);
  return rows;
}

deltakern::ContextAttention context_of(const std::array<int64_t, 8>& sizes, const RowsOf& q, const RowsOf& k, const RowsOf& v, const OwnOf& own,
                                       const TimesOfAll& times, uintptr_t visible, double scale, const RowsOf& out) {
  deltakern::ContextAttention p{};
  p.batch = sizes[0], p.queries = sizes[1], p.groups = sizes[2], p.tokens = sizes[3], p.own = sizes[4], p.heads = sizes[5], p.width = sizes[6];
  p.half = sizes[7];
  p.scale = static_cast<float>(scale);
  const auto seconds = [](const TimesOf& from) -> deltakern::Times { return {reinterpret_cast<const void*>(from.first), from.second}; };
  p.q_time = seconds(std::get<0>(times)), p.k_time = seconds(std::get<1>(times)), p.own_time = seconds(std::get<2>(times));
  p.rates = reinterpret_cast<const float*>(std::get<3>(times));
  p.visible = reinterpret_cast<const int64_t*>(visible);
  p.q = rows_of(q, 4, "q"), p.k = rows_of(k, 4, "k"), p.v = rows_of(v, 4, "v"), p.out = rows_of(out, 4, "out");
  p.own_k = rows_of(std::get<0>(own), 5, "own_k"), p.own_v = rows_of(std::get<1>(own), 5, "own_v");
  return p;
}

void context_attention_forward_cpu(const std::array<int64_t, 8>& sizes, const RowsOf& q, const RowsOf& k, const RowsOf& v, const OwnOf& own,
                                   const TimesOfAll& times, uintptr_t visible, double scale, const RowsOf& out, int threads,
                                   const std::string& isa) {
  const deltakern::ContextAttention p = context_of(sizes, q, k, v, own, times, visible, scale, out);
  checked_threads("context_attention", threads);
  py::gil_scoped_release released;
  deltakern::context_attention_forward_cpu(p, threads, isa.c_str());
}

void context_attention_backward_cpu(const std::array<int64_t, 8>& sizes, const RowsOf& q, const RowsOf& k, const RowsOf& v, const OwnOf& own,
                                    const TimesOfAll& times, uintptr_t visible, double scale, const RowsOf& grad, const RowsOf& dq,
                                    const KeyGradients& gradients, int threads, const std::string& isa) {
  deltakern::ContextAttention p = context_of(sizes, q, k, v, own, times, visible, scale, dq);
  checked_threads("context_attention", threads);
  p.grad = rows_of(grad, 4, "the incoming gradient");
  p.dk = rows_of(gradients[0], 4, "dk"), p.dv = rows_of(gradients[1], 4, "dv");
  p.d_own_k = rows_of(gradients[2], 5, "d_own_k"), p.d_own_v = rows_of(gradients[3], 5, "d_own_v");
  py::gil_scoped_release released;
  deltakern::context_attention_backward_cpu(p, threads, isa.c_str());
}

#ifdef DELTAKERN_WITH_CUDA
void best_of_n_cuda(uintptr_t candidates, int candidates_dtype, Sizes sizes, Sizes strides, uintptr_t target, int target_dtype,
                    Sizes target_sizes, Sizes target_strides, int reduce_dims, int loss_kind, double beta, uintptr_t index, uintptr_t loss,
                    uintptr_t losses, uintptr_t workspace, int64_t workspace_bytes, int device, int multiprocessors, uintptr_t stream) {
  const auto p = deltakern::make_problem({candidates, candidates_dtype, std::move(sizes), std::move(strides)},
                                         {target, target_dtype, std::move(target_sizes), std::move(target_strides)}, reduce_dims, loss_kind, beta);
  auto* index_out = output<int64_t>(index, "index", p.groups > 0);
  auto* loss_out = output<float>(loss, "loss", p.groups > 0);
  auto* losses_out = output<float>(losses, "losses", false);
  if (device < 0) throw std::invalid_argument("best_of_n: device must not be negative, got " + std::to_string(device));
  py::gil_scoped_release released;
  deltakern::best_of_n_cuda(p, index_out, loss_out, losses_out, reinterpret_cast<void*>(workspace), workspace_bytes, device, multiprocessors,
                            reinterpret_cast<void*>(stream));
}

std::string cuda_problem() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  return status == cudaSuccess ? "" : cudaGetErrorString(status);
}
#endif

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  const auto sets = split(deltakern::cpu_instruction_sets(), ' ');
  info["cpu_isa"] = sets.front();  // what impl="cpp" runs with on this machine
  info["cpu_isas"] = sets;         // what was compiled and runs here
  info["cuda_archs"] = split(DELTAKERN_CUDA_ARCHS, ';');  // such as 90, and 120+PTX
#ifdef DELTAKERN_WITH_CUDA
  info["with_cuda"] = true;
  info["cuda_version"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
#else
  info["with_cuda"] = false;
  info["cuda_version"] = "";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of deltakern. Takes addresses: call it through deltakern.ops, which checks and owns the tensors.";
  m.def("build_info", &build_info, "What was compiled, and which instruction set the CPU kernels run with here.");
  m.def("best_of_n_cpu", &best_of_n_cpu, py::arg("candidates"), py::arg("candidates_dtype"), py::arg("sizes"), py::arg("strides"),
        py::arg("target"), py::arg("target_dtype"), py::arg("target_sizes"), py::arg("target_strides"), py::arg("reduce_dims"), py::arg("loss_kind"),
        py::arg("beta"), py::arg("index"), py::arg("loss"), py::arg("losses"), py::arg("threads"), py::arg("isa") = "auto");
  m.def("rope_qk_norm_forward_cpu", &rope_qk_norm_forward_cpu, py::arg("q"), py::arg("k"), py::arg("sizes"), py::arg("tables"),
        py::arg("options"), py::arg("threads"), py::arg("isa") = "auto");
  m.def("rope_qk_norm_backward_cpu", &rope_qk_norm_backward_cpu, py::arg("q"), py::arg("k"), py::arg("sizes"), py::arg("tables"),
        py::arg("options"), py::arg("sums"), py::arg("threads"), py::arg("isa") = "auto");
  m.def("context_attention_forward_cpu", &context_attention_forward_cpu, py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("own"),
        py::arg("times"), py::arg("visible"), py::arg("scale"), py::arg("out"), py::arg("threads"), py::arg("isa") = "auto");
  m.def("context_attention_backward_cpu", &context_attention_backward_cpu, py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("own"), py::arg("times"), py::arg("visible"), py::arg("scale"), py::arg("grad"), py::arg("dq"), py::arg("gradients"),
        py::arg("threads"), py::arg("isa") = "auto");
#ifdef DELTAKERN_WITH_CUDA
  m.def("best_of_n_cuda", &best_of_n_cuda, py::arg("candidates"), py::arg("candidates_dtype"), py::arg("sizes"), py::arg("strides"),
        py::arg("target"), py::arg("target_dtype"), py::arg("target_sizes"), py::arg("target_strides"), py::arg("reduce_dims"), py::arg("loss_kind"),
        py::arg("beta"), py::arg("index"), py::arg("loss"), py::arg("losses"), py::arg("workspace"), py::arg("workspace_bytes"),
        py::arg("device"), py::arg("multiprocessors"), py::arg("stream"));
  m.def("cuda_problem", &cuda_problem, "Why the CUDA runtime in this module cannot use the driver here, or an empty string.");
  m.def(
      "best_of_n_cuda_workspace",
      [](int64_t groups, int64_t count, int64_t width, int multiprocessors) {
        return deltakern::cuda_plan(groups, count, width, multiprocessors).workspace;
      },
      py::arg("groups"), py::arg("count"), py::arg("width"), py::arg("multiprocessors"), "Bytes that best_of_n_cuda needs.");
#endif
}
