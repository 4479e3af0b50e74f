#include "checker.h"

#include <algorithm>

#include "block.h"

namespace sim {
namespace {

void join(std::vector<Clock>* into, const std::vector<Clock>& from) {
  if (into->size() < from.size()) into->resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) (*into)[i] = std::max((*into)[i], from[i]);
}

void add(std::vector<Event>* events, Event event) {
  const auto same = [&](const Event& e) { return e.actor == event.actor; };
  const auto found = std::find_if(events->begin(), events->end(), same);
  if (found == events->end()) {
    events->push_back(event);
    std::sort(events->begin(), events->end());
  } else {
    found->clock = std::max(found->clock, event.clock);
  }
}

bool all_equal(const uint32_t* states, uint32_t count) {
  uint32_t different = 0;
  for (uint32_t i = 1; i < count; ++i) different |= states[i] ^ states[0];
  return different == 0;
}

const char* verb(Access access) {
  switch (access) {
    case Access::kRead:
      return " reads";
    case Access::kWrite:
      return " writes";
    case Access::kAtomic:
      return " updates";
    case Access::kAsyncRead:
      return " lets an asynchronous operation read";
    default:
      return " lets an asynchronous copy write";
  }
}

}  // namespace

void Knowledge::join(const Knowledge& other) {
  sim::join(&generic, other.generic);
  sim::join(&async, other.async);
}

void Knowledge::learn(Event event) {
  if (generic.size() <= event.actor) generic.resize(event.actor + 1);
  generic[event.actor] = std::max(generic[event.actor], event.clock);
}

Checker::Checker(size_t bytes, int warps, bool races)
    : warps_(warps), races_(races), states_(bytes), memos_(static_cast<size_t>(warps)) {
  versions_.resize(static_cast<size_t>(warps));
  number(State{});
  reset();
}

void Checker::reset() {
  std::fill(states_.begin(), states_.end(), 0u);
  known_.assign(static_cast<size_t>(warps_), Knowledge{});
  for (int w = 0; w < warps_; ++w) {
    known_[static_cast<size_t>(w)].generic.resize(4 * static_cast<size_t>(warps_));
    known_[static_cast<size_t>(w)].generic[static_cast<size_t>(w)] = 1;
    ++versions_[static_cast<size_t>(w)];
  }
}

void Checker::touch(const Warp& w, int lane, uint64_t offset, uint32_t bytes, Access access,
                    Event async) {
  if (offset + bytes > states_.size() || offset + bytes < offset) {
    fault(Kind::kOutOfBounds, lane, "shared bytes ", offset, "..", offset + bytes - 1,
          " of a block that has ", states_.size());
  }
  const bool own = access != Access::kAsyncRead && access != Access::kAsyncWrite;
  const auto warp = static_cast<size_t>(w.index);
  const Event event =
      own ? Event{static_cast<uint32_t>(w.index), known_[warp].generic[warp]} : async;
  uint32_t* states = states_.data() + offset;
  if (all_equal(states, bytes)) {
    const uint32_t after = next(w, lane, offset, bytes, states[0], access, event);
    if (after != states[0]) std::fill_n(states, bytes, after);
    return;
  }
  for (uint32_t i = 0; i < bytes; ++i) {
    states[i] = next(w, lane, offset + i, 1, states[i], access, event);
  }
}

void Checker::touch_store(Warp& w, int lane, uint64_t offset, uint32_t bytes) {
  storing_ = true;
  touch(w, lane, offset, bytes, Access::kWrite);
  storing_ = false;
  w.clashed = !clashes_.empty();
}

void Checker::settle(Warp& w) {
  for (const Clash& clash : clashes_) {
    const uint8_t* now = w.block->shared.data() + clash.offset;
    if (!std::equal(clash.before.begin(), clash.before.end(), now)) throw clash.fault;
  }
  clashes_.clear();
  w.clashed = false;
}

uint32_t Checker::next(const Warp& w, int lane, uint64_t offset, uint32_t bytes, uint32_t state,
                       Access access, Event event) {
  const auto warp = static_cast<size_t>(w.index);
  Memo& memo = memos_[warp][(state * 5 + static_cast<uint32_t>(access)) % kMemos];
  if (memo.version == versions_[warp] && memo.state == state && memo.access == access &&
      memo.event == event) {
    return memo.next;
  }
  const size_t clashes = clashes_.size();
  const uint32_t after = transition(w, lane, offset, bytes, state, access, event);
  if (clashes_.size() == clashes) memo = Memo{state, versions_[warp], after, event, access};
  return after;
}

