// From sums of products to memory: bias, activation, the pre-activation where it is kept, or the
// gradient of it.
#pragma once

#include "linear_act/cuda_chunk.cuh"
#include "linear_act/params.h"

namespace fl {

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
  const LinearActGemm& g_;
  int64_t column_;
  int count_;
  Values bias_[2];
};

}  // namespace fl
