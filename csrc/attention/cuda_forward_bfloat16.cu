#include "attention/cuda_forward_kernel.cuh"

namespace fl {
template void forward_of<__nv_bfloat16>(const AttentionForward& p, int arch, cudaStream_t stream);
}
