// attention_forward, attention_backward and attention_decode on the CPU.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "attention/kernels.h"
#include "bindings/attention_inputs.h"

namespace fl {
namespace {

// Rows behind the last packed sequence, which no kernel visits.
bool has_rest(const OptionalTensor& cu_seqlens, const Tensor& tensor) {
  return cu_seqlens && data<int32_t>(*cu_seqlens)[cu_seqlens->size(0) - 1] < tensor.size(0);
}

// The parameters, with the random state that lies in host memory.
AttentionForward on_cpu(const AttentionInputs& in, const Tensor& out, const Tensor& lse) {
  AttentionForward p = parameters(in, out, lse);
  if (p.dropout_rng) {
    p.dropout.seed = static_cast<uint64_t>(p.dropout_rng[0]);
    p.dropout.offset = static_cast<uint32_t>(p.dropout_rng[1]);
  }
  return p;
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
  const AttentionForward p = on_cpu(in, out, lse);
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

// grad_out, out and lse as they belong to these inputs.
void check_results(const AttentionInputs& in, const Tensor& grad_out,
                   const OptionalTensor& grad_lse, const Tensor& out, const Tensor& lse) {
  const Tensor& query = in.query;
  const int64_t head_dim_v = in.value.size(in.value.dim() - 1);
  for (const Tensor* tensor : {&grad_out, &out}) {
    const bool fits =
        in.packed() ? has_sizes(*tensor, {query.size(0), query.size(1), head_dim_v})
                    : has_sizes(*tensor, {query.size(0), query.size(1), query.size(2), head_dim_v});
    FL_CHECK(fits && tensor->is_cpu() && tensor->scalar_type() == query.scalar_type(),
             "attention: out and its gradient have to match the query");
  }
  for (const Tensor* tensor : {&lse, grad_lse ? &*grad_lse : &lse}) {
    const bool fits = in.packed()
                          ? has_sizes(*tensor, {query.size(1), query.size(0)})
                          : has_sizes(*tensor, {query.size(0), query.size(1), query.size(2)});
    FL_CHECK(fits && tensor->is_cpu() && tensor->scalar_type() == ScalarType::Float,
             "attention: lse and its gradient have to match the query");
  }
}

Tensor zeros_or_none(const Tensor& like, const OptionalTensor& wanted) {
  if (!wanted) return torch::stable::new_empty(like, {0}, ScalarType::Float);
  return torch::stable::new_zeros(like, wanted->sizes(), ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(AttentionInputs in, Tensor grad_out,
                                                            OptionalTensor grad_lse, Tensor out,
                                                            Tensor lse, bool mask_gradient,
                                                            bool sinks_gradient) {
  const Tensor query = in.query, key = in.key, value = in.value;
  prepare(in);
  check_results(in, grad_out, grad_lse, out, lse);
  grad_out = dense(grad_out);
  out = dense(out);
  lse = torch::stable::contiguous(lse);
  if (grad_lse) grad_lse = torch::stable::contiguous(*grad_lse);

  Tensor dquery = allocate_like(query, query.size(query.dim() - 1));
  Tensor dkey = allocate_like(key, key.size(key.dim() - 1));
  Tensor dvalue = allocate_like(value, value.size(value.dim() - 1));
  if (has_rest(in.cu_seqlens_q, query)) torch::stable::zero_(dquery);
  if (has_rest(in.cu_seqlens_k, key)) {
    torch::stable::zero_(dkey);
    torch::stable::zero_(dvalue);
  }
  FL_CHECK(!mask_gradient || (in.attn_mask && in.attn_mask->scalar_type() != ScalarType::Bool),
           "attention: only an additive attn_mask has a gradient");
  FL_CHECK(!sinks_gradient || in.sinks, "attention: no sinks to give a gradient");
  const Tensor dmask = zeros_or_none(query, mask_gradient ? in.attn_mask : std::nullopt);
  const Tensor dsinks = zeros_or_none(query, sinks_gradient ? in.sinks : std::nullopt);

  AttentionBackward p{};
  p.forward = on_cpu(in, out, lse);
  p.dout = view(grad_out, in.packed());
  p.dlse = data<float>(grad_lse);
  p.dq = view(dquery, in.packed());
  p.dk = view(dkey, in.packed());
  p.dv = view(dvalue, in.packed());
  if (mask_gradient) {
    const MaskView strides = view_mask(dmask);
    p.dmask = data<float>(dmask);
    p.dmask_stride_b = strides.stride_b;
    p.dmask_stride_h = strides.stride_h;
    p.dmask_stride_q = strides.stride_q;
    p.dmask_stride_k = strides.stride_k;
  }
  if (sinks_gradient) p.dsinks = data<float>(dsinks);
  if (out.numel() > 0) {
    FL_CALL_CPU_KERNEL(attention_backward, p);
  } else {
    torch::stable::zero_(dkey);
    torch::stable::zero_(dvalue);
  }
  return {dquery, dkey, dvalue, dmask, dsinks};
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
  return backward(std::move(in), grad_out, grad_lse, out, lse, mask_gradient, sinks_gradient);
}

}  // namespace
}  // namespace fl

STABLE_TORCH_LIBRARY_IMPL(fastlayers, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fl::attention_forward_cpu));
  m.impl("attention_backward", TORCH_BOX(&fl::attention_backward_cpu));
  m.impl("attention_decode", TORCH_BOX(&fl::attention_decode_cpu));
}
