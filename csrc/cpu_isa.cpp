#include "cpu_isa.h"

#include <stdexcept>
#include <vector>

#if defined(DELTAKERN_X86)
#include <cpuid.h>
#endif

namespace deltakern {
namespace {

struct Choice {
  const char* name;
  Isa isa;
};

std::vector<Choice> available() {
  std::vector<Choice> found;
#if defined(DELTAKERN_X86)
  __builtin_cpu_init();
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    found.push_back({"avx512", Isa::avx512});
  if (avx2) found.push_back({"avx2", Isa::avx2});
#endif
  found.push_back({"baseline", Isa::baseline});
  return found;
}

const std::vector<Choice>& choices() {
  static const std::vector<Choice> found = available();
  return found;
}

}  // namespace

const char* cpu_instruction_sets() {
  static const std::string names = [] {
    std::string all;
    for (const Choice& choice : choices()) all += (all.empty() ? "" : " ") + std::string(choice.name);
    return all;
  }();
  return names.c_str();
}

Isa isa_named(const std::string& name) {
  if (name == "auto") return choices().front().isa;
  for (const Choice& choice : choices())
    if (name == choice.name) return choice.isa;
  throw std::invalid_argument("isa must be auto or one of " + std::string(cpu_instruction_sets()) + ", got " + name);
}

}  // namespace deltakern
