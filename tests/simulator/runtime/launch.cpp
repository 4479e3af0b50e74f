// Registration of kernels by the stubs that nvcc writes, and their launches.
#include <cxxabi.h>

#include <cstdlib>
#include <map>
#include <memory>

#include "runtime.h"

namespace sim {
namespace {

// Filled while the library is loaded, read afterwards.
std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> all;
  return all;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

thread_local std::vector<Configuration> configurations;

std::string readable(const std::string& name) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(
      abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status), std::free);
  return status == 0 ? text.get() : name;
}

cudaError_t launch(Function* function, dim3 grid, dim3 block, void** args, size_t shared,
                   cudaStream_t stream) {
  if (function == nullptr) return cudaErrorInvalidDeviceFunction;
  if (stream != nullptr) return cudaErrorInvalidResourceHandle;  // there is one stream, the default
  if (shared > static_cast<size_t>(function->most_dynamic_shared)) return cudaErrorInvalidValue;
  const Image* image = image_of(*function);
  if (image == nullptr) return cudaErrorNoKernelImageForDevice;
  const std::string shown = readable(function->name);
  const LaunchRequest request{function->name.c_str(),
                              shown.c_str(),
                              image->ptx.data(),
                              image->ptx.size(),
                              {grid.x, grid.y, grid.z},
                              {block.x, block.y, block.z},
                              args,
                              shared};
  return simulator().launch(&request) == 0 ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace

Function* find_function(const void* host_stub) {
  const auto found = functions().find(host_stub);
  return found == functions().end() ? nullptr : &found->second;
}

const Image* image_of(const Function& function) {
  const Image* newest = nullptr;
  for (const Image& image : *function.images) {
    if (image.arch > newest_code_arch()) continue;
    if (newest == nullptr || image.arch > newest->arch) newest = &image;
  }
  return newest;
}

}  // namespace sim

using sim::remember;

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  return reinterpret_cast<void**>(new std::vector<sim::Image>(sim::read_fat_binary(wrapper)));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}  // at the end of the process
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** images, const char* host_stub, char*, const char* name, int,
                            uint3*, uint3*, dim3*, dim3*, int*) {
  const auto* read = reinterpret_cast<std::vector<sim::Image>*>(images);
  sim::functions()[host_stub] = sim::Function{read, name};
}
// Variables are the simulator's own, one set per module; the host cannot reach them.
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  sim::configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (sim::configurations.empty()) return remember(cudaErrorMissingConfiguration);
  const sim::Configuration top = sim::configurations.back();
  sim::configurations.pop_back();
  *grid = top.grid;
  *block = top.block;
  *shared = top.shared;
  *static_cast<cudaStream_t*>(stream) = top.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host_stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(sim::find_function(host_stub));
  return *kernel == nullptr ? remember(cudaErrorInvalidDeviceFunction) : cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args,
                               size_t shared, cudaStream_t stream) {
  auto* function = reinterpret_cast<sim::Function*>(kernel);
  return remember(sim::launch(function, grid, block, args, shared, stream));
}
cudaError_t cudaLaunchKernel(const void* host_stub, dim3 grid, dim3 block, void** args,
                             size_t shared, cudaStream_t stream) {
  return remember(sim::launch(sim::find_function(host_stub), grid, block, args, shared, stream));
}
// Attributes are refused but for a cluster of one block, which is what there is without them.
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host_stub,
                                void** args) {
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    const auto& cluster = attribute.val.clusterDim;
    if (attribute.id != cudaLaunchAttributeClusterDimension ||
        cluster.x * cluster.y * cluster.z != 1) {
      return remember(cudaErrorNotSupported);
    }
  }
  return cudaLaunchKernel(host_stub, config->gridDim, config->blockDim, args,
                          config->dynamicSmemBytes, config->stream);
}

}  // extern "C"
