// A barrier in shared memory that counts arrivals and the bytes of asynchronous copies.
#pragma once

#include <cstdint>

#include "checker.h"

namespace sim {

struct Mbarrier {
  int number = 0;  // in the block: its actor in the checker
  uint32_t expected = 0, pending = 0;
  int64_t bytes = 0;        // announced and not yet arrived
  uint32_t phase = 0;       // phases completed
  uint32_t seen = 0;        // warps that know of its initialisation
  Knowledge arrived, done;  // of who came in the running phase, and in the completed ones
};

}  // namespace sim
