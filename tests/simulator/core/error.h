// What stops a launch: one kind, one sentence, and where it happened.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace sim {

enum class Kind {
  kOutOfBounds,
  kMisaligned,
  kUninitialised,
  kAsync,
  kRace,
  kDivergence,
  kBarrier,
  kDeadlock,
  kTimeout,
  kUnsupported,
  kTrap,
  kArguments,
};

const char* name_of(Kind kind);

// Thrown where the reason is known; the interpreter adds kernel, line, block and thread.
struct Fault : std::runtime_error {
  Kind kind;
  int lane;  // of the warp, or -1: the whole warp
  Fault(Kind kind, int lane, const std::string& message)
      : std::runtime_error(message), kind(kind), lane(lane) {}
};

// fault(Kind::kMisaligned, lane, "shared address ", address, " is no multiple of ", bytes);
template <class... Parts>
[[noreturn]] void fault(Kind kind, int lane, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Fault(kind, lane, text.str());
}

}  // namespace sim
