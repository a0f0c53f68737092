// deltakern._C: addresses in, nothing allocated for the caller, no torch. Every argument is checked again here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "best_of_n_cpu.h"
#include "best_of_n_problem.h"
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

void best_of_n_cpu(uintptr_t candidates, int candidates_dtype, Sizes sizes, Sizes strides, uintptr_t target, int target_dtype,
                   Sizes target_sizes, Sizes target_strides, int reduce_dims, int loss_kind, double beta, uintptr_t index, uintptr_t loss,
                   uintptr_t losses, int threads, const std::string& isa) {
  const auto p = deltakern::make_problem({candidates, candidates_dtype, std::move(sizes), std::move(strides)},
                                         {target, target_dtype, std::move(target_sizes), std::move(target_strides)}, reduce_dims, loss_kind, beta);
  if (threads < 1 || threads > 4096) throw std::invalid_argument("best_of_n: threads must be from 1 to 4096, got " + std::to_string(threads));
  auto* index_out = output<int64_t>(index, "index", p.groups > 0);
  auto* loss_out = output<float>(loss, "loss", p.groups > 0);
  auto* losses_out = output<float>(losses, "losses", false);
  py::gil_scoped_release released;
  deltakern::best_of_n_cpu(p, index_out, loss_out, losses_out, threads, isa.c_str());
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
