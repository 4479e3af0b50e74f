// The attention kernels, per backend.
#pragma once

#include "attention/params.h"
#include "common/isa.h"

FL_DECLARE_CPU_KERNEL(void, attention_forward, const ::fl::AttentionForward&)
FL_DECLARE_CPU_KERNEL(void, attention_backward, const ::fl::AttentionBackward&)

namespace fl {

// Present where the CUDA sources are compiled in: test the address before calling. float16 and,
// from sm_80 on, bfloat16.
__attribute__((weak)) void cuda_attention_forward(const AttentionForward& p, void* stream);

// `scratch`: as many bytes as cuda_attention_backward_scratch says, not initialised.
__attribute__((weak)) int64_t cuda_attention_backward_scratch(const AttentionBackward& p);
__attribute__((weak)) void cuda_attention_backward(const AttentionBackward& p, void* scratch,
                                                   void* stream);

}  // namespace fl
