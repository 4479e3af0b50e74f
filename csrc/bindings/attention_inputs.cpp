// The checks here are what memory safety needs; fastlayers/ops/attention.py explains a wrong call
// better.
#include "bindings/attention_inputs.h"

#include <stdexcept>

namespace fl {

Tensor dense(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const bool is_dense = last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1;
  return is_dense ? tensor : torch::stable::contiguous(tensor);
}

bool has_sizes(const Tensor& tensor, std::initializer_list<int64_t> sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t dim = 0;
  for (int64_t size : sizes) {
    if (tensor.size(dim++) != size) return false;
  }
  return true;
}

namespace {

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// A dense vector or matrix of one dtype on the query's device.
void prepare(const Tensor& query, OptionalTensor& tensor, ScalarType dtype, const char* name) {
  if (!tensor) return;
  FL_CHECK(same_device(*tensor, query), "attention: ", name, " has to be on the query's device");
  FL_CHECK(tensor->scalar_type() == dtype, "attention: ", name, " has the wrong dtype");
  tensor = torch::stable::contiguous(*tensor);
}

void check_heads(const AttentionInputs& in) {
  const int64_t dims = in.packed() ? 3 : 4;
  for (const Tensor* tensor : {&in.query, &in.key, &in.value}) {
    FL_CHECK(same_device(*tensor, in.query),
             "attention: query, key and value have to be on one device");
    FL_CHECK(tensor->dim() == dims, "attention: query, key and value need ", dims, " dimensions");
    FL_CHECK(tensor->scalar_type() == in.query.scalar_type(),
             "attention: query, key and value need one dtype");
  }
  const int64_t head_dim = in.query.size(dims - 1), head_dim_v = in.value.size(dims - 1);
  FL_CHECK(in.key.size(dims - 1) == head_dim, "attention: key has head_dim ", in.key.size(dims - 1),
           ", query has ", head_dim);
  FL_CHECK(head_dim >= 1 && head_dim <= 256 && head_dim_v >= 1 && head_dim_v <= 256,
           "attention: head_dim has to be 1 to 256, got ", head_dim, " and ", head_dim_v);
  const int64_t heads_q = in.query.size(1), heads_k = in.key.size(1);
  FL_CHECK(heads_k > 0 ? heads_q % heads_k == 0 : heads_q == 0, "attention: the query's ", heads_q,
           " heads are not a multiple of the key's ", heads_k);
  FL_CHECK(in.value.size(1) == heads_k, "attention: value has ", in.value.size(1),
           " heads, key has ", heads_k);
  const int64_t rows = in.packed() ? 0 : 2;
  FL_CHECK(in.value.size(rows) == in.key.size(rows), "attention: value has seqlen ",
           in.value.size(rows), ", key has ", in.key.size(rows));
  FL_CHECK(in.packed() || in.value.size(0) == in.key.size(0), "attention: key and value need one ",
           in.paged() ? "number of pages" : "batch size");
  FL_CHECK(in.packed() || in.paged() || in.key.size(0) == in.query.size(0),
           "attention: query and key need one batch size");
}

// What only the values can tell; a ValueError in Python.
[[noreturn]] void fail_value(const char* name, const char* what, int64_t got, int64_t limit) {
  std::ostringstream message;
  message << "attention: " << name << what << " (" << got << ", limit " << limit << ")";
  throw std::invalid_argument(message.str());
}

void check_cu_seqlens(const AttentionInputs& in, const OptionalTensor& cu_seqlens, int64_t total,
                      int64_t max_seqlen, const char* name) {
  FL_CHECK(cu_seqlens && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, "attention: ", name,
           " has to be (B + 1,)");
  if (!in.reads_lengths) return;
  const int32_t* value = data<int32_t>(*cu_seqlens);
  const int64_t batch = cu_seqlens->size(0) - 1;
  if (value[0] != 0) fail_value(name, " has to start with 0", value[0], 0);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t seqlen = static_cast<int64_t>(value[b + 1]) - value[b];
    if (seqlen < 0) fail_value(name, " decreases", value[b + 1], value[b]);
    if (seqlen > max_seqlen) fail_value(name, " has a longer sequence", seqlen, max_seqlen);
  }
  if (value[batch] > total) fail_value(name, " ends behind the last row", value[batch], total);
}

void check_lengths(AttentionInputs& in) {
  prepare(in.query, in.cu_seqlens_q, ScalarType::Int, "cu_seqlens_q");
  prepare(in.query, in.cu_seqlens_k, ScalarType::Int, "cu_seqlens_k");
  FL_CHECK(in.packed() == in.cu_seqlens_k.has_value(),
           "attention: cu_seqlens_q and cu_seqlens_k come together");
  if (in.packed()) {
    FL_CHECK(in.max_seqlen_q >= 0 && in.max_seqlen_k >= 0, "attention: a negative max_seqlen");
    FL_CHECK(!in.attn_mask, "attention: packed sequences take no attn_mask");
    check_cu_seqlens(in, in.cu_seqlens_q, in.query.size(0), in.max_seqlen_q, "cu_seqlens_q");
    check_cu_seqlens(in, in.cu_seqlens_k, in.key.size(0), in.max_seqlen_k, "cu_seqlens_k");
    FL_CHECK(in.cu_seqlens_q->size(0) == in.cu_seqlens_k->size(0),
             "attention: cu_seqlens_q and cu_seqlens_k need one size");
  }
}

void check_cache(AttentionInputs& in) {
  const int64_t batch = in.query.size(0), pages = in.key.size(0), page_size = in.key.size(2);
  prepare(in.query, in.cache_seqlens, ScalarType::Int, "cache_seqlens");
  prepare(in.query, in.page_table, ScalarType::Int, "page_table");
  FL_CHECK(has_sizes(*in.cache_seqlens, {batch}), "attention: cache_seqlens has to be (B,)");
  if (in.paged()) {
    FL_CHECK(in.page_table->dim() == 2 && in.page_table->size(0) == batch,
             "attention: page_table has to be (B, pages of a sequence)");
    FL_CHECK(page_size >= 1, "attention: pages need a row at least");
  }
  if (!in.reads_lengths) return;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t seqlen = data<int32_t>(*in.cache_seqlens)[b];
    if (seqlen < 0) fail_value("cache_seqlens", " is negative", seqlen, 0);
    if (seqlen > in.capacity()) {
      fail_value("cache_seqlens", " exceeds the cache", seqlen, in.capacity());
    }
    for (int64_t i = 0; in.paged() && i * page_size < seqlen; ++i) {
      const int64_t page = data<int32_t>(*in.page_table)[b * in.page_table->size(1) + i];
      if (page < 0) fail_value("page_table", " has a negative page in use", page, 0);
      if (page >= pages) fail_value("page_table", " exceeds the pages", page, pages - 1);
    }
  }
}

