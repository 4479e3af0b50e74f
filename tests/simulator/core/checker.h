// Who touched which byte of a block's shared memory, and who knows of it.
//
// Every byte has a state: who wrote it last and who has read it since, as events (actor, clock).
// A warp knows an event once a chain of barriers leads from it to the warp (vector clocks, as in
// FastTrack, Flanagan & Freund 2009); touching a byte whose last events are not known is a race.
// States are numbered, so that an access of many bytes with one history is one look-up.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "warp.h"

namespace sim {

using Clock = uint32_t;

// Per warp its own instructions, its cp.async groups, its bulk copies' groups and its wgmma groups;
// then one actor for each mbarrier, whose clock counts phases.
enum class Actor : int { kWarp, kCopies, kBulk, kWgmma, kMbarrier };

struct Event {
  uint32_t actor;
  Clock clock;
  auto operator<=>(const Event&) const = default;
};

// What somebody knows: per actor the last clock; of the proxy through which asynchronous copies and
// wgmma read shared memory, too.
struct Knowledge {
  std::vector<Clock> generic, async;
  void join(const Knowledge& other);
  void learn(Event event);
};

enum class Access : uint8_t { kRead, kWrite, kAtomic, kAsyncRead, kAsyncWrite };

class Checker {
 public:
  Checker(size_t bytes, int warps, bool races);
  void reset();

  // One lane's access. The event is that of the warp, or `async` for the asynchronous kinds.
  void touch(const Warp& w, int lane, uint64_t offset, uint32_t bytes, Access access,
             Event async = {});
  // A store by the warp, like touch with kWrite. Two warps may store one value in one place, as
  // Triton does where they hold the same data: it sets w.clashed, and settle, called when the bytes
  // are there, throws if they differ.
  void touch_store(Warp& w, int lane, uint64_t offset, uint32_t bytes);
  void settle(Warp& w);
  size_t bytes() const { return states_.size(); }

  void release(int warp, Knowledge* into);  // what came before is known to who acquires it
  void acquire(int warp, const Knowledge& from);
  void learn(int warp, Event event);  // of an actor that the warp itself has waited for
  void fence_async(int warp);         // fence.proxy.async

  Event event(Actor kind, int index, Clock clock) const {
    return {static_cast<uint32_t>(static_cast<int>(kind) * warps_ + index), clock};
  }

 private:
  struct State {
    std::vector<Event> writes, reads;  // several writes: atomics
    bool atomic = false;
    auto operator<=>(const State&) const = default;
  };
  struct Memo {
    uint32_t state = 0, version = 0, next = 0;
    Event event{};
    Access access{};
  };
  struct Clash {
    uint64_t offset;
    std::vector<uint8_t> before;
    Fault fault;
  };
  static constexpr size_t kMemos = 512;

  uint32_t next(const Warp& w, int lane, uint64_t offset, uint32_t bytes, uint32_t state,
                Access access, Event event);
  uint32_t transition(const Warp& w, int lane, uint64_t offset, uint32_t bytes, uint32_t state,
                      Access access, Event event);
  bool knows(int warp, Event event, bool async) const;
  uint32_t number(State&& state);
  std::string name(Event event) const;

  int warps_;
  bool races_;
  std::vector<uint32_t> states_;  // per byte of shared memory; 0: never written
  std::vector<State> numbered_;
  std::map<State, uint32_t> numbers_;
  std::vector<Knowledge> known_;  // per warp
  std::vector<uint32_t> versions_;
  std::vector<std::array<Memo, kMemos>> memos_;
  bool storing_ = false;
  std::vector<Clash> clashes_;  // of stores, until it is known what they stored
};

// wgmma and bulk copies read through the asynchronous proxy: ordered like `async`.
const uint8_t* shared_read_async(Warp&, int lane, uint64_t offset, uint32_t bytes, Event async);
uint8_t* shared_write_async(Warp&, int lane, uint64_t offset, uint32_t bytes, Event async);

}  // namespace sim
