// Builds a Problem from what the caller knows of two tensors, and checks every part of it.
#pragma once

#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "best_of_n.h"

namespace deltakern {

struct TensorView {
  uintptr_t address;
  int dtype;  // DType
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;  // in elements, not negative
};

namespace detail {

[[noreturn]] inline void refuse(const std::string& what) { throw std::invalid_argument("best_of_n: " + what); }

inline int64_t product(int64_t a, int64_t b) {
  if (a != 0 && b > std::numeric_limits<int64_t>::max() / a) refuse("sizes overflow 64 bits");
  return a * b;
}

struct Dim {
  int64_t size, a, b;  // strides of the two tensors that are walked together
};

// Merges neighbours that one stride describes, drops dimensions of one element.
inline std::vector<Dim> merged(const std::vector<Dim>& dims) {
  std::vector<Dim> out;
  for (const Dim& d : dims) {
    if (d.size == 1) continue;
    if (!out.empty() && out.back().a == d.size * d.a && out.back().b == d.size * d.b) {
      out.back() = {out.back().size * d.size, d.a, d.b};
    } else {
      out.push_back(d);
    }
  }
  return out;
}

inline Span span_of(const TensorView& t, size_t from, const char* name) {
  std::vector<Dim> dims;
  for (size_t d = from; d < t.sizes.size(); ++d) dims.push_back({t.sizes[d], t.strides[d], t.strides[d]});
  dims = merged(dims);
  if (dims.empty()) dims.push_back({1, 1, 1});
  if (dims.size() > kMaxReducedDims)
    refuse(std::string(name) + ": at most " + std::to_string(kMaxReducedDims) + " reduced dimensions that do not merge, got " +
           std::to_string(dims.size()));
  Span span{};
  span.dims = static_cast<int>(dims.size());
  for (size_t d = 0; d < dims.size(); ++d) {
    span.size[d] = dims[d].size;
    span.stride[d] = dims[d].a;
  }
  return span;
}

inline int64_t check(const TensorView& t, const char* name) {
  if (t.dtype < 0 || t.dtype > 2) refuse(std::string(name) + ": dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got " + std::to_string(t.dtype));
  if (t.sizes.size() != t.strides.size()) refuse(std::string(name) + ": as many strides as sizes expected");
  int64_t elements = 1, extent = 0;
  for (size_t d = 0; d < t.sizes.size(); ++d) {
    if (t.sizes[d] < 0 || t.strides[d] < 0) refuse(std::string(name) + ": sizes and strides must not be negative");
    elements = product(elements, t.sizes[d]);
    extent += product(t.sizes[d], t.strides[d]);
    if (extent < 0) refuse("strides overflow 64 bits");
  }
  const uintptr_t size = t.dtype == 0 ? 4 : 2;
  if (elements > 0 && t.address == 0) refuse(std::string(name) + ": null pointer (a tensor without storage, such as a fake one)");
  if (t.address % size) refuse(std::string(name) + ": the address must be a multiple of the element's size");
  return elements;
}

}  // namespace detail

// candidates (..., N, R...), target (..., R...), the last `reduce_dims` dimensions being R. Throws std::invalid_argument.
inline Problem make_problem(const TensorView& candidates, const TensorView& target, int reduce_dims, int loss, double beta) {
  using namespace detail;
  check(candidates, "candidates");
  check(target, "target");
  const size_t rank = candidates.sizes.size();
  if (reduce_dims < 1 || rank < static_cast<size_t>(reduce_dims) + 1) refuse("reduce_dims must be from 1 to the candidates' rank less 1");
  if (target.sizes.size() != rank - 1) refuse("target must have one dimension less than candidates");
  if (loss < 0 || loss > 3) refuse("loss must be 0 (smooth_l1), 1 (log_cosh), 2 (mse) or 3 (l1), got " + std::to_string(loss));
  if (loss == 0 && !(beta >= 1e-6 && beta <= 1e6)) refuse("beta must be from 1e-6 to 1e6, got " + std::to_string(beta));
  const size_t axis = rank - 1 - reduce_dims;

  Problem p{};
  p.candidates = reinterpret_cast<const void*>(candidates.address);
  p.target = reinterpret_cast<const void*>(target.address);
  p.candidate_type = static_cast<DType>(candidates.dtype);
  p.target_type = static_cast<DType>(target.dtype);
  p.loss = static_cast<Loss>(loss);
  p.beta = static_cast<float>(beta);
  p.groups = p.width = 1;
  std::vector<Dim> batch;
  for (size_t d = 0; d < rank; ++d) {
    if (d == axis) continue;
    const size_t e = d < axis ? d : d - 1;
    if (candidates.sizes[d] != target.sizes[e])
      refuse("target's dimension " + std::to_string(e) + " must be " + std::to_string(candidates.sizes[d]) + ", got " +
             std::to_string(target.sizes[e]));
    (d < axis ? p.groups : p.width) *= candidates.sizes[d];
    if (d < axis) batch.push_back({candidates.sizes[d], candidates.strides[d], target.strides[e]});
  }
  p.count = candidates.sizes[axis];
  p.count_stride = candidates.strides[axis];
  if (p.count < 1) refuse("at least one candidate expected");
  if (p.width < 1) refuse("the reduced dimensions must not be empty");
  if (p.groups == 0) return p;

  batch = merged(batch);
  if (batch.size() > kMaxBatchDims)
    refuse("at most " + std::to_string(kMaxBatchDims) + " leading dimensions that do not merge, got " + std::to_string(batch.size()));
  p.batch_dims = static_cast<int>(batch.size());
  for (size_t d = 0; d < batch.size(); ++d) {
    p.batch_size[d] = batch[d].size;
    p.batch_candidate[d] = batch[d].a;
    p.batch_target[d] = batch[d].b;
  }
  p.candidate_span = span_of(candidates, axis + 1, "candidates");
  p.target_span = span_of(target, axis, "target");
  return p;
}

}  // namespace deltakern
