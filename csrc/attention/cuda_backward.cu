// Attention backward on CUDA: its scratch memory, and the choice of kernels.
#include <algorithm>
#include <cmath>

#include "attention/cuda_backward_launches.h"
#include "attention/kernels.h"
#include "common/check.h"
#include "common/cuda_arch.h"

namespace fl {
namespace {

// softcap, ALiBi, masks, dropout and scales that turn the order of scores around need the general
// kernel, and so do scales with which scores of standard normal rows come near kCoarse; for float32
// and large head dims there is no other.
bool is_general(const AttentionForward& f) {
  const float deviation = f.softmax_scale * std::sqrt(static_cast<float>(f.head_dim));
  return f.softcap > 0 || f.alibi_slopes || f.mask.kind != MaskKind::kNone || f.dropout.enabled() ||
         !(f.softmax_scale > 0) || deviation > 128.0f || f.dtype == DType::kFloat32 ||
         std::max(f.head_dim, f.head_dim_v) > 128;
}

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// The scratch memory from `memory` on, and how many bytes it takes.
BackwardScratch layout(const AttentionBackward& p, char* memory, int64_t* bytes) {
  const AttentionForward& f = p.forward;
  BackwardScratch scratch{};
  scratch.general = is_general(f);
  const int64_t dim = std::max(f.head_dim, f.head_dim_v);
  scratch.columns = static_cast<int>(scratch.general ? round_up(f.head_dim, 64)
                                     : dim > 64      ? 128
                                                     : 64);
  scratch.rows = f.cu_seqlens_q ? round_up(f.lse_stride_h, kRowUnit) + f.batch * kRowUnit
                                : f.batch * round_up(f.seqlen_q, kRowUnit);
  const int64_t rows = f.heads_q * scratch.rows;
  int64_t used = 0;
  const auto take = [&](int64_t size) {
    char* at = memory + used;
    used += round_up(size, 256);
    return at;
  };
  scratch.dq = reinterpret_cast<float*>(take(rows * scratch.columns * 4));
  scratch.row_data = reinterpret_cast<float4*>(take(rows * kRowBytes));
  scratch.turns = reinterpret_cast<int*>(take(rows / 16 * 2 * 4));
  scratch.ticket = reinterpret_cast<int*>(take(4));
  *bytes = used;
  return scratch;
}

}  // namespace

int64_t cuda_attention_backward_scratch(const AttentionBackward& p) {
  int64_t bytes = 0;
  layout(p, nullptr, &bytes);
  return bytes;
}

void cuda_attention_backward(const AttentionBackward& p, void* memory, void* stream) {
  const AttentionForward& f = p.forward;
  FL_CHECK(f.batch <= 65535 && f.heads_q <= 65535, "attention: more than 65535 heads or batches");
  FL_CHECK(f.seqlen_q < kFar && f.seqlen_k < kFar, "attention: a sequence of 2^30 rows or more");
  const int arch = compiled_arch("attention");
  int64_t bytes = 0;
  const BackwardScratch scratch = layout(p, static_cast<char*>(memory), &bytes);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (f.dtype == DType::kFloat16) return backward_float16(p, scratch, arch < 80, cuda_stream);
  if (f.dtype == DType::kFloat32) {
    const bool wide = std::max(f.head_dim, f.head_dim_v) > 128;
    if (wide) need_arch_80("attention: a gradient in float32 with a head_dim above 128", arch);
    return backward_float32(p, scratch, arch < 80, cuda_stream);
  }
  need_arch_80("attention: bfloat16", arch);
  backward_bfloat16(p, scratch, cuda_stream);
}

}  // namespace fl
