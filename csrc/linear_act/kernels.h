// The linear + activation kernels, per backend.
#pragma once

#include "common/isa.h"
#include "linear_act/params.h"

FL_DECLARE_CPU_KERNEL(void, linear_act_gemm, const ::fl::LinearActGemm&)
FL_DECLARE_CPU_KERNEL(void, activation_backward, const ::fl::ActivationBackward&)

namespace fl {

// Present where the CUDA sources are compiled in: test the address before calling. They take no a
// with dense rows beside a b with dense k, and activations, biases and the gated form with dense k
// alone. A workspace is of as many floats as the function before says, on the device; null for
// none.
__attribute__((weak)) int64_t cuda_linear_act_gemm_workspace(const LinearActGemm& g);
__attribute__((weak)) void cuda_linear_act_gemm(const LinearActGemm& g, float* workspace,
                                                void* stream);
__attribute__((weak)) int64_t cuda_activation_backward_workspace(const ActivationBackward& p);
__attribute__((weak)) void cuda_activation_backward(const ActivationBackward& p, float* workspace,
                                                    void* stream);
__attribute__((weak)) void cuda_activation_forward(const ActivationForward& p, void* stream);

}  // namespace fl
