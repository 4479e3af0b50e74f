#include "bindings/cuda_stream.h"

#include <dlfcn.h>

#include "common/check.h"

namespace fl {
namespace {

using CurrentStream = int32_t (*)(int32_t device_index, void** stream);

CurrentStream find_current_stream() {
  constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  if (void* found = dlsym(RTLD_DEFAULT, kName)) return reinterpret_cast<CurrentStream>(found);
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return library ? reinterpret_cast<CurrentStream>(dlsym(library, kName)) : nullptr;
}

}  // namespace

void* current_cuda_stream(int32_t device_index) {
  static const CurrentStream current_stream = find_current_stream();
  FL_CHECK(current_stream != nullptr, "this torch is not a CUDA build: it has no CUDA streams");
  void* stream = nullptr;
  FL_CHECK(current_stream(device_index, &stream) == 0, "no current stream on CUDA device ",
           device_index);
  return stream;
}

}  // namespace fl
