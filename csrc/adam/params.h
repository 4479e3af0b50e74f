// What an Adam kernel is told: pointers, sizes, layouts, options. No Torch.
//
//   g  = grad / grad_scale * clip, negated where maximize; + weight_decay * p   (Adam, not AdamW)
//   m  = beta1 m + (1 - beta1) g                            exp_avg
//   v  = beta2 v + (1 - beta2) g^2                          exp_avg_sq
//   v' = max(v', v), or v without amsgrad                   max_exp_avg_sq
//   p  = p (1 - lr weight_decay)                            (AdamW)
//   p -= lr / (1 - beta1^t) * m / (sqrt(v' / (1 - beta2^t)) + eps)
//
// Arithmetic is float32 whatever is stored. Elements are counted in the order in which the
// parameter lies in memory; that count is also the counter of stochastic rounding.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fl {

enum AdamOperand : int { kParam, kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq, kMaster, kAdamOperands };

constexpr int kAdamMaxDims = 12;  // after merging dimensions that are adjacent in every operand

// How to walk operands whose layouts differ: dimensions from the parameter's outermost to
// innermost.
struct AdamLayout {
  int dims;
  int64_t sizes[kAdamMaxDims];
  int64_t strides[kAdamOperands][kAdamMaxDims];  // in elements
  bool dense[kAdamOperands];                     // element n stands at data + n
};

struct AdamTensor {
  void* data[kAdamOperands];  // null: kMaxExpAvgSq without amsgrad, kMaster without master weights
  DType dtype[kAdamOperands];
  int64_t numel;
  const AdamLayout* layout;    // null: every operand is dense, in one and the same order
  float step_size;             // lr / (1 - beta1^t)
  float inv_sqrt_correction2;  // 1 / sqrt(1 - beta2^t)
};

struct AdamScalars {
  float one_minus_beta1, beta2, one_minus_beta2, eps;
  float l2;           // weight decay of Adam, added to the gradient; 0: none
  float decay;        // 1 - lr * weight decay of AdamW; 1: none
  float grad_scale;   // the gradient is multiplied by this, and stored so where store_grad
  float grad_factor;  // and then by this: -1 to maximize, times the factor of gradient clipping
};

struct AdamStep {
  const AdamTensor* tensors;
  const int64_t* starts;  // (count + 1,) where each tensor begins when all are laid end to end
  int64_t count;
  AdamScalars scalars;
  bool store_grad;           // leave the unscaled gradient behind, as torch's fused Adam does
  bool stochastic_rounding;  // of 16-bit parameters without masters, exp_avg and exp_avg_sq
  uint64_t seed;
  uint32_t offset;
};

// Sums of squares of gradients (operand kGrad of each tensor), one per task (CUDA: at most
// count + tasks), so that the sum does not depend on the number of threads.
struct GradNorm {
  const AdamTensor* tensors;
  const int64_t* starts;
  int64_t count;
  double* partial_sums;
};

// Elements per task on CPU. Tensors are padded to kAdamAlign when laid end to end, so that no task
// begins in the middle of a vector.
constexpr int64_t kAdamTask = 65536;
constexpr int64_t kAdamAlign = 64;

}  // namespace fl
