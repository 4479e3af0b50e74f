// The arithmetic of one Adam step, once for every backend: V is a register of float32, Vec on CPU
// and Scalar on CUDA, with + - * /, fma, max and sqrt found beside it.
#pragma once

#include "adam/params.h"

#if defined(__CUDACC__)
#define FL_ADAM_FN __device__ __forceinline__
#else
#define FL_ADAM_FN __attribute__((always_inline)) inline
#endif

namespace fl {

template <class V>
struct AdamLanes {
  V param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq;
};

// x.grad comes in scaled and signed (see AdamScalars); the other members are updated.
template <bool kAmsgrad, class V>
FL_ADAM_FN void adam_update(const AdamScalars& s, float step_size, float inv_sqrt_correction2,
                            AdamLanes<V>& x) {
  V grad = x.grad;
  if (s.l2 != 0.0f) grad = fma(V(s.l2), x.param, grad);

  // Interpolated from the nearer end, so that neither beta1 = 0 nor a constant gradient drifts.
  const V toward = grad - x.exp_avg;
  x.exp_avg = s.one_minus_beta1 < 0.5f ? fma(V(s.one_minus_beta1), toward, x.exp_avg)
                                       : fma(V(s.one_minus_beta1 - 1.0f), toward, grad);
  x.exp_avg_sq = fma(V(s.one_minus_beta2) * grad, grad, V(s.beta2) * x.exp_avg_sq);

  V square = x.exp_avg_sq;
  if constexpr (kAmsgrad) square = x.max_exp_avg_sq = max(x.max_exp_avg_sq, x.exp_avg_sq);
  const V denominator = fma(sqrt(square), V(inv_sqrt_correction2), V(s.eps));
  x.param = fma(V(-step_size), x.exp_avg / denominator, x.param * V(s.decay));
}

}  // namespace fl
