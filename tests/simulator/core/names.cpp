#include <iterator>

#include "error.h"
#include "program.h"

namespace sim {

const char* name_of(Kind kind) {
  static const char* const kNames[] = {
      "out_of_bounds", "misaligned", "uninitialised", "async",       "race", "divergence",
      "barrier",       "deadlock",   "timeout",       "unsupported", "trap", "arguments"};
  return kNames[static_cast<int>(kind)];
}

const char* name_of(Class c) {
  static const char* const kNames[] = {
      "tensor", "special", "fp32",   "fp64",  "half",    "integer", "convert", "ldmatrix",
      "shared", "async",   "global", "local", "shuffle", "move",    "control", "barrier"};
  static_assert(std::size(kNames) == static_cast<size_t>(Class::kCount));
  return kNames[static_cast<int>(c)];
}

}  // namespace sim
