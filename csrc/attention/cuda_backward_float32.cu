#include "attention/cuda_backward_launch.cuh"
#include "attention/cuda_backward_launches.h"

namespace fl {

void backward_float32(const AttentionBackward& p, const BackwardScratch& scratch, bool old_gpu,
                      cudaStream_t stream) {
  launch_backward<float>(p, scratch, old_gpu, stream);
}

}  // namespace fl
