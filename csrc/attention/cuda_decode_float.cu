#include "attention/cuda_decode_kernel.cuh"

template void fl::launch_decode<float>(const AttentionForward&, const DecodePlan&, bool,
                                       cudaStream_t);
