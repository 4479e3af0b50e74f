// bar, barrier, membar, fence. PTX ISA, "Parallel Synchronization and Communication Instructions".
#include "ops_barrier.h"

#include <algorithm>

#include "block.h"
#include "ops_arithmetic.h"

namespace sim {
namespace {

constexpr int kCluster = kBarriers - 1;

enum Action : uint64_t { kSync, kArrive, kPopc, kAnd, kOr, kWait };

// aux: the action, and bit 8 where all lanes of the warp have to come together.
Action action(const Instr& i) { return static_cast<Action>(i.aux & 0xff); }
constexpr uint64_t kAligned = 0x100;

// Runs this instruction again when the other warps had their turn; it counts once.
void stay(Warp& w) {
  --w.profile->issued[w.pc];
  --w.issued;
  --w.pc;
  w.yield = true;
}

uint32_t alive_threads(const Block& block) {
  uint32_t count = 0;
  for (const Warp& w : block.warps) count += static_cast<uint32_t>(__builtin_popcount(w.alive));
  return count;
}

void give_result(Warp& w, const Instr& i, const Barrier& barrier, uint32_t mask) {
  if (action(i) == kPopc) {
    uint32_t value[kLanes];
    std::fill_n(value, kLanes, barrier.votes);
    w.write(i.ops[0], value, mask);
  } else if (action(i) == kAnd || action(i) == kOr) {
    const bool vote = action(i) == kAnd ? barrier.all : barrier.any;
    w.write_predicate(i.ops[0], vote ? kAll : 0, mask);
  }
}

void open(Block& block, Barrier& barrier) {
  for (const Barrier::Waiting& entry : barrier.asleep) {
    Warp& w = block.warps[static_cast<size_t>(entry.warp)];
    block.checker->acquire(entry.warp, barrier.knowledge);
    give_result(w, *entry.instr, barrier, entry.mask);
    w.wait = Wait::kNothing;
  }
  for (const Barrier::Waiting& entry : barrier.parked) {
    Warp& w = block.warps[static_cast<size_t>(entry.warp)];
    block.checker->acquire(entry.warp, barrier.knowledge);
    give_result(w, *entry.instr, barrier, entry.mask);
    barrier.passed.push_back(entry);
  }
  const uint32_t phase = barrier.phase + 1;
  std::vector<Barrier::Waiting> passed = std::move(barrier.passed);
  barrier = Barrier{};
  barrier.phase = phase;
  barrier.passed = std::move(passed);
  ++block.progress;
}

bool complete(const Block& block, const Barrier& barrier) {
  if (barrier.arrived == 0) return false;
  return barrier.arrived == (barrier.whole ? alive_threads(block) : barrier.expected);
}

// The barrier that the lanes name, the same for all of them.
uint32_t uniform(Warp& w, Ref ref, uint32_t mask, const char* what) {
  const uint32_t* lanes = w.lanes<uint32_t>(ref);
  const uint32_t value = lanes[first_lane(mask)];
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((mask >> lane & 1) && lanes[lane] != value) {
      fault(Kind::kBarrier, lane, "lanes of one warp name different ", what);
    }
  }
  return value;
}

void check_expected(const Barrier& barrier, bool whole, uint32_t threads) {
  if (barrier.arrived == 0) return;
  if (barrier.whole == whole && (whole || barrier.expected == threads)) return;
  fault(Kind::kBarrier, -1, "waits for ", whole ? "all" : std::to_string(threads),
        " threads where others wait for ",
        barrier.whole ? "all" : std::to_string(barrier.expected));
}

void vote(Warp& w, const Instr& i, Barrier* barrier, uint32_t mask) {
  if (action(i) != kPopc && action(i) != kAnd && action(i) != kOr) return;
  const uint32_t given = w.predicate(i.ops[3]);
  const uint32_t yes = (i.imm ? ~given : given) & mask;
  barrier->all &= yes == mask;
  barrier->any |= yes != 0;
  barrier->votes += static_cast<uint32_t>(__builtin_popcount(yes));
}

// True: the lanes may go on.
bool wait(Warp& w, const Instr& i, Barrier& barrier, uint32_t mask) {
  const Barrier::Waiting entry{w.index, mask, &i};
  if (mask == w.alive && w.paths.empty()) {
    barrier.asleep.push_back(entry);
    w.wait = Wait::kBarrier;
    return true;
  }
  barrier.parked.push_back(entry);
  return false;
}

bool take(std::vector<Barrier::Waiting>* list, const Warp& w, const Instr& i, uint32_t mask) {
  const auto found = std::find_if(list->begin(), list->end(), [&](const Barrier::Waiting& e) {
    return e.warp == w.index && e.instr == &i && e.mask == mask;
  });
  if (found == list->end()) return false;
  list->erase(found);
  return true;
}

void arrive(Warp& w, const Instr& i, Barrier& barrier, bool whole, uint32_t threads,
            uint32_t mask) {
  check_expected(barrier, whole, threads);
  barrier.whole = whole;
  barrier.expected = threads;
  // A warp with lanes that the block lacks still counts as a whole one.
  const bool counts_whole = !whole && mask == w.alive;
  barrier.arrived += counts_whole ? kLanes : static_cast<uint32_t>(__builtin_popcount(mask));
  if (!whole && barrier.arrived > threads) {
    fault(Kind::kBarrier, -1, barrier.arrived, " threads came to a barrier for ", threads);
  }
  w.block->checker->release(w.index, &barrier.knowledge);
  vote(w, i, &barrier, mask);
}

// ops: result, barrier, threads (0: all), predicate.
void bar(Warp& w, const Instr& i, uint32_t mask) {
  const uint32_t name = uniform(w, i.ops[1], mask, "barriers");
  const uint32_t threads = uniform(w, i.ops[2], mask, "thread counts");
  if (name >= kCluster) fault(Kind::kBarrier, -1, "barrier ", name, ", there are 16");
  if ((i.aux & kAligned) && mask != w.alive) {
    fault(Kind::kDivergence, first_lane(w.alive & ~mask),
          "a barrier that only some lanes of the warp come to");
  }
  if (threads % kLanes != 0) {
    fault(Kind::kBarrier, -1, "a barrier for ", threads, " threads, which is no multiple of 32");
  }
  Barrier& barrier = w.block->barriers[name];
  if (take(&barrier.passed, w, i, mask)) return;
  const auto mine = [&](const Barrier::Waiting& e) { return e.warp == w.index && e.mask == mask; };
  const bool again = std::any_of(barrier.parked.begin(), barrier.parked.end(), mine);
  bool goes_on = action(i) == kArrive;
  if (!again) {
    arrive(w, i, barrier, threads == 0, threads, mask);
    goes_on = goes_on || wait(w, i, barrier, mask);
  }
  if (complete(*w.block, barrier)) open(*w.block, barrier);
  if (!goes_on && !take(&barrier.passed, w, i, mask)) stay(w);
}

void decode_bar(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  instr->klass = Class::kBarrier;
  check_modifiers(i, {"cta", "sync", "arrive", "red", "popc", "and", "or", "aligned", "u32", "pred",
                      "warp", "cluster", "acquire", "release", "relaxed", "wait"});
  const bool red = i.has("red"), arrives = i.has("arrive");
  instr->aux = arrives ? kArrive : !red ? kSync : i.has("popc") ? kPopc : i.has("and") ? kAnd : kOr;
  if (!arrives && !red && !i.has("sync")) unknown(i);
  if (i.opcode == "bar" || i.has("aligned")) instr->aux |= kAligned;
  const size_t first = red ? 1 : 0, count = i.operands.size() - first - (red ? 1 : 0);
  if (count < 1 || count > 2 || (arrives && count != 2)) unknown(i);
  ptx::Operand none, sink, p = red ? i.operands.back() : sink;
  none.form = ptx::Operand::kInteger;
  sink.form = ptx::Operand::kSink;
  instr->imm = p.negated;
  p.negated = false;
  const Ref threads = a.read(count == 2 ? i.operands[first + 1] : none, 32);
  const int result = i.has("popc") ? 32 : 1;
  a.set_ops(instr, {a.write(red ? i.operands[0] : sink, result), a.read(i.operands[first], 32),
                    threads, red ? a.read(p, 1) : threads});
  instr->exec = bar;
}

void cluster_arrive(Warp& w, const Instr& i, uint32_t mask) {
  Barrier& barrier = w.block->barriers[kCluster];
  arrive(w, i, barrier, true, 0, mask);
  w.cluster_phase = barrier.phase + 1;
  w.block->cluster_knowledge.join(barrier.knowledge);
  if (complete(*w.block, barrier)) open(*w.block, barrier);
}

void cluster_wait(Warp& w, const Instr&, uint32_t) {
  Block& block = *w.block;
  if (w.cluster_phase == 0) fault(Kind::kBarrier, -1, "waits for a cluster without arriving");
  if (complete(block, block.barriers[kCluster])) open(block, block.barriers[kCluster]);
  if (block.barriers[kCluster].phase < w.cluster_phase) return stay(w);
  block.checker->acquire(w.index, block.cluster_knowledge);
}

// Lanes that a .sync names and that are not here yet are waited for.
void warp_sync(Warp& w, const Instr& i, uint32_t mask) {
  const uint32_t named = uniform(w, i.ops[0], mask, "member masks");
  if (mask & ~named) {
    fault(Kind::kDivergence, first_lane(mask & ~named), "a lane that its member mask omits");
  }
  if ((mask & w.sync_passed) == mask) {
    w.sync_passed &= ~mask;
    return;
  }
  w.sync_arrived |= mask;
  if ((named & w.alive & ~w.sync_arrived) == 0) {
    w.sync_arrived &= ~named;
    w.sync_passed |= named & w.alive & ~mask;
    ++w.block->progress;
    return;
  }
  stay(w);
}

void decode_barrier(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  if (i.has("warp")) {
    instr->klass = Class::kBarrier;
    instr->exec = warp_sync;
    return a.set_ops(instr, {a.read(i.operands.at(0), 32)});
  }
  if (!i.has("cluster")) return decode_bar(i, a, instr);
  if (a.target() < 90) fault(Kind::kUnsupported, -1, i.text(), " needs sm_90");
  check_modifiers(i, {"cluster", "arrive", "wait", "aligned", "acquire", "release", "relaxed"});
  instr->klass = Class::kBarrier;
  instr->aux = i.has("arrive") ? kArrive : kWait;
  instr->exec = i.has("arrive") ? cluster_arrive : cluster_wait;
}

// Warps of a block run one at a time here, so that every fence is in order already.
void decode_fence(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  const std::string first = i.modifiers.empty() ? "" : i.modifiers[0];
  if (first.rfind("proxy", 0) == 0 || first == "mbarrier_init") {
    return decode_proxy_fence(i, a, instr);
  }
  check_modifiers(i, {"cta", "gl", "gpu", "sys", "cluster", "sc", "acq_rel", "acquire", "release"});
  instr->klass = Class::kBarrier;
  instr->exec = [](Warp&, const Instr&, uint32_t) {};
}

}  // namespace

void barrier_warp_exited(Block& block, Warp&) {
  for (Barrier& barrier : block.barriers) {
    if (barrier.whole && complete(block, barrier)) open(block, barrier);
  }
}

void add_barriers(Decoders* decoders) {
  (*decoders)["bar"] = decode_barrier;
  (*decoders)["barrier"] = decode_barrier;
  (*decoders)["membar"] = decode_fence;
  (*decoders)["fence"] = decode_fence;
}

}  // namespace sim
