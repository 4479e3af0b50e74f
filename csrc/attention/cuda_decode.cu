// Attention decoding on CUDA: how the work is split, and which kernel does it.
#include <algorithm>

#include "attention/cuda_decode.cuh"
#include "attention/kernels.h"
#include "common/check.h"
#include "common/cuda_arch.h"

namespace fl {
namespace {

// Two blocks for each multiprocessor, as far as each part keeps two units of keys, and eight keys a
// row: then what parts write and read of their outputs is less than a quarter of the caches.
DecodePlan plan_of(const AttentionForward& p) {
  constexpr int64_t kMostParts = 128;
  const int64_t rows = p.seqlen_q * (p.heads_q / p.heads_k);
  const int64_t block_rows = std::min<int64_t>(
      rows, decode_rows(p.dtype == DType::kFloat32 ? 4 : 2, std::max(p.head_dim, p.head_dim_v)));
  const int64_t row_blocks = (rows + block_rows - 1) / block_rows;
  int64_t keys = p.seqlen_k;
  const int64_t right = p.is_causal ? 0 : p.window_right;
  if (p.window_left >= 0 && right >= 0) keys = std::min(keys, p.window_left + right + p.seqlen_q);
  const int64_t least = std::max<int64_t>(2 * kKeyUnit, 8 * block_rows);
  const int64_t wanted = 2 * device_attribute("attention_decode", cudaDevAttrMultiProcessorCount) /
                         (p.batch * p.heads_k * row_blocks);
  DecodePlan plan{};
  plan.page_shift = 31;
  plan.rows = static_cast<int>(rows);
  plan.block_rows = static_cast<int>(block_rows);
  plan.row_blocks = static_cast<int>(row_blocks);
  plan.tiles = static_cast<int>((block_rows + 15) / 16);
  plan.parts = static_cast<int>(std::clamp(std::min(wanted, keys / least), int64_t{1}, kMostParts));
  plan.padded_v = static_cast<int>((p.head_dim_v + 3) / 4 * 4);
  // Exact for keys below 2^31 (Granlund and Montgomery 1994): page_factor <= 2^32 - 1.
  plan.page_size = p.page_table ? static_cast<int>(std::min<int64_t>(p.page_size, kFar)) : kFar;
  while (int64_t{1} << (plan.page_shift - 31) < plan.page_size) ++plan.page_shift;
  plan.page_factor = static_cast<uint32_t>((uint64_t{1} << plan.page_shift) / plan.page_size + 1);
  plan.general = p.softcap > 0 || p.alibi_slopes || !(p.softmax_scale > 0);
  return plan;
}

// Many tokens fill the tiles of the forward kernels, which have none without masks for float32.
bool is_prefill(const AttentionForward& p) {
  return !p.page_table && p.seqlen_q > 64 && p.dtype != DType::kFloat32;
}

}  // namespace

int64_t cuda_attention_decode_scratch(const AttentionForward& p) {
  if (is_prefill(p)) return 0;
  const DecodePlan plan = plan_of(p);
  if (plan.parts == 1) return 0;
  return plan.parts * p.batch * p.heads_k * plan.rows * (plan.padded_v + 2);
}

void cuda_attention_decode(const AttentionForward& p, float* scratch, void* stream) {
  if (is_prefill(p)) return cuda_attention_forward(p, stream);
  DecodePlan plan = plan_of(p);
  plan.scratch = scratch;
  FL_CHECK(p.batch <= 65535 && p.heads_k * plan.row_blocks <= 65535,
           "attention_decode: more than 65535 sequences, or heads times blocks of rows");
  FL_CHECK(p.seqlen_k < kFar, "attention_decode: a cache of 2^30 keys or more");
  const int arch = compiled_arch("attention_decode");
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (p.dtype == DType::kFloat16) return launch_decode<__half>(p, plan, arch >= 80, cuda_stream);
  if (p.dtype == DType::kFloat32) return launch_decode<float>(p, plan, arch >= 80, cuda_stream);
  need_arch_80("attention_decode: bfloat16", arch);
  launch_decode<__nv_bfloat16>(p, plan, true, cuda_stream);
}

}  // namespace fl
