// The state of one warp, and what an instruction may do with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "error.h"
#include "program.h"

namespace sim {

struct Block;
struct Kernel;

constexpr uint32_t kAll = 0xffffffffu;
constexpr int kLanes = 32;

// Generic addresses: global memory is host memory as it is; these windows hold the rest. Their low
// 32 bits are the offset in the block's shared or the thread's local memory.
constexpr uint64_t kSharedWindow = uint64_t{1} << 56;
constexpr uint64_t kLocalWindow = uint64_t{2} << 56;
constexpr uint64_t kWindowMask = uint64_t{0xff} << 56;

// Lanes that run together. Divergence splits a path; a Join merges its lanes again.
struct Path {
  uint32_t pc = 0;
  uint32_t mask = 0;
  int32_t join = -1;            // innermost Join of the warp that this path will reach, or -1
  std::vector<uint32_t> calls;  // return addresses
};

struct Join {
  int32_t parent;
  uint32_t pc;
  uint32_t expected, arrived;
  size_t depth;  // of calls
};

// What a warp waits for.
enum class Wait : uint8_t { kNothing, kBarrier, kExited };

// What a memory instruction cost, summed per PTX instruction.
struct Cost {
  uint64_t accesses = 0, took = 0, minimum = 0, bytes = 0;
};

// Per instruction of the kernel; every worker has its own and they are added in the end.
struct Profile {
  std::vector<uint64_t> issued;
  std::vector<Cost> shared;    // took, minimum: wavefronts
  std::vector<Cost> global;    // took, minimum: 32-byte sectors
  uint64_t largest_block = 0;  // warp instructions of the block that issued most
};

// The groups that are open now, counted from 1: those before are committed.
struct AsyncState {
  uint32_t copies = 1, bulk = 1;  // cp.async, cp.async.bulk
};

// The wgmma operations of a warp (ops_wgmma.cpp). Their groups are numbered from 1.
struct WgmmaState {
  bool pending = false;  // some are not waited for: their registers are guarded
  bool fenced = false;   // by a wgmma.fence
  bool waiting = false;
  uint32_t waits = 0;                      // that this warp came to
  uint32_t group = 1, last = 0, done = 0;  // now open; with operations; waited for
  uint64_t digest = 0;                     // of what was issued, the same in the warps of a group
  std::vector<uint32_t> slots;             // per 64 bytes of registers: 2 group + is accumulator
};

struct Warp {
  std::byte* bank[2];  // registers of this warp, constants of the launch
  Block* block;
  Profile* profile;
  int index;        // in the block
  uint32_t alive;   // lanes that exist and have not exited
  uint32_t active;  // lanes of the path that runs
  uint32_t pc;      // index of the instruction that runs
  Wait wait = Wait::kNothing;
  bool yield = false;       // set by an instruction: let the other warps run first
  bool clashed = false;     // a store wrote where another warp did (checker.h)
  std::vector<Path> paths;  // that wait for their turn; the running one is not among them
  std::vector<Join> joins;
  int32_t join = -1;                           // of the running path
  std::vector<uint32_t> calls;                 // of the running path
  uint32_t sync_arrived = 0, sync_passed = 0;  // lanes at a bar.warp.sync, and those that may go on
  uint64_t issued = 0;                         // instructions of the program
  uint32_t turns = 0;                          // full ones since lanes last met at a join
  AsyncState async;
  uint32_t cluster_phase = 0;  // of the cluster's barrier, to wait for
  WgmmaState wgmma;

  template <class T>
  T* lanes(Ref ref) {
    return reinterpret_cast<T*>(bank[ref.bank] + ref.offset);
  }
  uint32_t& predicate(Ref ref) { return *lanes<uint32_t>(ref); }

  // d[lane] = value[lane] for the lanes in mask.
  template <class T>
  void write(Ref ref, const T* value, uint32_t mask) {
    T* d = lanes<T>(ref);
    if (mask == kAll) {
      std::memcpy(d, value, kLanes * sizeof(T));
    } else {
      for (int i = 0; i < kLanes; ++i) d[i] = mask >> i & 1 ? value[i] : d[i];
    }
  }
  void write_predicate(Ref ref, uint32_t value, uint32_t mask) {
    uint32_t& d = predicate(ref);
    d = (d & ~mask) | (value & mask);
  }
};

// Faults where an instruction uses a register of a wgmma that the warp has not waited for.
void guard_wgmma_registers(Warp&, const Instr&, uint32_t mask);

inline int first_lane(uint32_t mask) { return __builtin_ctz(mask); }

}  // namespace sim
