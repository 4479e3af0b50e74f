#include "bindings/cuda_device.h"

#include <dlfcn.h>

#include "common/check.h"

namespace fl {
namespace {

using CurrentStream = int32_t (*)(int32_t device_index, void** stream);

// Exported by CUDA builds of Torch alone, so it is looked up at run time.
CurrentStream find_current_stream() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  if (void* found = dlsym(RTLD_DEFAULT, kName)) return reinterpret_cast<CurrentStream>(found);
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return library ? reinterpret_cast<CurrentStream>(dlsym(library, kName)) : nullptr;
}

}  // namespace

CudaDevice::CudaDevice(int32_t index) : index_(index), guard_(index) {}

void* CudaDevice::stream() const {
  static const CurrentStream current_stream = find_current_stream();
  FL_CHECK(current_stream != nullptr, "this torch is not a CUDA build: it has no CUDA streams");
  void* stream = nullptr;
  FL_CHECK(current_stream(index_, &stream) == 0, "no current stream on CUDA device ", index_);
  return stream;
}

bool CudaDevice::holds(const TensorRef& tensor) const {
  return tensor.device_type() == aoti_torch_device_type_cuda() && tensor.device_index() == index_;
}

void CudaDevice::admit(const Tensor& tensor, const char* what) const {
  FL_CHECK(holds(tensor), what, " has to be on CUDA device ", index_);
}

Tensor CudaDevice::output(Tensor tensor) const { return tensor; }

Tensor CudaDevice::empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) const {
  const torch::stable::Device device(torch::headeronly::DeviceType::CUDA, index_);
  return torch::stable::empty(sizes, dtype, std::nullopt, device);
}

}  // namespace fl
