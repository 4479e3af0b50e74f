// attention_decode on CUDA. The values of cache_seqlens and page_table are read by the kernel
// alone.
#include <tuple>

#include "attention/kernels.h"
#include "bindings/attention_inputs.h"
#include "bindings/cuda_device.h"
#include "bindings/namespace.h"

namespace fl {
namespace {

void admit(const CudaDevice& device, const AttentionInputs& in) {
  device.admit(in.query, "attention: query");
  device.admit(in.key, "attention: key_cache");
  device.admit(in.value, "attention: value_cache");
  device.admit(in.cache_seqlens, "attention: cache_seqlens");
  device.admit(in.page_table, "attention: page_table");
  device.admit(in.alibi_slopes, "attention: alibi_slopes");
  device.admit(in.sinks, "attention: sinks");
}

std::tuple<Tensor, Tensor> attention_decode_cuda(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& cache_seqlens, const OptionalTensor& page_table,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, bool is_causal, double scale,
    int64_t window_left, int64_t window_right, double softcap) {
  FL_CHECK(cuda_attention_decode != nullptr,
           "fastlayers was built without CUDA kernels; rebuild it where nvcc is found");
  AttentionInputs in{.query = query,
                     .key = key_cache,
                     .value = value_cache,
                     .alibi_slopes = alibi_slopes,
                     .sinks = sinks,
                     .is_causal = is_causal,
                     .bottom_right = true,
                     .scale = scale,
                     .window_left = window_left,
                     .window_right = window_right,
                     .softcap = softcap,
                     .cache_seqlens = cache_seqlens,
                     .page_table = page_table,
                     .reads_lengths = false};
  const CudaDevice device(query.get_device_index());
  prepare(in);
  admit(device, in);
  const Tensor out = device.output(allocate_like(query, in.value.size(3)));
  const Tensor lse = device.output(allocate_lse(in));
  if (out.numel() == 0) return {out, lse};
  const AttentionForward p = parameters(in, out, lse);
  const Tensor scratch = device.empty({cuda_attention_decode_scratch(p)}, ScalarType::Float);
  cuda_attention_decode(p, data<float>(scratch), device.stream());
  return {out, lse};
}

}  // namespace
}  // namespace fl

STABLE_TORCH_LIBRARY_IMPL(FL_NAMESPACE, FL_CUDA_KEY, m) {
  m.impl("attention_decode", TORCH_BOX(&fl::attention_decode_cuda));
}
