// What the CPU drivers say of arguments that they do not take.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace deltakern {

[[noreturn]] inline void refuse(const char* op, const std::string& what) { throw std::invalid_argument(std::string(op) + ": " + what); }

inline void check_address(const char* op, const void* address, int64_t size, const std::string& name, bool needed) {
  if (needed && address == nullptr) refuse(op, name + ": null pointer");
  if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(size)) refuse(op, name + ": misaligned address");
}

}  // namespace deltakern
