// mbarrier objects. Their state lies beside the block's shared memory, by offset. PTX ISA,
// "Parallel Synchronization and Communication Instructions: mbarrier".
#include <algorithm>

#include "ops_async.h"

namespace sim {
namespace {

constexpr uint32_t kMostArrivals = (1u << 20) - 1;

void complete_phase(Warp& w, Mbarrier& m) {
  if (m.pending > 0 || m.bytes != 0) return;
  const Event copies = event_of(w, m);
  m.done.join(m.arrived);
  m.done.learn(copies);
  m.arrived = Knowledge{};
  m.pending = m.expected;
  ++m.phase;
  ++w.block->progress;
}

uint64_t offset_of(Warp& w, const Instr& i, Ref address, int lane) {
  const uint64_t at = w.lanes<uint64_t>(address)[lane] + static_cast<uint64_t>(i.imm);
  if ((at & kWindowMask) != 0 && (at & kWindowMask) != kSharedWindow) {
    fault(Kind::kOutOfBounds, lane, "an mbarrier outside shared memory");
  }
  return shared_offset(at);
}

// ops: address, count.
void init(Warp& w, const Instr& i, uint32_t mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const uint64_t at = offset_of(w, i, i.ops[0], lane);
    const uint32_t count = w.lanes<uint32_t>(i.ops[1])[lane];
    if (count == 0 || count > kMostArrivals) {
      fault(Kind::kBarrier, lane, "an mbarrier for ", count, " arrivals");
    }
    uint8_t* bytes = shared_write(w, lane, at, 8);
    std::fill_n(bytes, 8, uint8_t{0});
    Mbarrier m;
    m.number = w.block->mbarriers_made++;
    m.expected = m.pending = count;
    m.seen = 1u << w.index;
    w.block->mbarriers[at] = m;
  }
}

void invalidate(Warp& w, const Instr& i, uint32_t mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const uint64_t at = offset_of(w, i, i.ops[0], lane);
    mbarrier_at(w, lane, at);
    w.block->mbarriers.erase(at);
  }
}

enum Arrive : uint64_t {
  kExpect = 1,
  kArrives = 2,
  kDrops = 4,
  kCompletesBytes = 8,
  kReturns = 16
};

void arrive_once(Warp& w, const Instr& i, Mbarrier& m, int lane, uint32_t count, uint32_t bytes) {
  if (i.aux & kExpect) m.bytes += bytes;
  if (i.aux & kCompletesBytes) m.bytes -= bytes;
  if (i.aux & kArrives) {
    if (count == 0 || count > m.pending) {
      fault(Kind::kBarrier, lane, count, " arrivals at an mbarrier that waits for ", m.pending);
    }
    m.pending -= count;
    if (i.aux & kDrops) m.expected -= count;
  }
  complete_phase(w, m);
}

// ops: state, address, count, bytes; aux: what it does.
void arrive(Warp& w, const Instr& i, uint32_t mask) {
  uint64_t state[kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Mbarrier& m = mbarrier_at(w, lane, offset_of(w, i, i.ops[1], lane));
    if (i.aux & kArrives) w.block->checker->release(w.index, &m.arrived);
    state[lane] = m.phase;
    arrive_once(w, i, m, lane, w.lanes<uint32_t>(i.ops[2])[lane],
                w.lanes<uint32_t>(i.ops[3])[lane]);
  }
  if (i.aux & kReturns) w.write(i.ops[0], state, mask);
}

// ops: complete, address, state or parity; aux: 1 for parity. Never blocks: programs try again.
void test_wait(Warp& w, const Instr& i, uint32_t mask) {
  uint32_t complete = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Mbarrier& m = mbarrier_at(w, lane, offset_of(w, i, i.ops[1], lane));
    bool done = false;
    if (i.aux) {
      done = (m.phase & 1) != (w.lanes<uint32_t>(i.ops[2])[lane] & 1);
    } else {
      done = m.phase > w.lanes<uint64_t>(i.ops[2])[lane];
    }
    if (done) w.block->checker->acquire(w.index, m.done);
    complete |= uint32_t{done} << lane;
  }
  w.write_predicate(i.ops[0], complete, mask);
  if (complete != mask) w.yield = true;
}

