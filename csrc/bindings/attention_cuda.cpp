// attention_forward on CUDA: dense and packed (cu_seqlens).
#include <limits>
#include <tuple>

#include "attention/kernels.h"
#include "bindings/attention_inputs.h"
#include "bindings/cuda_device.h"
#include "bindings/namespace.h"

namespace fl {
namespace {

void admit(const CudaDevice& device, const AttentionInputs& in) {
  device.admit(in.query, "attention: query");
  device.admit(in.key, "attention: key");
  device.admit(in.value, "attention: value");
  device.admit(in.attn_mask, "attention: attn_mask");
  device.admit(in.alibi_slopes, "attention: alibi_slopes");
  device.admit(in.sinks, "attention: sinks");
  device.admit(in.dropout_rng, "attention: dropout_rng");
  device.admit(in.cu_seqlens_q, "attention: cu_seqlens_q");
  device.admit(in.cu_seqlens_k, "attention: cu_seqlens_k");
}

std::tuple<Tensor, Tensor> attention_forward_cuda(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& dropout_rng, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    double dropout_p, bool is_causal, bool bottom_right, double scale, int64_t window_left,
    int64_t window_right, double softcap, bool deterministic) {
  FL_CHECK(cuda_attention_forward != nullptr,
           "fastlayers was built without CUDA kernels; rebuild it where nvcc is found");
  AttentionInputs in{query,        key,          value,        attn_mask,    alibi_slopes,
                     sinks,        dropout_rng,  cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                     max_seqlen_k, dropout_p,    is_causal,    bottom_right, scale,
                     window_left,  window_right, softcap,      deterministic};
  in.reads_lengths = false;
  const CudaDevice device(query.get_device_index());
  prepare(in);
  admit(device, in);
  const Tensor out = device.output(allocate_like(query, in.value.size(in.value.dim() - 1)));
  const Tensor lse = device.output(allocate_lse(in));
  if (in.packed()) {  // rows behind the last sequence, which no block visits
    torch::stable::fill_(out, 0.0);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  }
  const AttentionForward p = parameters(in, out, lse);
  if (out.numel() > 0) cuda_attention_forward(p, device.stream());
  return {out, lse};
}

}  // namespace
}  // namespace fl

STABLE_TORCH_LIBRARY_IMPL(FL_NAMESPACE, FL_CUDA_KEY, m) {
  m.impl("attention_forward", TORCH_BOX(&fl::attention_forward_cuda));
}
