// csrc/bindings/cuda_device.h where the device is the simulator: its tensors are CPU tensors.
#include "bindings/cuda_device.h"

#include <cstring>

#include "common/check.h"
#include "runtime.h"

namespace fl {

CudaDevice::CudaDevice(int32_t index) : index_(index) {}

void* CudaDevice::stream() const { return nullptr; }

bool CudaDevice::holds(const TensorRef& tensor) const {
  return tensor.device_type() == aoti_torch_device_type_cpu() &&
         !sim::simulator().on_host(tensor.data());
}

// A dense tensor may be a copy that the operator made, whose memory nobody has told of yet.
void CudaDevice::admit(const Tensor& tensor, const char* what) const {
  FL_CHECK(holds(tensor), what, " has to be on the simulated GPU");
  size_t bytes = tensor.numel() * tensor.element_size();
  if (bytes && tensor.is_contiguous()) sim::simulator().allocated(tensor.data_ptr(), bytes);
}

// Filled with ones, which are NaN in every floating dtype: what a kernel reads before it writes, or
// leaves out, shows.
Tensor CudaDevice::output(Tensor tensor) const {
  const size_t bytes = tensor.numel() * tensor.element_size();
  if (bytes == 0) return tensor;
  std::memset(tensor.data_ptr(), 0xff, bytes);
  sim::simulator().allocated(tensor.data_ptr(), bytes);
  return tensor;
}

Tensor CudaDevice::empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) const {
  return output(torch::stable::empty(sizes, dtype));
}

}  // namespace fl
