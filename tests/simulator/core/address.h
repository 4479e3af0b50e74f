// From the addresses of an instruction to host memory, every lane checked.
#pragma once

#include <string>

#include "memory.h"
#include "program.h"

namespace sim {

enum class Where : uint8_t { kGeneric, kGlobal, kShared, kLocal, kConst };

enum class Use : uint8_t { kLoad, kStore, kAtomic };

// The state space that an instruction names; parameters and constants are read as kConst.
Where space_of(const ptx::Instruction& instruction);

// pointers[lane] for the lanes in mask: `bytes` bytes at base[lane] + imm, which are
// bounds-checked, aligned, counted, and for shared and local memory known to be written where they
// are read.
void resolve(Warp& w, const Instr& i, const uint64_t* addresses, Where where, uint32_t bytes,
             Use use, uint32_t mask, uint8_t** pointers);

// A global range of any length that one lane touches in bulk; not counted.
uint8_t* global_range(Warp& w, int lane, uint64_t address, uint64_t bytes, bool write);

}  // namespace sim
