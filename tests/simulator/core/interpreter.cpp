// Runs the warps of a block: one after the other, each until it has to wait.
#include <algorithm>

#include "checker.h"
#include "launch.h"
#include "ops_barrier.h"

namespace sim {
namespace {

constexpr uint64_t kTurn = 1 << 16;  // instructions before another warp has its turn
constexpr uint32_t kPatience = 4;    // turns after which lanes no longer wait for others at a join
constexpr int kIdleRounds = 8;       // rounds of all warps without progress: a deadlock

std::string place(const Warp& w, int lane) {
  const Launch& launch = *w.block->launch;
  const Kernel& kernel = *launch.kernel;
  const Instr& instr = kernel.code[w.pc];
  std::ostringstream text;
  text << kernel.name << ", block (" << w.block->x << ", " << w.block->y << ", " << w.block->z
       << "), ";
  if (lane >= 0) {
    const uint32_t thread = static_cast<uint32_t>(w.index * kLanes + lane);
    const Dim& b = launch.block;
    text << "thread (" << thread % b.x << ", " << thread / b.x % b.y << ", " << thread / b.x / b.y
         << "), ";
  }
  text << "warp " << w.index;
  if (instr.source != kNoSource) {
    const ptx::Instruction& source = kernel.sources[instr.source];
    text << ", PTX line " << instr.line << " (" << source.text() << ")";
    if (const auto file = kernel.files.find(source.source_file); file != kernel.files.end()) {
      text << ", " << file->second << ":" << source.source_line;
    }
  }
  return text.str();
}

// Takes up a path of the warp whose turn it is; false: no lane is left.
bool resume(Warp& w) {
  for (auto i = static_cast<int32_t>(w.joins.size()) - 1; i >= 0; --i) {
    Join& join = w.joins[i];
    if (join.expected == 0 || join.arrived != join.expected) continue;
    w.active = join.expected;
    w.pc = join.pc + 1;
    w.calls.resize(join.depth);
    w.join = join.parent;
    w.turns = 0;
    join.expected = join.arrived = 0;
    // The calls of all lanes that meet here are the same; those of the last one to run are kept.
    while (!w.joins.empty() && w.joins.back().expected == 0) w.joins.pop_back();
    return true;
  }
  if (w.paths.empty()) return false;
  Path path = std::move(w.paths.back());
  w.paths.pop_back();
  w.active = path.mask;
  w.pc = path.pc;
  w.join = path.join;
  w.calls = std::move(path.calls);
  return true;
}

// Lanes that wait at a join go on alone: others may spin until these have released a lock.
void break_joins(Warp& w) {
  for (Join& join : w.joins) {
    if (join.arrived == 0) continue;
    std::vector<uint32_t> calls(w.calls.begin(), w.calls.begin() + static_cast<long>(join.depth));
    w.paths.push_back(Path{join.pc + 1, join.arrived, join.parent, std::move(calls)});
    join.expected &= ~join.arrived;
    join.arrived = 0;
  }
  w.turns = 0;
}

void rotate(Warp& w) {
  if (w.paths.empty()) return;
  w.paths.insert(w.paths.begin(), Path{w.pc, w.active, w.join, w.calls});
  resume(w);
}

int32_t new_join(Warp& w, uint32_t pc) {
  w.joins.push_back(Join{w.join, pc, w.active, 0, w.calls.size()});
  return static_cast<int32_t>(w.joins.size()) - 1;
}

void enter_join(Warp& w, const Instr& instr) {
  if (w.join >= 0) {
    const Join& at = w.joins[w.join];
    if (at.pc == static_cast<uint32_t>(instr.reconverge) && at.depth == w.calls.size()) return;
  }
  w.join = new_join(w, static_cast<uint32_t>(instr.reconverge));
}

void branch(Warp& w, const Instr& instr, uint32_t taken) {
  const uint32_t stays = w.active & ~taken;
  if (taken && stays) {
    if (instr.reconverge >= 0) enter_join(w, instr);
    w.paths.push_back(Path{static_cast<uint32_t>(instr.target), taken, w.join, w.calls});
    w.active = stays;
    ++w.pc;
  } else {
    w.pc = taken ? static_cast<uint32_t>(instr.target) : w.pc + 1;
  }
}

void branch_table(Warp& w, const Instr& instr) {
  const auto& table = *static_cast<const std::vector<int32_t>*>(instr.extra);
  const uint32_t* index = w.lanes<uint32_t>(instr.ops[0]);
  uint32_t left = w.active;
  const bool same = std::all_of(index, index + kLanes, [&](const uint32_t& i) {
    return !(left >> (&i - index) & 1) || i == index[first_lane(left)];
  });
  if (!same && instr.reconverge >= 0) enter_join(w, instr);
  while (left) {
    const uint32_t chosen = index[first_lane(left)];
    if (chosen >= table.size()) {
      fault(Kind::kTrap, first_lane(left), "index ", chosen, " of a table of ", table.size());
    }
    uint32_t lanes = 0;
    for (int i = 0; i < kLanes; ++i) lanes |= uint32_t{(left >> i & 1) && index[i] == chosen} << i;
    left &= ~lanes;
    w.paths.push_back(Path{static_cast<uint32_t>(table[chosen]), lanes, w.join, w.calls});
  }
  resume(w);
}

// Arrives where the paths of a branch meet; false: the warp has no path left to run.
bool join(Warp& w) {
  if (w.join >= 0) {
    Join& at = w.joins[w.join];
    if (at.pc == w.pc && at.depth == w.calls.size()) {
      at.arrived |= w.active;
      return resume(w);
    }
  }
  ++w.pc;
  return true;
}

bool leave(Warp& w, uint32_t lanes) {
  w.alive &= ~lanes;
  for (Join& at : w.joins) {
    at.expected &= ~lanes;
    at.arrived &= ~lanes;
  }
  w.active &= ~lanes;
  if (w.active) {
    ++w.pc;
    return true;
  }
  return resume(w);
}

uint32_t guard_mask(Warp& w, const Instr& instr) {
  if (!instr.guarded) return w.active;
  const uint32_t guard = w.predicate(instr.guard);
  return w.active & (instr.guard_negated ? ~guard : guard);
}

// False: every lane has exited.
bool step(Warp& w, const Instr& instr, uint32_t mask) {
  switch (instr.flow) {
    case Flow::kNext:
      if (mask && w.wgmma.pending) guard_wgmma_registers(w, instr, mask);
      if (mask) instr.exec(w, instr, mask);
      if (w.clashed) w.block->checker->settle(w);
      ++w.pc;
      return true;
    case Flow::kBranch:
      branch(w, instr, mask);
      return true;
    case Flow::kBranchTable:
      branch_table(w, instr);
      return true;
    case Flow::kCall:
      if (mask != w.active) fault(Kind::kUnsupported, -1, "a predicated call that diverges");
      w.calls.push_back(w.pc + 1);
      w.pc = static_cast<uint32_t>(instr.target);
      return true;
    case Flow::kReturn:
      w.pc = w.calls.back();
      w.calls.pop_back();
      return true;
    case Flow::kExit:
      if (mask == 0) {
        ++w.pc;
        return true;
      }
      return leave(w, mask);
    case Flow::kJoin:
      return join(w);
  }
  return false;
}

// Runs until the warp waits, yields, ends, or has had its turn. Returns instructions issued.
uint64_t run_warp(Warp& w) {
  const std::vector<Instr>& code = w.block->launch->kernel->code;
  uint64_t* issued = w.profile->issued.data();
  uint64_t count = 0;
  for (; count < kTurn && w.wait == Wait::kNothing && !w.yield; ++count) {
    const Instr& instr = code[w.pc];
    ++issued[w.pc];
    w.issued += instr.source != kNoSource;
    if (!step(w, instr, guard_mask(w, instr))) {
      w.wait = Wait::kExited;
      barrier_warp_exited(*w.block, w);
      ++w.block->progress;
    }
  }
  if (count == kTurn && ++w.turns == kPatience) break_joins(w);
  if (w.wait == Wait::kNothing) rotate(w);
  w.yield = false;
  return count;
}

void spend(const Launch& launch, uint64_t instructions) {
  if (launch.issued.fetch_add(instructions) + instructions <= launch.limit) return;
  fault(Kind::kTimeout, -1, "more than ", launch.limit, " warp instructions");
}

}  // namespace

void run_block(Block& block, Profile* profile) {
  const Launch& launch = *block.launch;
  for (Warp& w : block.warps) w.profile = profile;
  for (int idle = 0; !launch.failed;) {
    bool any = false, exhausted = false;
    const uint64_t before = block.progress;
    Warp* waiting = nullptr;
    for (Warp& w : block.warps) {
      if (w.wait == Wait::kBarrier) waiting = &w;
      if (w.wait != Wait::kNothing) continue;
      any = true;
      try {
        const uint64_t used = run_warp(w);
        exhausted |= used == kTurn;
        spend(launch, used);
      } catch (const Fault& reason) {
        throw Fault(reason.kind, reason.lane,
                    std::string(reason.what()) + " [" + place(w, reason.lane) + "]");
      }
    }
    if (!any && waiting == nullptr) break;
    idle = exhausted || block.progress != before ? 0 : idle + 1;
    if (!any || idle > kIdleRounds) {
      Warp& stuck = waiting ? *waiting : block.warps[0];
      fault(Kind::kDeadlock, -1, "every warp waits for another [", place(stuck, -1), "]");
    }
  }
  uint64_t issued = 0;
  for (const Warp& w : block.warps) issued += w.issued;
  profile->largest_block = std::max(profile->largest_block, issued);
}

}  // namespace sim
