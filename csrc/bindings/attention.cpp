// attention_forward, attention_backward and attention_decode on the CPU.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "attention/kernels.h"
#include "bindings/attention_gradients.h"

namespace fl {
namespace {

// Rows behind the last packed sequence, which no kernel visits.
bool has_rest(const OptionalTensor& cu_seqlens, const Tensor& tensor) {
  return cu_seqlens && data<int32_t>(*cu_seqlens)[cu_seqlens->size(0) - 1] < tensor.size(0);
}

// The random state lies in host memory.
void read_dropout_rng(AttentionForward& p) {
  if (!p.dropout_rng) return;
  p.dropout.seed = static_cast<uint64_t>(p.dropout_rng[0]);
  p.dropout.offset = static_cast<uint32_t>(p.dropout_rng[1]);
}

std::tuple<Tensor, Tensor> forward(AttentionInputs in) {
  const Tensor query = in.query;
  prepare(in);
  const Tensor out = allocate_like(query, in.value.size(in.value.dim() - 1));
  const Tensor lse = allocate_lse(in);
  if (has_rest(in.cu_seqlens_q, in.query)) {
    torch::stable::fill_(out, 0.0);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  }
  AttentionForward p = parameters(in, out, lse);
  read_dropout_rng(p);
  if (out.numel() > 0) FL_CALL_CPU_KERNEL(attention_forward, p);
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention_forward_cpu(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& dropout_rng, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    double dropout_p, bool is_causal, bool bottom_right, double scale, int64_t window_left,
    int64_t window_right, double softcap, bool deterministic) {
  return forward({query, key, value, attn_mask, alibi_slopes, sinks, dropout_rng, cu_seqlens_q,
                  cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, is_causal, bottom_right,
                  scale, window_left, window_right, softcap, deterministic});
}

std::tuple<Tensor, Tensor> attention_decode_cpu(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& cache_seqlens, const OptionalTensor& page_table,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, bool is_causal, double scale,
    int64_t window_left, int64_t window_right, double softcap) {
  return forward({.query = query,
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
                  .page_table = page_table});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(AttentionGradients call) {
  prepare_gradients(call);
  const AttentionInputs& in = call.in;
  if (has_rest(in.cu_seqlens_q, in.query)) torch::stable::zero_(call.dquery);
  if (call.out.numel() == 0 || has_rest(in.cu_seqlens_k, in.key)) {
    torch::stable::zero_(call.dkey);
    torch::stable::zero_(call.dvalue);
  }
  AttentionBackward p = parameters(call);
  read_dropout_rng(p.forward);
  if (call.out.numel() > 0) FL_CALL_CPU_KERNEL(attention_backward, p);
  return call.results();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& out, const Tensor& lse,
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& attn_mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& dropout_rng, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    double dropout_p, bool is_causal, bool bottom_right, double scale, int64_t window_left,
    int64_t window_right, double softcap, bool deterministic, bool mask_gradient,
    bool sinks_gradient) {
  AttentionInputs in{query,        key,          value,        attn_mask,    alibi_slopes,
                     sinks,        dropout_rng,  cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                     max_seqlen_k, dropout_p,    is_causal,    bottom_right, scale,
                     window_left,  window_right, softcap,      deterministic};
  return backward({std::move(in), grad_out, grad_lse, out, lse, mask_gradient, sinks_gradient});
}

}  // namespace
}  // namespace fl

STABLE_TORCH_LIBRARY_IMPL(fastlayers, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fl::attention_forward_cpu));
  m.impl("attention_backward", TORCH_BOX(&fl::attention_backward_cpu));
  m.impl("attention_decode", TORCH_BOX(&fl::attention_decode_cpu));
}