// cp.async.mbarrier.arrive: arrives when the copies issued so far are complete, which they are.
void arrive_copies(Warp& w, const Instr& i, uint32_t mask) {
  const Event copies = w.block->checker->event(Actor::kCopies, w.index, w.async.copies);
  ++w.async.copies;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Mbarrier& m = mbarrier_at(w, lane, offset_of(w, i, i.ops[1], lane));
    m.arrived.learn(copies);
    if (i.aux == 0) continue;  // without .noinc the arrival is one more than was asked for
    arrive_once(w, i, m, lane, 1, 0);
  }
}

void decode_arrive(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  const bool drop = i.has("arrive_drop");
  if (drop || i.has("arrive")) instr->aux |= kArrives;
  if (drop) instr->aux |= kDrops;
  if (i.has("expect_tx")) instr->aux |= kExpect;
  if (i.has("complete_tx")) instr->aux |= kCompletesBytes;
  if (instr->aux & (kExpect | kCompletesBytes)) needs_target(i, a, 90);
  const bool returns = i.operands.at(0).form != ptx::Operand::kAddress;
  const size_t at = returns ? 1 : 0;
  ptx::Operand one, sink;
  one.form = ptx::Operand::kInteger;
  one.integer = 1;
  sink.form = ptx::Operand::kSink;
  const bool given = i.operands.size() > at + 1;
  const Ref number = a.read(given ? i.operands[at + 1] : one, 32);
  const bool counts_bytes = instr->aux & (kExpect | kCompletesBytes);
  if (counts_bytes && !given) unknown(i);
  if (returns) instr->aux |= kReturns;
  instr->exec = arrive;
  a.set_ops(instr,
            {a.write(returns ? i.operands[0] : sink, 64), a.address(i.operands[at], &instr->imm),
             counts_bytes ? a.read(one, 32) : number, number});
}

void decode(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  needs_target(i, a, 80);
  check_modifiers(i, {"init",        "inval",     "arrive",      "arrive_drop",     "expect_tx",
                      "complete_tx", "test_wait", "try_wait",    "parity",          "pending_count",
                      "noComplete",  "shared",    "shared::cta", "shared::cluster", "b64",
                      "cta",         "cluster",   "release",     "acquire",         "relaxed"});
  instr->klass = Class::kAsync;
  const bool tests = i.has("test_wait"), tries = i.has("try_wait");
  if (i.has("init")) {
    instr->exec = init;
    a.set_ops(instr, {a.address(i.operands.at(0), &instr->imm), a.read(i.operands.at(1), 32)});
  } else if (i.has("inval")) {
    instr->exec = invalidate;
    a.set_ops(instr, {a.address(i.operands.at(0), &instr->imm)});
  } else if (tests || tries) {
    if (tries) needs_target(i, a, 90);
    instr->aux = i.has("parity");
    instr->exec = test_wait;
    a.set_ops(instr, {a.write(i.operands.at(0), 1), a.address(i.operands.at(1), &instr->imm),
                      a.read(i.operands.at(2), i.has("parity") ? 32 : 64)});
  } else if (i.has("pending_count") || i.has("noComplete")) {
    unknown(i);
  } else {
    decode_arrive(i, a, instr);
  }
}

}  // namespace

Mbarrier& mbarrier_at(Warp& w, int lane, uint64_t offset) {
  const auto found = w.block->mbarriers.find(offset);
  if (found == w.block->mbarriers.end()) {
    fault(Kind::kUninitialised, lane, "no mbarrier was initialised at shared byte ", offset);
  }
  Mbarrier& m = found->second;
  if (!(m.seen >> w.index & 1)) {
    shared_read(w, lane, offset, 8);  // its initialisation has to be known
    m.seen |= 1u << w.index;
  }
  return m;
}

Event event_of(const Warp& w, const Mbarrier& m) {
  return w.block->checker->event(Actor::kMbarrier, m.number, m.phase + 1);
}

void complete_bytes(Warp& w, Mbarrier& m, uint64_t bytes) {
  m.bytes -= static_cast<int64_t>(bytes);
  complete_phase(w, m);
}

void decode_copy_arrive(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"async", "mbarrier", "arrive", "noinc", "shared", "shared::cta", "b64"});
  if (i.has("noinc")) instr->aux = kArrives;
  instr->exec = arrive_copies;
  ptx::Operand sink;
  sink.form = ptx::Operand::kSink;
  a.set_ops(instr, {a.write(sink, 64), a.address(i.operands.at(0), &instr->imm)});
}

void add_mbarrier(Decoders* decoders) { (*decoders)["mbarrier"] = decode; }

}  // namespace sim
