// From float32 sums to memory: bias, activation, rounding, while the sums are in the L1 cache.
#pragma once

#include "common/simd.h"
#include "linear_act/params.h"

namespace fl::FL_ISA {

// The sums of out[row : row + rows, col : col + cols], and of the gated form's second product.
struct SumTile {
  const float* sums[2];
  int64_t stride;
  int64_t row, col;
  int rows, cols;
};

template <class T>
FL_INLINE Vec load_or_zero(const void* p, int64_t index, Mask m) {
  return p == nullptr ? Vec(0.0f) : load(static_cast<const T*>(p) + index, m);
}

// Only whole vectors need no mask; `m` is the same for every row of a vector's columns.
template <class T>
FL_INLINE void store_columns(void* p, int64_t index, Vec x, bool whole, Mask m) {
  T* to = static_cast<T*>(p) + index;
  whole ? store(to, x) : store(to, x, m);
}

template <class Act, class T, bool kGated>
void store_tile(const LinearActGemm& g, const SumTile& t) {
  for (int c = 0; c < t.cols; c += kLanes) {
    const bool whole = t.cols - c >= kLanes;
    const Mask m = first_lanes(whole ? kLanes : t.cols - c);
    const Vec bias0 = load_or_zero<T>(g.bias[0], t.col + c, m);
    const Vec bias1 = kGated ? load_or_zero<T>(g.bias[1], t.col + c, m) : bias0;
    for (int r = 0; r < t.rows; ++r) {
      const int64_t index = (t.row + r) * g.n + t.col + c;
      const Vec z0 = load(t.sums[0] + r * t.stride + c) + bias0;
      Vec out = Act::forward(z0);
      if (g.preactivation[0]) store_columns<T>(g.preactivation[0], index, z0, whole, m);
      if constexpr (kGated) {
        const Vec z1 = load(t.sums[1] + r * t.stride + c) + bias1;
        out = out * z1;
        if (g.preactivation[1]) store_columns<T>(g.preactivation[1], index, z1, whole, m);
      }
      store_columns<T>(g.out, index, out, whole, m);
    }
  }
}

using StoreTile = void (*)(const LinearActGemm&, const SumTile&);

template <class T>
StoreTile choose_store_tile(const LinearActGemm& g) {
  StoreTile chosen = nullptr;
  with_activation(g.activation, [&](auto activation) {
    using Act = decltype(activation);
    const bool gated = g.form == LinearActGemm::Form::kGated;
    chosen = gated ? &store_tile<Act, T, true> : &store_tile<Act, T, false>;
  });
  return chosen;
}

}  // namespace fl::FL_ISA
