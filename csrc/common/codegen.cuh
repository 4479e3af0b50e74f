// What the compiler is not told, and loops whose counters it may put into instructions.
#pragma once

#include <utility>

namespace fl {

// The same number, of which the compiler does not know that: what is computed from it is computed
// again where it is needed, instead of being kept in registers over a whole loop; and a number that
// was cheap to compute is kept, instead of being computed again.
template <class T>
__device__ __forceinline__ T opaque(T value) {
  if constexpr (sizeof(T) == 8) asm volatile("" : "+l"(value));
  if constexpr (sizeof(T) == 4) asm volatile("" : "+r"(value));
  return value;
}

template <int kValue>
struct Constant {
  __device__ __forceinline__ constexpr operator int() const { return kValue; }
};

// f(0), ..., f(kCount - 1), of numbers that can be template arguments and immediates of inline
// assembly.
template <int kCount, class F>
__device__ __forceinline__ void unrolled(F f) {
  [&]<int... kI>(std::integer_sequence<int, kI...>) {
    (f(Constant<kI>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

}  // namespace fl