// No window is wider than all positions together: beyond that it is unlimited.
int64_t clip_window(int64_t window, const AttentionForward& p) {
  return window < 0 || window > p.seqlen_q + p.seqlen_k ? -1 : window;
}

}  // namespace

void prepare(AttentionInputs& in) {
  check_heads(in);
  in.query = dense(in.query);
  in.key = dense(in.key);
  in.value = dense(in.value);
  check_lengths(in);
  if (in.cache_seqlens) check_cache(in);
  prepare(in.query, in.alibi_slopes, ScalarType::Float, "alibi_slopes");
  prepare(in.query, in.sinks, ScalarType::Float, "sinks");
  prepare(in.query, in.dropout_rng, ScalarType::Long, "dropout_rng");
  const int64_t batch = in.packed() ? in.cu_seqlens_q->size(0) - 1 : in.query.size(0);
  const int64_t heads = in.query.size(1);
  FL_CHECK(!in.alibi_slopes || has_sizes(*in.alibi_slopes, {heads}) ||
               has_sizes(*in.alibi_slopes, {batch, heads}),
           "attention: alibi_slopes has to be (Hq,) or (B, Hq)");
  FL_CHECK(!in.sinks || has_sizes(*in.sinks, {heads}), "attention: sinks has to be (Hq,)");
  FL_CHECK(!in.dropout_rng || has_sizes(*in.dropout_rng, {2}),
           "attention: dropout_rng has to be (2,)");
  FL_CHECK(in.dropout_p >= 0 && in.dropout_p <= 1, "attention: dropout_p = ", in.dropout_p);
  FL_CHECK(in.dropout_p == 0 || in.dropout_rng, "attention: dropout needs dropout_rng");
  if (!in.attn_mask) return;
  const int64_t full[] = {batch, heads, in.query.size(2), in.key.size(2)};
  FL_CHECK(same_device(*in.attn_mask, in.query) && in.attn_mask->dim() == 4,
           "attention: attn_mask needs four dimensions, on the query's device");
  for (int64_t dim = 0; dim < 4; ++dim) {
    FL_CHECK(in.attn_mask->size(dim) == 1 || in.attn_mask->size(dim) == full[dim],
             "attention: attn_mask has ", in.attn_mask->size(dim), " in dimension ", dim,
             ", the scores have ", full[dim]);
  }
}

