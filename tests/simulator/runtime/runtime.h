// The CUDA runtime that the simulated library is linked with instead of libcudart. It keeps what a
// program may ask of a runtime (modules, functions, errors, a device of the chosen architecture)
// and hands every launch to the simulator, which is Python's: tests/simulator/device.py.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "fat_binary.h"

namespace sim {

// A kernel as __cudaRegisterFunction announced it; cudaKernel_t is a pointer to this.
struct Function {
  const std::vector<Image>* images;
  std::string name;                     // as in the PTX
  int most_dynamic_shared = 48 * 1024;  // bytes, until cudaFuncSetAttribute asks for more
};

// The function behind a host stub, or null.
Function* find_function(const void* host_stub);

// The image for newest_code_arch() or, if there is none, the newest for older ones; or null.
const Image* image_of(const Function& function);

struct Device {
  int arch, multiprocessors, threads, blocks;  // threads and blocks: per multiprocessor
  int shared, block_shared;                    // bytes per multiprocessor; per block, on request
  int l2_bytes, clock_khz, memory_khz, bus_bits;
};

const Device& device();
// Whose code runs there, where the library has it: the device's own, or an older one.
int newest_code_arch();

// The error becomes the last one, if it is one.
cudaError_t remember(cudaError_t error);

// The interface to Python, mirrored in tests/simulator/device.py.
struct LaunchRequest {
  const char *name, *shown;  // as in the PTX; as people write it
  const char* ptx;
  uint64_t ptx_bytes;
  uint32_t grid[3], block[3];
  void** args;
  uint64_t shared;  // dynamic, bytes
};

struct Facts {
  uint64_t static_shared, local;  // bytes per block, per thread
  int32_t most_threads;           // per block
};

struct Simulator {
  int (*launch)(const LaunchRequest*);                   // 0, or the launch failed
  int (*facts)(const LaunchRequest*, Facts*);            // only name and ptx are read
  void (*allocated)(const void* memory, uint64_t size);  // the operator made this
  int (*on_host)(const void* memory);                    // what a kernel must not touch
};

const Simulator& simulator();

}  // namespace sim
