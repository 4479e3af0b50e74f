// The attention kernels, per backend.
#pragma once

#include "attention/params.h"
#include "common/isa.h"

FL_DECLARE_CPU_KERNEL(void, attention_forward, const ::fl::AttentionForward&)
FL_DECLARE_CPU_KERNEL(void, attention_backward, const ::fl::AttentionBackward&)

namespace fl {

// Present where the CUDA sources are compiled in: test the address before calling. bfloat16 from
// sm_80 on.
__attribute__((weak)) void cuda_attention_forward(const AttentionForward& p, void* stream);

// `scratch`: as many bytes as cuda_attention_backward_scratch says, not initialised.
__attribute__((weak)) int64_t cuda_attention_backward_scratch(const AttentionBackward& p);
__attribute__((weak)) void cuda_attention_backward(const AttentionBackward& p, void* scratch,
                                                   void* stream);

// Decoding: few queries, cache_seqlens, with or without page_table. `scratch` has as many floats as
// the first function says, and may be used again when the stream has come past.
__attribute__((weak)) int64_t cuda_attention_decode_scratch(const AttentionForward& p);
__attribute__((weak)) void cuda_attention_decode(const AttentionForward& p, float* scratch,
                                                 void* stream);

}  // namespace fl
