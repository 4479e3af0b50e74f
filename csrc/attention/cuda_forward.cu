// Attention forward on CUDA: the choice of the dtype's kernels.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/kernels.h"
#include "common/check.h"

namespace fl {

// csrc/attention/cuda_forward_kernel.cuh
template <class T>
void forward_of(const AttentionForward& p, cudaStream_t stream);

void cuda_attention_forward(const AttentionForward& p, void* stream) {
  if (p.batch == 0 || p.heads_q == 0 || p.seqlen_q == 0) return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (p.dtype == DType::kFloat16) return forward_of<__half>(p, cuda_stream);
  FL_CHECK(p.dtype == DType::kBFloat16, "attention: the CUDA kernels take float16 and bfloat16");
  int device = 0, major = 0;
  FL_CHECK(
      cudaGetDevice(&device) == cudaSuccess &&
          cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess,
      "attention: no CUDA device");
  FL_CHECK(major >= 8, "attention: bfloat16 needs compute capability 8.0, this GPU has ", major);
  forward_of<__nv_bfloat16>(p, cuda_stream);
}

}  // namespace fl
