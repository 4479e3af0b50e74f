// A block of threads while it runs.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "memory.h"
#include "warp.h"

namespace sim {

class Checker;  // who touched which byte of shared memory, and who knows of it (checker.h)

constexpr int kBarriers = 16;

struct Barrier {
  uint32_t expected = 0;  // threads; 0: nobody has come
  uint32_t arrived = 0;
  uint32_t votes_and = kAll, votes_or = 0, votes_count = 0;  // bar.red
  std::vector<int> waiting;                                  // warps
};

struct Launch;  // the grid: kernel, sizes, global memory, limits (launch.h)

struct Block {
  const Launch* launch;
  uint32_t x, y, z;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  std::unique_ptr<Checker> checker;
  std::array<Barrier, kBarriers> barriers;
  std::vector<uint8_t> local;          // [warp][lane][local_bytes]
  std::vector<uint8_t> local_written;  // likewise, 1 where written
  uint32_t local_bytes = 0;
  uint64_t progress = 0;  // counts what could let a waiting warp go on
};

}  // namespace sim
