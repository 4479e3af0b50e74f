// Barriers of a block: who has come, who waits, and what they then know of each other.
#pragma once

#include <cstdint>
#include <vector>

#include "checker.h"

namespace sim {

struct Block;
struct Warp;
struct Instr;

constexpr int kBarriers = 17;  // the last one is the cluster's, which is one block

struct Barrier {
  struct Waiting {
    int warp;
    uint32_t mask;
    const Instr* instr;
  };
  bool whole = false;     // all threads of the block, or `expected` of them
  uint32_t expected = 0;  // threads; 0: nobody has come
  uint32_t arrived = 0;
  bool all = true, any = false;  // bar.red over the predicates of who has come
  uint32_t votes = 0;
  uint32_t phase = 0;           // how often it has opened
  std::vector<Waiting> asleep;  // whole warps
  std::vector<Waiting> parked;  // some lanes of a warp, which try again
  std::vector<Waiting> passed;  // parked ones that may go on
  Knowledge knowledge;
};

// Barriers for all threads of the block do not wait for those that have exited.
void barrier_warp_exited(Block& block, Warp& warp);

// fence.proxy and fence.mbarrier_init, where asynchronous copies are (ops_async.cpp).
void decode_proxy_fence(const ptx::Instruction&, Assembler&, Instr*);

}  // namespace sim
