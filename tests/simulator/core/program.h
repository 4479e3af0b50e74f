// A kernel ready to run: instructions with resolved operands, and the decoders that make them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "ptx.h"

namespace sim {

struct Warp;
struct Instr;

// Executes one instruction for the lanes in mask (never 0).
using Exec = void (*)(Warp&, const Instr&, uint32_t mask);

// A value per lane. Up to 32 bits: uint32_t[32] (16-bit values are zero-extended), 64 bits:
// uint64_t[32], a predicate: one uint32_t with a bit per lane. bank 0: the warp's own registers,
// bank 1: constants of the kernel, the same for all warps.
struct Ref {
  uint32_t offset : 31;  // bytes
  uint32_t bank : 1;
};

enum class Class : uint8_t {
  kTensor,
  kSpecial,  // special function unit: ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh
  kFp32,
  kFp64,
  kHalf,
  kInteger,
  kConvert,
  kLdmatrix,  // and stmatrix, movmatrix
  kShared,
  kAsync,  // cp.async, bulk copies, commit, wait, mbarrier
  kGlobal,
  kLocal,
  kShuffle,  // shfl, vote, match, redux
  kMove,     // mov, selp, cvta, ld.param
  kControl,  // branches, calls, exit
  kBarrier,  // bar, barrier, fences
  kCount,
};

const char* name_of(Class c);

// How the interpreter proceeds after an instruction; kNext runs exec and goes on.
enum class Flow : uint8_t { kNext, kBranch, kBranchTable, kCall, kReturn, kExit, kJoin };

struct Instr {
  Exec exec = nullptr;
  const Ref* ops = nullptr;     // destinations first
  int64_t imm = 0;              // an address offset, a byte count: the decoder's choice
  uint64_t aux = 0;             // flags of the decoder's choice
  const void* extra = nullptr;  // what does not fit, owned by the program
  Ref guard{};
  uint8_t op_count = 0;
  bool guarded = false, guard_negated = false;
  Flow flow = Flow::kNext;
  Class klass = Class::kMove;
  uint32_t mma_flops = 0;   // of the whole warp
  int32_t target = -1;      // of a branch or call; kJoin: unused
  int32_t reconverge = -1;  // of a branch: the kJoin where its paths meet
  uint32_t line = 0;        // of the PTX text
  uint32_t source = 0;      // index into the parsed body, for messages
};

// Turns parsed operands into Refs while an instruction is decoded.
class Assembler {
 public:
  virtual ~Assembler() = default;
  // A value of `bits` (1: predicate, 16, 32, 64) to read; an immediate becomes a constant, a
  // floating immediate in the format that `real` names ("f16", "bf16", "f32", "f64").
  virtual Ref read(const ptx::Operand& operand, int bits, const char* real = "") = 0;
  virtual Ref write(const ptx::Operand& operand, int bits) = 0;  // "_" becomes a scratch register
  virtual int bits_of(const ptx::Operand& operand) = 0;          // declared width; 0: an immediate
  virtual bool is_immediate(const ptx::Operand& operand, int64_t* value) = 0;
  // [reg + imm], [symbol + imm]: the base as a 64-bit value per lane, and the offset. `space` is
  // that of the symbol, or what the instruction says.
  virtual Ref address(const ptx::Operand& operand, int64_t* offset) = 0;
  virtual void set_ops(Instr* instr, std::vector<Ref> refs) = 0;  // the program owns them
  virtual void* own(std::shared_ptr<void> extra) = 0;
  virtual int target() const = 0;  // 90 for sm_90a
};

using Decode = void (*)(const ptx::Instruction&, Assembler&, Instr*);
using Decoders = std::unordered_map<std::string, Decode>;  // by opcode: "fma"

// One per family; each stands in the file named after it.
void add_arithmetic(Decoders*);  // ops_float.cpp, ops_half.cpp, ops_integer.cpp, ops_convert.cpp
void add_memory(Decoders*);      // ld, st, atom, red, prefetch, cvta, isspacep
void add_async(Decoders*);       // cp.async, mbarrier, bulk and tensor copies, fences, tensormap
void add_barriers(Decoders*);    // bar, barrier, membar
void add_tensor(Decoders*);      // mma, ldmatrix, stmatrix, movmatrix, wgmma
void add_warp(Decoders*);        // shfl, vote, match, redux, activemask, elect, mov, selp, ...

}  // namespace sim
