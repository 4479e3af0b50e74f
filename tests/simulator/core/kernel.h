// An entry of a module, assembled: code, constants, and what a launch has to provide.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "memory.h"
#include "program.h"
#include "ptx.h"

namespace sim {

// Values that every warp finds in its registers when a block begins.
enum Special : int {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneid,
  kWarpid,
  kNwarpid,
  kSmid,
  kNsmid,
  kLanemaskEq,
  kLanemaskLe,
  kLanemaskLt,
  kLanemaskGe,
  kLanemaskGt,
  kClock,
  kZero,
  kOne,
  kDynamicShared,
  kTotalShared,
  kSpecials
};

constexpr uint32_t kNoSource = 0xffffffffu;  // Instr::source of what the assembler added

struct Param {
  std::string name;
  uint32_t offset, bytes;
};

struct Kernel {
  std::string name;
  std::vector<Instr> code;
  std::vector<ptx::Instruction> sources;  // Instr::source points here
  std::map<int, std::string> files;
  std::vector<Param> params;
  uint32_t param_bytes = 0;
  std::vector<std::byte> constants;
  std::vector<std::pair<uint32_t, uint32_t>> param_addresses;  // constant's place, param offset
  int32_t entry = 0;  // index of the first instruction; callees stand before it
  uint32_t register_bytes = 0;
  uint32_t static_shared = 0;  // bytes; the dynamic part follows, aligned to 1024
  uint32_t local_bytes = 0;    // per thread
  bool dynamic_shared = false;
  int max_threads = 0, required_threads = 0;  // 0: not limited
  int target = 0;

  std::vector<std::shared_ptr<void>> owned;
};

// Variables of a module in global and constant memory, placed once.
struct ModuleMemory {
  std::map<std::string, std::vector<Line>> storage;
  GlobalMemory allocations;
};

std::unique_ptr<ModuleMemory> place_variables(const ptx::Module& module);
std::unique_ptr<Kernel> assemble(const ptx::Module& module, const ModuleMemory& memory,
                                 const std::string& entry);

}  // namespace sim
