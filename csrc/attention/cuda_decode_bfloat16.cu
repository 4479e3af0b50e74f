#include "attention/cuda_decode_kernel.cuh"

template void fl::launch_decode<__nv_bfloat16>(const AttentionForward&, const DecodePlan&, bool,
                                               cudaStream_t);
