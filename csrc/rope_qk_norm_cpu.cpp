// rope_qk_norm on the CPU: checks, and the division of tokens among threads.
#include <algorithm>
#include <limits>
#include <memory>

#include "cpu_isa.h"
#include "refuse.h"
#include "rope_qk_norm.h"

namespace deltakern {
namespace {

constexpr char kOp[] = "rope_qk_norm";

bool empty(const Rope& r) { return r.batch == 0 || r.length == 0 || r.heads == 0; }

// Elements, of both tensors
double work(const Rope& r) {
  const double one = static_cast<double>(r.batch) * static_cast<double>(r.length) * static_cast<double>(r.heads * r.width);
  return (r.side[0].x ? one : 0) + (r.side[1].x ? one : 0);
}

constexpr double kSerial = 1 << 15;  // below this starting a team costs more

}  // namespace

void check_rope(const Rope& r, bool backward) {
  int64_t elements = 1;
  for (int64_t size : {r.batch, r.length, r.heads, r.width}) {
    if (size < 0) refuse(kOp, "sizes must not be negative");
    if (size != 0 && elements > std::numeric_limits<int64_t>::max() / 8 / size) refuse(kOp, "sizes overflow 64 bits");
    elements *= std::max<int64_t>(size, 1);
  }
  if (r.width < 2 || r.width > kMostChannels || r.width % 2)
    refuse(kOp, "a head must have an even number of channels from 2 to " + std::to_string(kMostChannels) + ", got " + std::to_string(r.width));
  if (r.prefix < 0 || r.prefix > r.length) refuse(kOp, "num_prefix must be from 0 to the number of tokens, got " + std::to_string(r.prefix));
  if (r.period < 1 || (r.length - r.prefix) % r.period) refuse(kOp, "the tables' rows must divide the tokens that rotate, got " + std::to_string(r.period));
  check_address(kOp, r.cos, 4, "cos", !empty(r));
  check_address(kOp, r.sin, 4, "sin", !empty(r));
  const char* names[] = {"q", "k"};
  for (int i = 0; i < 2; ++i) {
    const RopeSide& side = r.side[i];
    const std::string name = names[i];
    if (side.type != DType::float32 && side.type != DType::bfloat16 && side.type != DType::float16)
      refuse(kOp, name + ": dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got " + std::to_string(static_cast<int>(side.type)));
    if (side.x == nullptr) continue;
    const int64_t size = side.type == DType::float32 ? 4 : 2;
    check_address(kOp, side.x, size, name, true);
    check_address(kOp, side.out, size, name + "'s output", !empty(r));
    check_address(kOp, side.weight, 4, name + "'s weight", false);
    if (backward) check_address(kOp, side.grad, size, name + "'s incoming gradient", !empty(r));
    for (int d = 0; d < 3; ++d)
      if (side.x_stride[d] < 0 || side.out_stride[d] < 0 || (backward && side.grad_stride[d] < 0)) refuse(kOp, name + ": strides must not be negative");
  }
}

void rope_qk_norm_forward_cpu(const Rope& r, int threads, const char* isa) {
  check_rope(r, false);
  const RopeKernels& kernels = DK_TABLE_OF(isa_named(isa), rope);
  if (empty(r)) return;
  const int64_t tokens = r.batch * r.length;
  if (work(r) < kSerial) threads = 1;
  if (threads == 1) return kernels.forward(r, 0, tokens);
  const int64_t chunks = (tokens + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < chunks; ++c) kernels.forward(r, c * kChunk, std::min(tokens, (c + 1) * kChunk));
}

void rope_qk_norm_backward_cpu(const Rope& r, float* sums, int threads, const char* isa) {
  check_rope(r, true);
  check_address(kOp, sums, 4, "sums", true);
  const RopeKernels& kernels = DK_TABLE_OF(isa_named(isa), rope);
  const int64_t columns = 2 * r.width;
  std::fill(sums, sums + columns, 0.0f);
  if (empty(r)) return;
  const int64_t tokens = r.batch * r.length, chunks = (tokens + kChunk - 1) / kChunk;
  if (work(r) < kSerial) threads = 1;
  std::unique_ptr<float[]> partial(new float[chunks * columns]);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t c = 0; c < chunks; ++c) {
    float* mine = partial.get() + c * columns;
    std::fill(mine, mine + columns, 0.0f);
    kernels.backward(r, c * kChunk, std::min(tokens, (c + 1) * kChunk), mine);
  }
  for (int64_t column = 0; column < columns; ++column) {
    double total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += static_cast<double>(partial[c * columns + column]);
    sums[column] = static_cast<float>(total);
  }
}

}  // namespace deltakern
