// FL_CHECK: the one way native code refuses a call. The exception reaches Python as a RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fl {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace fl

#define FL_CHECK(condition, ...) \
  do {                           \
    if (!(condition)) {          \
      ::fl::fail(__VA_ARGS__);   \
    }                            \
  } while (false)
