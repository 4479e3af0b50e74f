// What launchers ask of the CUDA runtime, each as a function for tests/simulator/test_runtime.py.
#include <cuda_runtime.h>

__global__ void __launch_bounds__(128) fill(float* out, float value, int n) {
  extern __shared__ float shared[];
  shared[threadIdx.x] = value;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = shared[threadIdx.x];
}

__global__ void with_static(float* out) {
  __shared__ float shared[1024];
  shared[threadIdx.x] = 1.0f;
  out[threadIdx.x] = shared[threadIdx.x];
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int launch(float* out, float value, int n, int threads, int shared) {
  fill<<<(n + threads - 1) / threads, threads, shared>>>(out, value, n);
  return cudaGetLastError();
}
EXPORT int launch_ex(float* out, float value, int n, int cluster) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = (n + 127) / 128;
  config.blockDim = 128;
  config.dynamicSmemBytes = 512;
  config.attrs = &attribute;
  config.numAttrs = cluster ? 1 : 0;
  return cudaLaunchKernelEx(&config, fill, out, value, n);
}
EXPORT int last_error() { return cudaGetLastError(); }
EXPORT int allow_shared(int bytes) {
  return cudaFuncSetAttribute(fill, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
EXPORT int allow_shared_beside_static(int bytes) {
  return cudaFuncSetAttribute(with_static, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
EXPORT int static_shared() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, with_static) ? -1 : attributes.sharedSizeBytes;
}
EXPORT int most_threads() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, fill) ? -1 : attributes.maxThreadsPerBlock;
}
EXPORT int blocks_per_multiprocessor(int threads, int shared) {
  int blocks;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, fill, threads, shared) ? -1
                                                                                       : blocks;
}
EXPORT int capability() {
  int device, major, minor;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceProp properties;
  cudaGetDeviceProperties(&properties, device);
  return properties.major == major && properties.minor == minor ? 10 * major + minor : -1;
}
EXPORT int clear_and_copy(float* to, const float* from, int n) {
  cudaMemsetAsync(to, 0, 2 * n * sizeof(float), nullptr);
  cudaMemcpyAsync(to, from, n * sizeof(float), cudaMemcpyDeviceToDevice, nullptr);
  return cudaStreamSynchronize(nullptr);
}
