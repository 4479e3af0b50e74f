// Every operator the library registers. Implementations stand in one file per op beside this one;
// fakes and autograd in fastlayers/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastlayers, m) {
  // The instruction set the CPU kernels run with: none, avx2, avx512 or avx512_bf16.
  m.def("cpu_isa() -> str");
}
