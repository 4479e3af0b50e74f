// One launch: its grid, and what it counted.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "block.h"
#include "kernel.h"

namespace sim {

struct Dim {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

struct Launch {
  const Kernel* kernel;
  Dim grid, block;
  uint32_t dynamic_shared = 0;
  std::vector<Line> params;
  std::vector<std::byte> constants;
  GlobalMemory memory;
  bool race_check = true;
  uint64_t limit = 0;  // warp instructions of the whole launch
  mutable std::atomic<uint64_t> issued{0};
  mutable std::atomic<bool> failed{false};
};

// A Fault with the place where it happened.
struct Failure {
  Kind kind;
  std::string message;
};

// Runs every block, on `threads` workers. Throws Fault, its message complete with the place.
Profile run(Launch& launch, int threads);

// Runs one block to its end.
void run_block(Block& block, Profile* profile);

}  // namespace sim
