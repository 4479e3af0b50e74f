// attention_forward and attention_backward on CUDA: dense and packed (cu_seqlens).
#include <limits>
#include <tuple>

#include "attention/kernels.h"
#include "bindings/attention_gradients.h"
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

void check_built(bool built) {
  FL_CHECK(built, "fastlayers was built without CUDA kernels; rebuild it where nvcc is found");
}

std::tuple<Tensor, Tensor> attention_forward_cuda(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& dropout_rng, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    double dropout_p, bool is_causal, bool bottom_right, double scale, int64_t window_left,
    int64_t window_right, double softcap, bool deterministic) {
  check_built(cuda_attention_forward != nullptr);
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

// Rows behind the last sequence, which no block visits, have gradient 0; and so has everything
// where there is nothing to do.
void prepare_outputs(const CudaDevice& device, AttentionGradients& call) {
  for (Tensor* gradient : {&call.dquery, &call.dkey, &call.dvalue}) {
    *gradient = device.output(*gradient);
    if (call.in.packed() || call.out.numel() == 0) torch::stable::zero_(*gradient);
  }
  for (Tensor* gradient : {&call.dmask, &call.dsinks}) {
    *gradient = device.output(*gradient);
    torch::stable::zero_(*gradient);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_cuda(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& out, const Tensor& lse,
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& dropout_rng, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    double dropout_p, bool is_causal, bool bottom_right, double scale, int64_t window_left,
    int64_t window_right, double softcap, bool deterministic, bool mask_gradient,
    bool sinks_gradient) {
  check_built(cuda_attention_backward != nullptr);
  AttentionInputs in{query,        key,          value,        attn_mask,    alibi_slopes,
                     sinks,        dropout_rng,  cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                     max_seqlen_k, dropout_p,    is_causal,    bottom_right, scale,
                     window_left,  window_right, softcap,      deterministic};
  in.reads_lengths = false;
  AttentionGradients call{std::move(in),  grad_out, grad_lse, out, lse, mask_gradient,
                          sinks_gradient, {},       {},       {},  {},  {}};
  const CudaDevice device(query.get_device_index());
  prepare_gradients(call);
  admit(device, call.in);
  device.admit(call.grad_out, "attention: the gradient of out");
  device.admit(call.grad_lse, "attention: the gradient of lse");
  device.admit(call.out, "attention: out");
  device.admit(call.lse, "attention: lse");
  prepare_outputs(device, call);
  if (call.out.numel() == 0) return call.results();
  const AttentionBackward p = parameters(call);
  const Tensor scratch = device.empty({cuda_attention_backward_scratch(p)}, ScalarType::Byte);
  cuda_attention_backward(p, scratch.mutable_data_ptr(), device.stream());
  return call.results();
}

}  // namespace
}  // namespace fl

STABLE_TORCH_LIBRARY_IMPL(FL_NAMESPACE, FL_CUDA_KEY, m) {
  m.impl("attention_forward", TORCH_BOX(&fl::attention_forward_cuda));
  m.impl("attention_backward", TORCH_BOX(&fl::attention_backward_cuda));
}
