#include "bindings/attention_gradients.h"

namespace fl {
namespace {

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// grad_out, out and lse as they belong to these inputs.
void check_results(const AttentionGradients& call) {
  const AttentionInputs& in = call.in;
  const Tensor &query = in.query, &lse = call.lse;
  const int64_t head_dim_v = in.value.size(in.value.dim() - 1);
  for (const Tensor* tensor : {&call.grad_out, &call.out}) {
    const bool fits =
        in.packed() ? has_sizes(*tensor, {query.size(0), query.size(1), head_dim_v})
                    : has_sizes(*tensor, {query.size(0), query.size(1), query.size(2), head_dim_v});
    FL_CHECK(fits && same_device(*tensor, query) && tensor->scalar_type() == query.scalar_type(),
             "attention: out and its gradient have to match the query");
  }
  for (const Tensor* tensor : {&lse, call.grad_lse ? &*call.grad_lse : &lse}) {
    const bool fits = in.packed()
                          ? has_sizes(*tensor, {query.size(1), query.size(0)})
                          : has_sizes(*tensor, {query.size(0), query.size(1), query.size(2)});
    FL_CHECK(fits && same_device(*tensor, query) && tensor->scalar_type() == ScalarType::Float,
             "attention: lse and its gradient have to match the query");
  }
}

Tensor zeros_or_none(const Tensor& like, const OptionalTensor& wanted) {
  if (!wanted) return torch::stable::new_empty(like, {0}, ScalarType::Float);
  return torch::stable::new_zeros(like, wanted->sizes(), ScalarType::Float);
}

}  // namespace

void prepare_gradients(AttentionGradients& call) {
  AttentionInputs& in = call.in;
  const Tensor query = in.query, key = in.key, value = in.value;  // before copies are made
  prepare(in);
  check_results(call);
  call.grad_out = dense(call.grad_out);
  call.out = dense(call.out);
  call.lse = torch::stable::contiguous(call.lse);
  if (call.grad_lse) call.grad_lse = torch::stable::contiguous(*call.grad_lse);
  FL_CHECK(!call.mask_gradient || (in.attn_mask && in.attn_mask->scalar_type() != ScalarType::Bool),
           "attention: only an additive attn_mask has a gradient");
  FL_CHECK(!call.sinks_gradient || in.sinks, "attention: no sinks to give a gradient");
  call.dquery = allocate_like(query, query.size(query.dim() - 1));
  call.dkey = allocate_like(key, key.size(key.dim() - 1));
  call.dvalue = allocate_like(value, value.size(value.dim() - 1));
  call.dmask = zeros_or_none(query, call.mask_gradient ? in.attn_mask : std::nullopt);
  call.dsinks = zeros_or_none(query, call.sinks_gradient ? in.sinks : std::nullopt);
}

AttentionBackward parameters(const AttentionGradients& call) {
  const bool packed = call.in.packed();
  AttentionBackward p{};
  p.forward = parameters(call.in, call.out, call.lse);
  p.dout = view(call.grad_out, packed);
  p.dlse = data<float>(call.grad_lse);
  p.dq = view(call.dquery, packed);
  p.dk = view(call.dkey, packed);
  p.dv = view(call.dvalue, packed);
  if (call.mask_gradient) {
    const MaskView strides = view_mask(call.dmask);
    p.dmask = data<float>(call.dmask);
    p.dmask_stride_b = strides.stride_b;
    p.dmask_stride_h = strides.stride_h;
    p.dmask_stride_q = strides.stride_q;
    p.dmask_stride_k = strides.stride_k;
  }
  if (call.sinks_gradient) p.dsinks = data<float>(call.dsinks);
  return p;
}

}  // namespace fl