uint32_t Checker::transition(const Warp& w, int lane, uint64_t offset, uint32_t bytes,
                             uint32_t state, Access access, Event event) {
  const State& before = numbered_[state];
  const bool reads = access == Access::kRead || access == Access::kAsyncRead;
  const bool async = access == Access::kAsyncRead;
  const auto wrong = [&](Kind kind, const Event& other, const char* did) {
    fault(kind, lane, "warp ", w.index, verb(access), " shared bytes ", offset, "..",
          offset + bytes - 1, " that ", name(other), did);
  };
  if (reads || access == Access::kAtomic) {
    if (before.writes.empty()) {
      fault(Kind::kUninitialised, lane, "warp ", w.index, verb(access), " shared bytes ", offset,
            "..", offset + bytes - 1, ", which were never written");
    }
  }
  std::vector<Event> kept;
  for (const Event& write : before.writes) {
    if (access == Access::kAtomic && before.atomic) break;
    if (knows(w.index, write, async)) continue;
    if (write.actor >= static_cast<uint32_t>(warps_)) {
      wrong(Kind::kAsync, write, " wrote, not waited for");
    }
    if (async && knows(w.index, write, false)) {
      wrong(Kind::kAsync, write, " wrote, without fence.proxy.async");
    }
    if (!races_) continue;
    try {
      wrong(Kind::kRace, write, " wrote, with no barrier between");
    } catch (const Fault& race) {
      if (!storing_) throw;
      const uint8_t* at = w.block->shared.data() + offset;
      clashes_.push_back({offset, {at, at + bytes}, race});
      kept.push_back(write);
    }
  }
  State after;
  if (reads) {
    after = before;
    add(&after.reads, event);
    return number(std::move(after));
  }
  for (const Event& read : before.reads) {
    if (knows(w.index, read, false)) continue;
    if (read.actor >= static_cast<uint32_t>(warps_)) {
      wrong(Kind::kAsync, read, " reads, not waited for");
    }
    if (races_) wrong(Kind::kRace, read, " read, with no barrier between");
  }
  after.writes = kept;
  if (access == Access::kAtomic) {
    if (before.atomic) after.writes = before.writes;
    after.atomic = true;
  }
  add(&after.writes, event);
  return number(std::move(after));
}

bool Checker::knows(int warp, Event event, bool async) const {
  if (event.actor == static_cast<uint32_t>(warp) && !async) return true;
  const Knowledge& known = known_[static_cast<size_t>(warp)];
  // Only writes of the generic proxy need the fence.
  const bool fenced = async && event.actor < 2 * static_cast<uint32_t>(warps_);
  const std::vector<Clock>& clocks = fenced ? known.async : known.generic;
  return event.actor < clocks.size() && clocks[event.actor] >= event.clock;
}

uint32_t Checker::number(State&& state) {
  const auto [found, fresh] =
      numbers_.try_emplace(std::move(state), static_cast<uint32_t>(numbered_.size()));
  if (fresh) numbered_.push_back(found->first);
  return found->second;
}

std::string Checker::name(Event event) const {
  const auto warps = static_cast<uint32_t>(warps_);
  const uint32_t kind = event.actor / warps, index = event.actor % warps;
  if (kind == 0) return "warp " + std::to_string(index);
  if (kind == 1) return "a cp.async of warp " + std::to_string(index);
  if (kind == 2) return "a bulk copy of warp " + std::to_string(index);
  if (kind == 3) return "a wgmma of warp " + std::to_string(index);
  return "a copy that an mbarrier counts";
}

void Checker::release(int warp, Knowledge* into) {
  Knowledge& known = known_[static_cast<size_t>(warp)];
  into->join(known);
  ++known.generic[static_cast<size_t>(warp)];
  ++versions_[static_cast<size_t>(warp)];
}

void Checker::acquire(int warp, const Knowledge& from) {
  known_[static_cast<size_t>(warp)].join(from);
  ++versions_[static_cast<size_t>(warp)];
}

void Checker::learn(int warp, Event event) {
  known_[static_cast<size_t>(warp)].learn(event);
  ++versions_[static_cast<size_t>(warp)];
}

void Checker::fence_async(int warp) {
  Knowledge& known = known_[static_cast<size_t>(warp)];
  sim::join(&known.async, known.generic);
  // What the warp does from now on is after the fence.
  ++known.generic[static_cast<size_t>(warp)];
  ++versions_[static_cast<size_t>(warp)];
}

namespace {

uint8_t* touched(Warp& w, int lane, uint64_t offset, uint32_t bytes, Access access, Event async) {
  const uint32_t alignment = std::min(bytes, 16u);
  if (offset % alignment != 0) {
    fault(Kind::kMisaligned, lane, "shared address ", offset, " is no multiple of ", alignment);
  }
  if (access == Access::kWrite) {
    w.block->checker->touch_store(w, lane, offset, bytes);
  } else {
    w.block->checker->touch(w, lane, offset, bytes, access, async);
  }
  return w.block->shared.data() + offset;
}

}  // namespace

const uint8_t* shared_read(Warp& w, int lane, uint64_t offset, uint32_t bytes) {
  return touched(w, lane, offset, bytes, Access::kRead, {});
}
uint8_t* shared_write(Warp& w, int lane, uint64_t offset, uint32_t bytes) {
  return touched(w, lane, offset, bytes, Access::kWrite, {});
}
uint8_t* shared_atomic(Warp& w, int lane, uint64_t offset, uint32_t bytes) {
  return touched(w, lane, offset, bytes, Access::kAtomic, {});
}
const uint8_t* shared_read_async(Warp& w, int lane, uint64_t offset, uint32_t bytes, Event async) {
  return touched(w, lane, offset, bytes, Access::kAsyncRead, async);
}
uint8_t* shared_write_async(Warp& w, int lane, uint64_t offset, uint32_t bytes, Event async) {
  return touched(w, lane, offset, bytes, Access::kAsyncWrite, async);
}

}  // namespace sim