TensorView4 view(const Tensor& tensor, bool packed) {
  void* pointer = data<void>(tensor);
  if (packed) return {pointer, 0, tensor.stride(1), tensor.stride(0)};
  return {pointer, tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

MaskView view_mask(const OptionalTensor& mask) {
  MaskView view;
  if (!mask) return view;
  const bool is_bool = mask->scalar_type() == ScalarType::Bool;
  view.kind = is_bool ? MaskKind::kBool : MaskKind::kAdditive;
  if (!is_bool) view.dtype = dtype_of(*mask, "attention: attn_mask");
  view.data = data<void>(*mask);
  const auto stride = [&](int64_t dim) { return mask->size(dim) == 1 ? 0 : mask->stride(dim); };
  view.stride_b = stride(0);
  view.stride_h = stride(1);
  view.stride_q = stride(2);
  view.stride_k = stride(3);
  return view;
}

Tensor allocate_like(const Tensor& like, int64_t last) {
  if (like.dim() == 3) {
    return torch::stable::new_empty(like, {like.size(0), like.size(1), last});
  }
  const int64_t batch = like.size(0), heads = like.size(1), seqlen = like.size(2);
  if (like.stride(1) >= like.stride(2)) {
    return torch::stable::new_empty(like, {batch, heads, seqlen, last});
  }
  return torch::stable::transpose(torch::stable::new_empty(like, {batch, seqlen, heads, last}), 1,
                                  2);
}

Tensor allocate_lse(const AttentionInputs& in) {
  const Tensor& query = in.query;
  if (in.packed()) {
    return torch::stable::new_empty(query, {query.size(1), query.size(0)}, ScalarType::Float);
  }
  return torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)},
                                  ScalarType::Float);
}

AttentionForward parameters(const AttentionInputs& in, const Tensor& out, const Tensor& lse) {
  AttentionForward p{};
  const bool packed = in.packed();
  p.dtype = dtype_of(in.query, "attention: query");
  p.q = view(in.query, packed);
  p.k = view(in.key, packed);
  p.v = view(in.value, packed);
  p.o = view(out, packed);
  p.lse = data<float>(lse);
  p.batch = packed ? in.cu_seqlens_q->size(0) - 1 : in.query.size(0);
  p.heads_q = in.query.size(1);
  p.heads_k = in.key.size(1);
  p.seqlen_q = packed ? in.max_seqlen_q : in.query.size(2);
  p.seqlen_k = packed ? in.max_seqlen_k : in.capacity();
  p.head_dim = in.query.size(in.query.dim() - 1);
  p.head_dim_v = in.value.size(in.value.dim() - 1);
  p.lse_stride_h = packed ? in.query.size(0) : p.seqlen_q;
  p.lse_stride_b = packed ? 0 : p.heads_q * p.seqlen_q;
  p.cu_seqlens_q = data<int32_t>(in.cu_seqlens_q);
  p.cu_seqlens_k = data<int32_t>(in.cu_seqlens_k);
  p.cache_seqlens = data<int32_t>(in.cache_seqlens);
  p.page_table = data<int32_t>(in.page_table);
  if (in.paged()) {
    p.page_table_stride = in.page_table->size(1);
    p.page_size = in.key.size(2);
  }
  p.softmax_scale = static_cast<float>(in.scale);
  p.softcap = static_cast<float>(in.softcap);
  p.is_causal = in.is_causal;
  p.bottom_right = in.bottom_right;
  p.window_left = clip_window(in.window_left, p);
  p.window_right = clip_window(in.window_right, p);
  p.mask = view_mask(in.attn_mask);
  p.alibi_slopes = data<float>(in.alibi_slopes);
  p.alibi_stride_b = in.alibi_slopes && in.alibi_slopes->dim() == 2 ? p.heads_q : 0;
  p.sinks = data<float>(in.sinks);
  p.dropout.threshold = in.dropout_rng ? dropout_threshold(in.dropout_p) : 0;
  p.dropout_rng = data<int64_t>(in.dropout_rng);
  p.deterministic = in.deterministic;
  return p;
}

}  // namespace fl
