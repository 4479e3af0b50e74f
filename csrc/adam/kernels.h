// The Adam kernels, per backend.
#pragma once

#include "adam/params.h"
#include "common/isa.h"

FL_DECLARE_CPU_KERNEL(void, adam_step, const ::fl::AdamStep&)
FL_DECLARE_CPU_KERNEL(void, grad_norm, const ::fl::GradNorm&)

namespace fl {

// What the CUDA kernels need besides AdamStep: numbers that are only known on the device. Pointers
// are to device memory, null where the number is not used or known on the host.
struct AdamStepCuda {
  AdamStep step;  // tensors, starts and layouts on the host; scalars as far as known
  float* const* step_counts = nullptr;  // (count,) host array of device pointers
  float* coefficients = nullptr;        // (count, 2) scratch, with step_counts
  const float* lr = nullptr;
  const float* grad_scale = nullptr;
  const float* found_inf = nullptr;
  const float* grad_norm = nullptr;
  float max_grad_norm = 0;
  double lr_value = 0, beta1 = 0, beta2 = 0;
  float decoupled_weight_decay = 0;  // of AdamW
};

// Present where the CUDA sources are compiled in: test the address before calling.
__attribute__((weak)) void cuda_adam_step(const AdamStepCuda& step, void* stream);

// norm.partial_sums is device scratch, count + one per kAdamTask elements; `out` receives sqrt(sum)
// / grad_scale.
__attribute__((weak)) void cuda_grad_norm(const GradNorm& norm, const float* grad_scale, float* out,
                                          void* stream);

}  // namespace fl
