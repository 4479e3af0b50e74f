// Shared memory with its checks: bounds, alignment, initialisation, races, asynchronous copies.
// Global memory as a set of allocations. Local memory per thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "warp.h"

namespace sim {

// Host memory that a GPU would align like this: parameters, variables.
struct alignas(128) Line {
  std::byte bytes[128];
};
inline std::vector<Line> lines_for(uint64_t bytes) { return std::vector<Line>(bytes / 128 + 1); }

struct Allocation {
  uint64_t begin, end;
  bool writable;
};

// The allocations that a launch may touch, sorted, not overlapping.
class GlobalMemory {
 public:
  void add(uint64_t begin, uint64_t bytes, bool writable);
  // The allocation that holds [address, address + bytes), or null.
  const Allocation* find(uint64_t address, uint64_t bytes) const;
  std::string nearest(uint64_t address) const;  // for messages

 private:
  std::vector<Allocation> allocations_;
};

// Checked accesses of `bytes` bytes (a power of two up to 16; any multiple of 16 in bulk) at
// `offset` in the block's shared memory by one lane; the pointer is good for just these bytes.
const uint8_t* shared_read(Warp&, int lane, uint64_t offset, uint32_t bytes);
uint8_t* shared_write(Warp&, int lane, uint64_t offset, uint32_t bytes);
// Neither reads nor writes of an atomic race with other atomics.
uint8_t* shared_atomic(Warp&, int lane, uint64_t offset, uint32_t bytes);

// Wavefronts that a shared-memory access of the lanes in mask takes, and the fewest that it could:
// up to 4 bytes per lane in one phase, 8 in two half-warps, 16 in four quarter-warps.
void count_shared(Warp&, const uint64_t* offsets, uint32_t bytes, uint32_t mask);
// ldmatrix and its like: phases of 8 rows of 16 bytes.
void count_shared_rows(Warp&, const uint64_t* offsets, int rows);
// 32-byte sectors touched, and bytes / 32.
void count_global(Warp&, const uint64_t* addresses, uint32_t bytes, uint32_t mask);

}  // namespace sim
