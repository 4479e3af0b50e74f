// Torch's current CUDA stream, whatever torch this library was built against.
#pragma once

#include <cstdint>

namespace fl {

// cudaStream_t of the device. The function that tells it is exported by CUDA builds of Torch alone,
// so it is looked up at run time; throws where it is not there.
void* current_cuda_stream(int32_t device_index);

}  // namespace fl
