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

// Decoding: few queries, cache_seqlens, with or without page_table. `scratch` has as many floats as
// the first function says, and may be used again when the stream has come past.
__attribute__((weak)) int64_t cuda_attention_decode_scratch(const AttentionForward& p);
__attribute__((weak)) void cuda_attention_decode(const AttentionForward& p, float* scratch,
                                                 void* stream);

}  // namespace fl
