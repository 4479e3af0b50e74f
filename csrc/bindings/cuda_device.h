// The device that a CUDA operator works on, whatever torch this library was built against.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <optional>

#include "bindings/tensor.h"
#include "bindings/tensor_list.h"

namespace fl {

using torch::headeronly::ScalarType;

// Torch's current device while this lives.
class CudaDevice {
 public:
  explicit CudaDevice(int32_t index);

  // Torch's current cudaStream_t there.
  void* stream() const;

  // Whether the tensor lies there.
  bool holds(const TensorRef& tensor) const;
  bool holds(const Tensor& tensor) const { return holds(TensorRef(tensor.get())); }

  // Throws unless the tensor lies there. Arguments of which an operator may have made dense copies
  // are admitted before a kernel sees them.
  void admit(const Tensor& tensor, const char* what) const;
  void admit(const std::optional<Tensor>& tensor, const char* what) const {
    if (tensor) admit(*tensor, what);
  }
  // A tensor that was just allocated there, for a kernel to fill.
  Tensor output(Tensor tensor) const;

  // A tensor there, not initialised.
  Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) const;

 private:
  int32_t index_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace fl
