// Operands of the CPU attention kernels' products. Only for cpu_*.cpp.
//
// Operands are arrays of 32-bit units: a unit is one float32, or two bfloat16 that are neighbours
// along the depth of the product, for processors that multiply such pairs (AVX512-BF16, AMX). Both
// kinds have the same layouts, and the product loops do not tell them apart.
#pragma once

#include "common/simd.h"

namespace fl::FL_ISA {

constexpr int kPanel = 2 * kLanes;  // columns of a packed panel
#if defined(__AVX512F__)
constexpr int kRows =
    8;  // rows of the micro-kernel: 8 x 2 accumulators reach the FMA peak on Zen 5
#else
constexpr int kRows = 4;  // 4 x 2 accumulators fit AVX2's 16 registers
#endif

FL_INLINE int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}
FL_INLINE int64_t round_down(int64_t x, int64_t multiple) { return x / multiple * multiple; }
FL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
FL_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Carves 64-byte aligned arrays out of one allocation. With a null base it only counts bytes.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;

  template <class T>
  FL_INLINE T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return taken;
  }
};

// c + a . b per lane, for one unit of depth.
struct FloatDot {
  static constexpr int kPair = 1;            // depth elements per unit
  static constexpr int kFewQueries = 4;      // do not pay for packed keys
  static constexpr int kDepthUnits = 4;      // that the panels of a factor have, or a multiple
  static constexpr int kPairedRows = kRows;  // rows that become depth: a multiple of these
  static FL_INLINE Vec step(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};
#if defined(__AVX512BF16__)
struct PairDot {
  static constexpr int kPair = 2, kFewQueries = 1;
#if defined(__AMX_BF16__)
  static constexpr int kDepthUnits = 16, kPairedRows = 32;  // whole tiles
#else
  static constexpr int kDepthUnits = 4, kPairedRows = kRows;
#endif
  static FL_INLINE Vec step(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v));
  }
};
#endif

template <class T>
struct DotFor {
  using type = FloatDot;
};
#if defined(__AVX512BF16__)
template <>
struct DotFor<BFloat16> {
  using type = PairDot;
};
#endif

// Element (row r, depth k), in units, at data[r * row + k * depth].
struct OperandA {
  const float* data;
  int64_t row, depth;
};
// Columns n of panel n / kPanel, depth k, at data[n / kPanel * panel + k * depth + n % kPanel].
struct OperandB {
  const float* data;
  int64_t panel, depth;
};

enum class Update { kSet, kAdd, kDecayAndAdd };

}  // namespace fl::FL_ISA
