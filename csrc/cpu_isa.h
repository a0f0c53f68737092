// Which of the compiled instruction sets runs.
#pragma once

#include <string>

namespace deltakern {

enum class Isa { baseline, avx2, avx512 };

// Names of the instruction sets in this build that this machine has, best first, separated by spaces.
const char* cpu_instruction_sets();

// The one of that name, the best for "auto". Throws std::invalid_argument for any other name.
Isa isa_named(const std::string& name);

}  // namespace deltakern

// The table of functions of `isa`, one of NAME_baseline, NAME_avx2 and NAME_avx512; a build for other machines has the first alone.
#if defined(DELTAKERN_X86)
#define DK_TABLE_OF(isa, NAME) (*((isa) == Isa::avx512 ? &NAME##_avx512 : (isa) == Isa::avx2 ? &NAME##_avx2 : &NAME##_baseline))
#else
#define DK_TABLE_OF(isa, NAME) (static_cast<void>(isa), NAME##_baseline)
#endif
