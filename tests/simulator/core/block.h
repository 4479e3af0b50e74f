// A block of threads while it runs.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "checker.h"
#include "mbarrier.h"
#include "memory.h"
#include "ops_barrier.h"
#include "warp.h"

namespace sim {

struct Launch;  // the grid: kernel, sizes, global memory, limits (launch.h)

struct Block {
  const Launch* launch;
  uint32_t x, y, z;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  std::unique_ptr<Checker> checker;
  std::array<Barrier, kBarriers> barriers;
  Knowledge cluster_knowledge;             // of all that have come to the cluster's barrier
  std::map<uint64_t, Mbarrier> mbarriers;  // by offset in shared memory
  int mbarriers_made = 0;
  std::vector<uint8_t> local;          // [warp][lane][local_bytes]
  std::vector<uint8_t> local_written;  // likewise, 1 where written
  uint32_t local_bytes = 0;
  uint64_t progress = 0;  // counts what could let a waiting warp go on
};

}  // namespace sim
