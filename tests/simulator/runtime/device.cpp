// The device of the chosen architecture: what it has, and what a kernel takes of it.
#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace sim {
namespace {

// T4, A100 (SXM, 40 GB), RTX 4090 and H100 (SXM).
constexpr Device kDevices[] = {
    {75, 40, 1024, 16, 65536, 65536, 4 << 20, 1590000, 5001000, 256},
    {80, 108, 2048, 32, 167936, 166912, 40 << 20, 1410000, 1215000, 5120},
    {89, 128, 1536, 24, 102400, 101376, 72 << 20, 2520000, 10501000, 384},
    {90, 132, 2048, 32, 233472, 232448, 50 << 20, 1980000, 2619000, 5120},
};

constexpr int kWarp = 32, kBlockThreads = 1024, kRegisters = 65536, kReserved = 1024;

const Device* chosen = &kDevices[1];
int newest_code = 80;
Simulator connected{};
thread_local cudaError_t last_error = cudaSuccess;

bool facts_of(const Function& function, Facts* facts) {
  const Image* image = image_of(function);
  if (image == nullptr) return false;
  LaunchRequest request{};
  request.name = function.name.c_str();
  request.ptx = image->ptx.data();
  request.ptx_bytes = image->ptx.size();
  return simulator().facts(&request, facts) == 0;
}

bool attribute_of(cudaDeviceAttr attribute, int* value) {
  const Device& d = device();
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      return *value = d.arch / 10, true;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = d.arch % 10, true;
    case cudaDevAttrMultiProcessorCount:
      return *value = d.multiprocessors, true;
    case cudaDevAttrMaxThreadsPerBlock:
      return *value = kBlockThreads, true;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return *value = d.threads, true;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return *value = d.blocks, true;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return *value = 48 * 1024, true;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = d.block_shared, true;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return *value = d.shared, true;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      return *value = d.arch < 80 ? 0 : kReserved, true;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return *value = kRegisters, true;
    case cudaDevAttrWarpSize:
      return *value = kWarp, true;
    case cudaDevAttrL2CacheSize:
      return *value = d.l2_bytes, true;
    case cudaDevAttrMaxGridDimX:
      return *value = 2147483647, true;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      return *value = 65535, true;
    case cudaDevAttrClockRate:
      return *value = d.clock_khz, true;
    case cudaDevAttrMemoryClockRate:
      return *value = d.memory_khz, true;
    case cudaDevAttrGlobalMemoryBusWidth:
      return *value = d.bus_bits, true;
    case cudaDevAttrClusterLaunch:
      return *value = 0, true;
    default:
      return false;
  }
}

}  // namespace

const Device& device() { return *chosen; }
int newest_code_arch() { return std::min(chosen->arch, newest_code); }
const Simulator& simulator() { return connected; }

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace sim

using sim::device;
using sim::remember;

extern "C" {

__attribute__((visibility("default"))) void simulator_connect(const sim::Simulator* simulator) {
  sim::connected = *simulator;
}
// code: the newest architecture whose code runs, as if there were none for newer ones. 0, or -1 for
// an architecture that is not known.
__attribute__((visibility("default"))) int simulator_choose(int arch, int code) {
  sim::newest_code = code;
  for (const sim::Device& d : sim::kDevices) {
    if (d.arch == arch) return sim::chosen = &d, 0;
  }
  return -1;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = sim::last_error;
  sim::last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return sim::last_error; }

cudaError_t cudaGetDevice(int* index) { return *index = 0, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaSetDevice(int index) {
  return remember(index == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  if (index != 0) return remember(cudaErrorInvalidDevice);
  return remember(sim::attribute_of(attribute, value) ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  if (index != 0) return remember(cudaErrorInvalidDevice);
  const sim::Device& d = device();
  cudaDeviceProp p{};
  std::strcpy(p.name, "simulator");
  p.major = d.arch / 10;
  p.minor = d.arch % 10;
  p.multiProcessorCount = d.multiprocessors;
  p.totalGlobalMem = size_t{16} << 30;
  p.sharedMemPerBlock = 48 * 1024;
  p.sharedMemPerBlockOptin = d.block_shared;
  p.sharedMemPerMultiprocessor = d.shared;
  p.reservedSharedMemPerBlock = d.arch < 80 ? 0 : sim::kReserved;
  p.regsPerBlock = p.regsPerMultiprocessor = sim::kRegisters;
  p.warpSize = sim::kWarp;
  p.maxThreadsPerBlock = sim::kBlockThreads;
  p.maxThreadsPerMultiProcessor = d.threads;
  p.maxBlocksPerMultiProcessor = d.blocks;
  p.l2CacheSize = d.l2_bytes;
  p.memoryBusWidth = d.bus_bits;
  *properties = p;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* host_stub) {
  const sim::Function* function = sim::find_function(host_stub);
  sim::Facts facts;
  if (function == nullptr || !sim::facts_of(*function, &facts)) {
    return remember(cudaErrorInvalidDeviceFunction);
  }
  cudaFuncAttributes a{};
  a.sharedSizeBytes = facts.static_shared;
  a.localSizeBytes = facts.local;
  a.maxThreadsPerBlock = facts.most_threads;
  a.maxDynamicSharedSizeBytes = function->most_dynamic_shared;
  a.ptxVersion = sim::image_of(*function)->arch;
  a.binaryVersion = device().arch;
  *attributes = a;  // registers are handed out by ptxas, which does not run: numRegs is 0
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* host_stub, cudaFuncAttribute attribute, int value) {
  sim::Function* function = sim::find_function(host_stub);
  sim::Facts facts;
  if (function == nullptr || !sim::facts_of(*function, &facts)) {
    return remember(cudaErrorInvalidDeviceFunction);
  }
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;  // a hint
  const int64_t most = device().block_shared - static_cast<int64_t>(facts.static_shared);
  if (value < 0 || value > most) return remember(cudaErrorInvalidValue);
  function->most_dynamic_shared = value;
  return cudaSuccess;
}

// As threads and shared memory allow; registers are not known.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void* host_stub, int block_threads, size_t dynamic_shared, unsigned) {
  const sim::Function* function = sim::find_function(host_stub);
  sim::Facts facts;
  if (function == nullptr || !sim::facts_of(*function, &facts)) {
    return remember(cudaErrorInvalidDeviceFunction);
  }
  if (block_threads <= 0) return remember(cudaErrorInvalidValue);
  const sim::Device& d = device();
  const int threads = (block_threads + sim::kWarp - 1) / sim::kWarp * sim::kWarp;
  const auto shared = static_cast<int64_t>(facts.static_shared + dynamic_shared) +
                      (d.arch < 80 ? 0 : sim::kReserved);
  *blocks = std::min(d.blocks, d.threads / threads);
  if (block_threads > facts.most_threads) *blocks = 0;
  if (shared > 0) *blocks = static_cast<int>(std::min<int64_t>(*blocks, d.shared / shared));
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* host_stub,
                                                          int block_threads,
                                                          size_t dynamic_shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, host_stub, block_threads,
                                                                dynamic_shared, 0);
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidResourceHandle:
      return "cudaErrorInvalidResourceHandle";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorMissingConfiguration:
      return "cudaErrorMissingConfiguration";
    case cudaErrorNoKernelImageForDevice:
      return "cudaErrorNoKernelImageForDevice";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    default:
      return "an error that the simulator does not name";
  }
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

}  // extern "C"
