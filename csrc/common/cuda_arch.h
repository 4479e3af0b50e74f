// What the current GPU is, and which code of this library it runs. `op` begins an error's message.
#pragma once

#include <cuda_runtime_api.h>

namespace fl {

// What __CUDA_ARCH__ / 10 is in the kernels that the current device runs: 75, 80, 90. Less than the
// device's own where it runs code for an older one, so that launchers have to go by it wherever
// kernels differ. Throws where the device runs none.
int compiled_arch(const char* op);

// Throws where `what` needs kernels for 8.0 or newer and `arch` (compiled_arch) is older.
void need_arch_80(const char* what, int arch);

// Of the current device.
int device_attribute(const char* op, cudaDeviceAttr which);

}  // namespace fl
