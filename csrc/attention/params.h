// What an attention kernel is told: pointers, sizes, strides, options. No Torch.
//
//   s[i,j] = softmax_scale * q[i] . k[j]                        score
//   s[i,j] = softcap * tanh(s[i,j] / softcap)                   where softcap > 0
//   s[i,j] -= alibi_slope[h] * |i + diagonal - j|               where alibi_slopes
//   s[i,j] += mask[i,j]                                         additive mask; a bool mask hides
//   where false hidden where  j > i + diagonal               (is_causal)
//           or    j < i + diagonal - window_left, j > i + diagonal + window_right   (where >= 0)
//   p[i,j] = exp(s[i,j] - lse[i]),  lse[i] = log(sum_j exp(s[i,j]) + exp(sink[h]))
//   o[i]   = sum_j dropout(p[i,j]) v[j]
// A row that sees no key: o = 0, lse = -inf (or the sink), gradients 0.
// diagonal = 0 (top_left) or seqlen_k - seqlen_q (bottom_right), of each sequence by itself.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/philox.h"

namespace fl {

// (batch, heads, seqlen, dim), dim dense; strides in elements. In varlen mode (total, heads, dim):
// the batch stride is 0 and cu_seqlens gives each sequence's first row.
struct TensorView4 {
  void* data = nullptr;
  int64_t stride_b = 0, stride_h = 0, stride_s = 0;
};

enum class MaskKind : int { kNone, kBool, kAdditive };

// Broadcast to (batch, heads_q, seqlen_q, seqlen_k): stride 0 along broadcast dimensions.
struct MaskView {
  MaskKind kind = MaskKind::kNone;
  DType dtype = DType::kFloat32;  // of an additive mask
  const void* data = nullptr;     // bool: one byte each
  int64_t stride_b = 0, stride_h = 0, stride_q = 0, stride_k = 0;
};

struct AttentionForward {
  DType dtype;  // of q, k, v, o
  TensorView4 q, k,
      v;  // (B, Hq, Sq, D) (B, Hk, Sk, D) (B, Hk, Sk, Dv); query head h reads head h / (Hq / Hk)
  TensorView4 o;  // (B, Hq, Sq, Dv)
  float* lse =
      nullptr;  // natural log; element (b, h, i) at b * lse_stride_b + h * lse_stride_h + i
  int64_t lse_stride_b = 0, lse_stride_h = 0;

  int64_t batch, heads_q, heads_k, seqlen_q, seqlen_k, head_dim,
      head_dim_v;                          // varlen: the longest seqlens
  const int32_t* cu_seqlens_q = nullptr;   // varlen: (B + 1,), rows of sequence b are [b], [b + 1])
  const int32_t* cu_seqlens_k = nullptr;   // varlen: (B + 1,)
  const int32_t* cache_seqlens = nullptr;  // decoding: (B,), keys in use of each sequence's cache
  // Paged decoding: k and v are (pages, Hk, page_size, D); key j of sequence b is row j % page_size
  // of page page_table[b, j / page_size]. Entries behind the last page in use are not read.
  const int32_t* page_table = nullptr;  // (B, seqlen_k / page_size)
  int64_t page_table_stride = 0, page_size = 0;

  float softmax_scale = 1.0f;
  float softcap = 0.0f;
  bool is_causal = false;
  bool bottom_right = false;                    // which diagonal
  int64_t window_left = -1, window_right = -1;  // -1: unlimited
  MaskView mask;
  const float* alibi_slopes = nullptr;  // (Hq,) or (B, Hq)
  int64_t alibi_stride_b = 0;
  const float* sinks = nullptr;  // (Hq,)
  Dropout dropout{0, 0, 0};
  const int64_t* dropout_rng = nullptr;  // (2,): seed and offset; CUDA reads them on the device
  bool deterministic = false;
};

struct AttentionBackward {
  AttentionForward forward;     // o and lse as the forward wrote them
  TensorView4 dout;             // (B, Hq, Sq, Dv), any strides, dim dense
  const float* dlse = nullptr;  // gradient of lse, laid out like lse; null: zero
  TensorView4 dq, dk, dv;  // gradients in `dtype`, shaped like q, k, v; every element is written
  // Gradient of an additive mask, float32, of the mask's own (unbroadcast) shape: zero-filled by
  // the caller, strides 0 along broadcast dimensions, where the kernel adds up. Null: not wanted.
  float* dmask = nullptr;
  int64_t dmask_stride_b = 0, dmask_stride_h = 0, dmask_stride_q = 0, dmask_stride_k = 0;
  float* dsinks = nullptr;  // (Hq,), zero-filled by the caller; null: not wanted
};

}  // namespace fl
