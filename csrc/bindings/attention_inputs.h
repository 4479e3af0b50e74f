// What the attention operators of every device share: their arguments, checked and laid out as the
// kernels read them.
#pragma once

#include <optional>

#include "attention/params.h"
#include "bindings/tensor.h"

namespace fl {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

struct AttentionInputs {
  Tensor query, key, value;  // (B, H, S, D); with cu_seqlens (T, H, D)
  OptionalTensor attn_mask = {}, alibi_slopes = {}, sinks = {}, dropout_rng = {};
  OptionalTensor cu_seqlens_q = {}, cu_seqlens_k = {};
  int64_t max_seqlen_q = 0, max_seqlen_k = 0;
  double dropout_p = 0;
  bool is_causal = false, bottom_right = false;
  double scale = 1;
  int64_t window_left = -1, window_right = -1;
  double softcap = 0;
  bool deterministic = false;
  // Decoding: keys in use of each sequence, (B,); with page_table, (B, pages of a sequence), key
  // and value are (pages, Hk, page_size, D).
  OptionalTensor cache_seqlens = {}, page_table = {};
  bool reads_lengths = true;  // the values of lengths and of page_table: where that is free

  bool packed() const { return cu_seqlens_q.has_value(); }
  bool paged() const { return page_table.has_value(); }
  // Keys that a sequence of (B, Hk, S, D) or paged keys has room for.
  int64_t capacity() const { return paged() ? page_table->size(1) * key.size(2) : key.size(2); }
};

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
}

template <class T>
T* data(const OptionalTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

// Throws for what no kernel could read safely, and copies what is not laid out as kernels read it.
// On a CPU the values of the sequence lengths and of the page table are checked, too.
void prepare(AttentionInputs& in);

bool has_sizes(const Tensor& tensor, std::initializer_list<int64_t> sizes);
Tensor dense(const Tensor& tensor);  // its last dimension, by a copy where it is not
TensorView4 view(const Tensor& tensor, bool packed);
MaskView view_mask(const OptionalTensor& mask);

// Uninitialised, of like's shape but for the last dimension: heads inside the sequence (the free
// reshape to (B, S, H * D)) where `like` has them so, else contiguous.
Tensor allocate_like(const Tensor& like, int64_t last);
Tensor allocate_lse(const AttentionInputs& in);

AttentionForward parameters(const AttentionInputs& in, const Tensor& out, const Tensor& lse);

}  // namespace fl
