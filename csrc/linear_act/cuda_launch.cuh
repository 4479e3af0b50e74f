// How a product is cut into blocks, and the kernel launched for its layout.
#pragma once

#include "common/check.h"
#include "linear_act/cuda_gemm.cuh"

namespace fl {

// The call, with its blocks and splits chosen for kernels of architecture `arch`.
struct GemmPlan {
  GemmCall call;
  int arch = 0;
  cudaStream_t stream = nullptr;
};

template <class T, bool kDenseA, bool kDenseB>
void launch_gemm(const GemmPlan& plan) {
  auto* kernel = linear_act_gemm_kernel<T, kDenseA, kDenseB>;
  const GemmCall& call = plan.call;
  const int shared_bytes = gemm_shared_bytes<T>(plan.arch);
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    FL_CHECK(error == cudaSuccess, "linear_act: ", cudaGetErrorString(error));
  }
  const dim3 grid(static_cast<unsigned>(call.tiles_m) * static_cast<unsigned>(call.tiles_n),
                  static_cast<unsigned>(call.splits));
  kernel<<<grid, kGemmThreads, shared_bytes, plan.stream>>>(call);
  const cudaError_t error = cudaGetLastError();
  FL_CHECK(error == cudaSuccess, "linear_act: ", cudaGetErrorString(error));
}

template <class T>
void launch_gemm_for_layout(const GemmPlan& plan) {
  const bool a = plan.call.g.a[0].k_dense, b = plan.call.g.b[0].k_dense;
  FL_CHECK(a || !b, "linear_act: no kernel for an a with dense rows beside a b with dense k");
  a&& b ? launch_gemm<T, true, true>(plan)
  : a   ? launch_gemm<T, true, false>(plan)
        : launch_gemm<T, false, false>(plan);
}

void launch_gemm_float32(const GemmPlan& plan);
void launch_gemm_tf32(const GemmPlan& plan);
void launch_gemm_float16(const GemmPlan& plan);
void launch_gemm_bfloat16(const GemmPlan& plan);

}  // namespace fl
