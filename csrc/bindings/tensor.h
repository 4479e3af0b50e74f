// What the bindings need of a Tensor: dtype and raw pointers, in the kernels' own terms.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"
#include "common/dtype.h"

namespace fl {

using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* what) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      fail(what, ": dtype has to be float32, float16 or bfloat16");
  }
}

}  // namespace fl
