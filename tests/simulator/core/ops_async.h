// The families of asynchronous instructions, and what they share.
#pragma once

#include "address.h"
#include "block.h"
#include "ops_arithmetic.h"

namespace sim {

void add_mbarrier(Decoders*);  // ops_mbarrier.cpp
void decode_copy_async(const ptx::Instruction&, Assembler&, Instr*);
void decode_bulk(const ptx::Instruction&, Assembler&, Instr*);         // ops_bulk.cpp
void decode_bulk_reduce(const ptx::Instruction&, Assembler&, Instr*);  // cp.reduce.async.bulk
void decode_copy_arrive(const ptx::Instruction&, Assembler&, Instr*);  // cp.async.mbarrier.arrive

// The mbarrier at this offset in shared memory; a fault where none was initialised, or where its
// initialisation is not known to the warp.
Mbarrier& mbarrier_at(Warp& w, int lane, uint64_t offset);
// The asynchronous writes that the mbarrier's running phase counts.
Event event_of(const Warp& w, const Mbarrier& m);
// Bytes of a copy have arrived.
void complete_bytes(Warp& w, Mbarrier& m, uint64_t bytes);

inline uint64_t shared_offset(uint64_t address) { return address & ~kWindowMask; }

inline void needs_target(const ptx::Instruction& i, Assembler& a, int target) {
  if (a.target() < target) fault(Kind::kUnsupported, -1, i.text(), " needs sm_", target);
}

}  // namespace sim
