// Attention forward on CUDA: the choice of the dtype's kernels.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/kernels.h"
#include "common/check.h"
#include "common/cuda_arch.h"

namespace fl {

// csrc/attention/cuda_forward_kernel.cuh
template <class T>
void forward_of(const AttentionForward& p, int arch, cudaStream_t stream);

void cuda_attention_forward(const AttentionForward& p, void* stream) {
  if (p.batch == 0 || p.heads_q == 0 || p.seqlen_q == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const int arch = compiled_arch("attention");
  if (p.dtype == DType::kFloat32) return forward_of<float>(p, arch, cuda_stream);
  if (p.dtype == DType::kFloat16) return forward_of<__half>(p, arch, cuda_stream);
  need_arch_80("attention: bfloat16", arch);
  forward_of<__nv_bfloat16>(p, arch, cuda_stream);
}

}  // namespace fl
