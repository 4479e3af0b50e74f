// From sums of products to memory: bias, activation, the pre-activation where it is kept, or the
// gradient of it.
#pragma once

#include <type_traits>

#include "linear_act/cuda_chunk.cuh"
#include "linear_act/params.h"

namespace fl {

// Sum i of (row, column) once more, by fused multiply-adds: where products of TF32 made NaN of
// infinities and of numbers that round to one, and where sums are so short that the 2^-23 that a
// factor may lose in them shows.
constexpr int kShortSum = 8;
__device__ __forceinline__ float sum_again(const LinearActGemm& g, int i, int64_t row,
                                           int64_t column) {
  const auto read = [](const GemmFactor& factor, int64_t r, int64_t k) {
    const int64_t at = factor.k_dense ? r * factor.stride + k : k * factor.stride + r;
    return static_cast<const float*>(factor.data)[at];
  };
  float sum = 0.0f;
#pragma unroll 1
  for (int which = 0; which < 2; ++which) {
#pragma unroll 1
    for (int64_t k = 0; k < g.k[which]; ++k) {
      sum = fmaf(read(g.a[which], row, k), read(g.b[which + i], column, k), sum);
    }
  }
  return sum;
}

// The columns [column, column + kChunk) of out, of which `count` are there: what all rows share.
// kActivates: whether there is more to do than to store.
template <class T, int kChunk, bool kActivates>
class Epilogue {
  using Values = Chunk<kChunk>;

 public:
  __device__ __forceinline__ Epilogue(const LinearActGemm& g, int64_t column)
      : g_(g), column_(column), count_(static_cast<int>(min(g.n - column, int64_t{kChunk}))) {
    if constexpr (kActivates) {
      for (int i = 0; i < 2; ++i) {
        bias_[i] = Values::of(0.0f);
        if (g.bias[i]) bias_[i].load(static_cast<const T*>(g.bias[i]) + column, count_);
      }
    }
  }

  // sums: of the product, and of the gated form's second.
  __device__ __forceinline__ void store(int64_t row, Values sums, Values sums_up) const {
    const int64_t index = row * g_.n + column_;
    if constexpr (std::is_same_v<T, float>) {
      repair(sums, 0, row);
      if (kActivates && g_.form == LinearActGemm::Form::kGated) repair(sums_up, 1, row);
    }
    if constexpr (!kActivates) {
      return sums.store(static_cast<T*>(g_.out) + index, count_);
    } else {
      const bool gated = g_.form == LinearActGemm::Form::kGated;
      const Values z = sums + bias_[0], up = gated ? sums_up + bias_[1] : Values::of(1.0f);
      if (g_.preactivation[0]) z.store(static_cast<T*>(g_.preactivation[0]) + index, count_);
      if (g_.preactivation[1]) up.store(static_cast<T*>(g_.preactivation[1]) + index, count_);
      const Values active = gated || !g_.dout ? activate(g_.activation, z) : up;
      Values out = active * up;
      if (g_.dout) {
        Values dout;
        dout.load(static_cast<const T*>(g_.dout) + row * g_.dout_stride + column_, count_);
        if (gated) (dout * active).store(static_cast<T*>(g_.out_up) + index, count_);
        out = up * dout * slope(g_.activation, z);
      }
      out.store(static_cast<T*>(g_.out) + index, count_);
    }
  }

 private:
  __device__ __forceinline__ void repair(Values& sums, int i, int64_t row) const {
    if (g_.a[0].data == nullptr) return;
    const bool is_short = g_.k[0] + g_.k[1] <= kShortSum;
    float all = 0.0f;  // NaN where one is not finite
#pragma unroll
    for (float x : sums.v) all += x * 0.0f;
    if (all == 0.0f && !is_short) return;
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      if ((is_short || !isfinite(sums.v[e])) && e < count_) {
        sums.v[e] = sum_again(g_, i, row, column_ + e);
      }
    }
  }

  const LinearActGemm& g_;
  int64_t column_;
  int count_;
  Values bias_[2];
};

}  // namespace fl
