// What the CUDA sources of linear_act share on the host's side.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dispatch.h"
#include "linear_act/params.h"

namespace fl {

// What a launch of the product is told. Where splits > 1, block (x, y) sums over the y-th part of
// k, and leaves its sums in `partial`: (splits, m or 2 m where gated, n), rows partial_stride
// apart. The rows of the second product come behind.
struct GemmCall {
  LinearActGemm g;
  float* partial = nullptr;
  int64_t partial_stride = 0;
  int splits = 1, tiles_m = 0, tiles_n = 0;
};

// Adds the parts in order, and does what comes after the product.
void add_parts(const GemmCall& call, void* stream);

template <class F>
void with_cuda_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Type<float>{});
    case DType::kFloat16:
      return f(Type<__half>{});
    case DType::kBFloat16:
      return f(Type<__nv_bfloat16>{});
  }
}

}  // namespace fl
