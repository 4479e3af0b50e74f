// What loads, stores and atomics share.
#pragma once

#include <initializer_list>

#include "program.h"

namespace sim {

void add_atomics(Decoders*);

// The registers of a vector, or the one that is no vector.
inline std::vector<ptx::Operand> elements(const ptx::Operand& operand) {
  if (operand.form == ptx::Operand::kVector) return operand.parts;
  return {operand};
}

// What an atomic makes of the old value and its operands, as bits.
using Update = uint64_t (*)(uint64_t old, uint64_t b, uint64_t c);
Update update_of(const ptx::Instruction& i, const std::string& type, bool in_shared);
// Applies it to `bytes` bytes of memory that other threads may change; returns the old value.
uint64_t apply_update(uint8_t* at, uint32_t bytes, Update update, uint64_t b, uint64_t c);

// Types, state spaces, memory order, scopes and cache hints are known; `more` is what else may
// come.
void check_memory_modifiers(const ptx::Instruction& i, std::initializer_list<const char*> more);

}  // namespace sim
