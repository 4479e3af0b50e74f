#include "attention/cuda_forward_kernel.cuh"

namespace fl {
template void forward_of<float>(const AttentionForward& p, int arch, cudaStream_t stream);
}
