#include "attention/cuda_backward_launch.cuh"
#include "attention/cuda_backward_launches.h"

namespace fl {

void backward_bfloat16(const AttentionBackward& p, const BackwardScratch& scratch,
                       cudaStream_t stream) {
  launch_backward<__nv_bfloat16>(p, scratch, false, stream);
}

}  // namespace fl
