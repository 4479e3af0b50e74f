#include "common/check.h"
#include "common/cuda_arch.h"

namespace fl {
namespace {

__global__ void any_kernel() {}

}  // namespace

int compiled_arch(const char* op) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, any_kernel);
  if (error != cudaSuccess) cudaGetLastError();  // forgets it: this message is the report
  FL_CHECK(error == cudaSuccess, op, ": this GPU runs no kernel of this library (",
           cudaGetErrorString(error),
           "); rebuild fastlayers with FASTLAYERS_CUDA_ARCHS set to its compute capability");
  return attributes.ptxVersion;
}

void need_arch_80(const char* what, int arch) {
  FL_CHECK(arch >= 80, what, " needs kernels for compute capability 8.0, this GPU runs those for ",
           arch / 10, ".", arch % 10);
}

int device_attribute(const char* op, cudaDeviceAttr which) {
  int device = 0, value = 0;
  FL_CHECK(cudaGetDevice(&device) == cudaSuccess &&
               cudaDeviceGetAttribute(&value, which, device) == cudaSuccess,
           op, ": no CUDA device");
  return value;
}

}  // namespace fl
