// Which scores a row sees and what is done to them, as csrc/attention/params.h states it, for the
// CUDA kernels. Positions are 32-bit; sequences are shorter than 2^30.
#pragma once

#include "attention/params.h"
#include "common/tensor_core.cuh"

namespace fl {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kFar = 1 << 30;

// One sequence of the batch: its rows in q and k, and which keys row i sees: [begin(i), end(i)).
struct Sequence {
  int64_t first_q, first_k;  // rows before it, where sequences are packed
  int seqlen_q, seqlen_k, diagonal, begin_offset, end_offset;

  __device__ __forceinline__ Sequence(const AttentionForward& p, int b) {
    first_q = p.cu_seqlens_q ? p.cu_seqlens_q[b] : 0;
    first_k = p.cu_seqlens_k ? p.cu_seqlens_k[b] : 0;
    seqlen_q = static_cast<int>(p.cu_seqlens_q ? p.cu_seqlens_q[b + 1] - first_q : p.seqlen_q);
    seqlen_k = static_cast<int>(p.cu_seqlens_k    ? p.cu_seqlens_k[b + 1] - first_k
                                : p.cache_seqlens ? min(int64_t{p.cache_seqlens[b]}, p.seqlen_k)
                                                  : p.seqlen_k);
    diagonal = p.bottom_right ? seqlen_k - seqlen_q : 0;
    const int right = static_cast<int>(p.window_right), left = static_cast<int>(p.window_left);
    end_offset = p.is_causal ? diagonal + 1 : kFar;
    if (right >= 0) end_offset = min(end_offset, diagonal + right + 1);
    begin_offset = left >= 0 ? diagonal - left : -kFar;
  }

  __device__ __forceinline__ int begin(int i) const { return max(i + begin_offset, 0); }
  __device__ __forceinline__ int end(int i) const { return min(i + end_offset, seqlen_k); }
};

// The keys that some and that all of the rows [i0, i1) see.
struct VisibleKeys {
  int some_begin, some_end, all_begin, all_end;

  __device__ __forceinline__ VisibleKeys(const Sequence& sequence, int i0, int i1)
      : some_begin(sequence.begin(i0)),
        some_end(sequence.end(i1 - 1)),
        all_begin(sequence.begin(i1 - 1)),
        all_end(sequence.end(i0)) {}
  __device__ __forceinline__ bool none(int j0, int j1) const {
    return j0 >= some_end || j1 <= some_begin;
  }
  __device__ __forceinline__ bool all(int j0, int j1) const {
    return j0 >= all_begin && j1 <= all_end;
  }
};

// softcap tanh(x / softcap), and its slope there.
__device__ __forceinline__ float softcapped(float x, float softcap, float& slope) {
  const float t = tanhf(__fdividef(x, softcap));
  slope = fmaf(-t, t, 1.0f);
  return softcap * t;
}

// Softcap and ALiBi: a score in natural units from q . k, and the softcap's slope there; distance
// is i + diagonal - j.
__device__ __forceinline__ float shaped_score(const AttentionForward& p, float dot,
                                              float alibi_slope, int distance, float& slope) {
  float x = dot * p.softmax_scale;
  slope = 1.0f;
  if (p.softcap > 0.0f) x = softcapped(x, p.softcap, slope);
  if (p.alibi_slopes) x -= alibi_slope * fabsf(static_cast<float>(distance));
  return x;
}

// These and the masks of one query head.
class ScoreRules {
 public:
  __device__ __forceinline__ ScoreRules(const AttentionForward& p, int b, int h, int diagonal)
      : p_(p), diagonal_(diagonal) {
    slope_ = p.alibi_slopes ? p.alibi_slopes[b * p.alibi_stride_b + h] : 0.0f;
    mask_ = b * p.mask.stride_b + h * p.mask.stride_h;
  }

  __device__ __forceinline__ float operator()(float dot, int i, int j) const {
    float slope;
    float x = shaped_score(p_, dot, slope_, i + diagonal_ - j, slope);
    if (p_.mask.kind != MaskKind::kNone) x += mask_at(i, j);
    return x;
  }

  // What ALiBi takes away.
  __device__ __forceinline__ float alibi(int i, int j) const {
    return slope_ * fabsf(static_cast<float>(i + diagonal_ - j));
  }

  // What the mask adds: 0 or -inf where it is bool.
  __device__ __forceinline__ float mask_at(int i, int j) const {
    const int64_t at = mask_ + i * p_.mask.stride_q + j * p_.mask.stride_k;
    if (p_.mask.kind == MaskKind::kBool) {
      return static_cast<const uint8_t*>(p_.mask.data)[at] ? 0.0f : -INFINITY;
    }
    if (p_.mask.dtype == DType::kFloat32) return static_cast<const float*>(p_.mask.data)[at];
    if (p_.mask.dtype == DType::kFloat16) {
      return __half2float(static_cast<const __half*>(p_.mask.data)[at]);
    }
    return __bfloat162float(static_cast<const __nv_bfloat16*>(p_.mask.data)[at]);
  }

 private:
  const AttentionForward& p_;
  int64_t mask_;
  float slope_;
  int diagonal_;
};

}  // namespace fl
