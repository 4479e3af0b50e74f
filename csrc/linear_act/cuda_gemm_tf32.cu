#include "linear_act/cuda_launch.cuh"

void fl::launch_gemm_tf32(const GemmPlan& plan) { launch_gemm_for_layout<Tf32>(plan); }
