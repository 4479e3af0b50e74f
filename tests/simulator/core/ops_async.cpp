// Asynchronous copies and the barriers in shared memory that count them.
#include "ops_arithmetic.h"
#include "ops_barrier.h"

namespace sim {

void decode_proxy_fence(const ptx::Instruction& i, Assembler&, Instr*) { unknown(i); }

void add_async(Decoders*) {}

}  // namespace sim
