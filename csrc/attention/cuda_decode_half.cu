#include "attention/cuda_decode_kernel.cuh"

template void fl::launch_decode<__half>(const AttentionForward&, const DecodePlan&, bool,
                                        cudaStream_t);
