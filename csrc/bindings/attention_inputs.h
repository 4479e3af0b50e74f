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
  OptionalTensor attn_mask, alibi_slopes, sinks, dropout_rng;
  OptionalTensor cu_seqlens_q, cu_seqlens_k, cache_seqlens;
  int64_t max_seqlen_q, max_seqlen_k;
  double dropout_p;
  bool is_causal, bottom_right;
  double scale;
  int64_t window_left, window_right;
  double softcap;
  bool deterministic;
  bool reads_lengths = true;  // the values of cu_seqlens and cache_seqlens: where that is free

  bool packed() const { return cu_seqlens_q.has_value(); }
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
// On a CPU the values of the sequence lengths are checked, too.
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
