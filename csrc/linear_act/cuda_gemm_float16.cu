#include "linear_act/cuda_launch.cuh"

void fl::launch_gemm_float16(const GemmPlan& plan) { launch_gemm_for_layout<__half>(plan); }
