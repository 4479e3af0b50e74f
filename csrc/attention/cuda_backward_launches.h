// The launches of the attention backward, one function and one source file per dtype.
#pragma once

#include <cuda_runtime.h>

#include "attention/cuda_backward_shape.cuh"

namespace fl {

void backward_float32(const AttentionBackward& p, const BackwardScratch& scratch, bool old_gpu,
                      cudaStream_t stream);
void backward_float16(const AttentionBackward& p, const BackwardScratch& scratch, bool old_gpu,
                      cudaStream_t stream);
void backward_bfloat16(const AttentionBackward& p, const BackwardScratch& scratch,
                       cudaStream_t stream);

}  // namespace fl
