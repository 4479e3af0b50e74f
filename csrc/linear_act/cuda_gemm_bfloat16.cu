#include "linear_act/cuda_launch.cuh"

void fl::launch_gemm_bfloat16(const GemmPlan& plan) { launch_gemm_for_layout<__nv_bfloat16>(plan); }
