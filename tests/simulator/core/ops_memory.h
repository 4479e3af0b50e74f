// What loads, stores and atomics share.
#pragma once

#include <initializer_list>

#include "program.h"

namespace sim {

void add_atomics(Decoders*);

// Types, state spaces, memory order, scopes and cache hints are known; `more` is what else may
// come.
void check_memory_modifiers(const ptx::Instruction& i, std::initializer_list<const char*> more);

}  // namespace sim
