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
    const int size = p.mask.kind == MaskKind::kBool ? 1 : has_halves() ? 2 : 4;
    const auto first = reinterpret_cast<uintptr_t>(p.mask.data) + mask_ * size;
    has_words_ = p.mask.stride_k == 1 && (first | p.mask.stride_q * size) % 8 == 0;
  }

  // What ALiBi takes away.
  __device__ __forceinline__ float alibi(int i, int j) const {
    return slope_ * fabsf(static_cast<float>(i + diagonal_ - j));
  }

  // Which of the keys j to j + 7 a bool mask shows to query i: a bit each, 0 outside of the mask.
  __device__ __forceinline__ uint32_t shown(int i, int j, const Sequence& sequence) const {
    const uint8_t* from = mask_place<uint8_t>(i, j);
    const int count = i < sequence.seqlen_q ? min(8, sequence.seqlen_k - j) : 0;
    uint32_t bits = 0;
#pragma unroll 1
    for (int e = 0; e < count; ++e) {
      bits |= static_cast<uint32_t>(from[e * p_.mask.stride_k] != 0) << e;
    }
    return bits;
  }
  // The same where the mask has words.
  __device__ __forceinline__ uint32_t shown(int i, int j) const {
    const uint2 bytes = *reinterpret_cast<const uint2*>(mask_place<uint8_t>(i, j));
    return bits_of_bytes(bytes.x) | bits_of_bytes(bytes.y) << 4;
  }

  // What an additive mask adds; outside of it, what it adds at its edge.
  __device__ __forceinline__ float added(int i, int j, const Sequence& sequence) const {
    i = min(i, sequence.seqlen_q - 1);
    j = min(j, sequence.seqlen_k - 1);
    return has_halves() ? of_half(*mask_place<uint16_t>(i, j)) : *mask_place<float>(i, j);
  }

  // An additive mask of 16-bit numbers.
  __device__ __forceinline__ bool has_halves() const { return p_.mask.dtype != DType::kFloat32; }

  // Whether the queries from i and the keys from j on are inside of a mask whose rows can be read
  // in words of 8 bytes.
  __device__ __forceinline__ bool has_words(const Sequence& sequence, int i, int queries, int j,
                                            int keys) const {
    return has_words_ && i + queries <= sequence.seqlen_q && j + keys <= sequence.seqlen_k;
  }

  // The number in the lower half of a word of 16-bit ones.
  __device__ __forceinline__ float of_half(uint32_t bits) const {
    const float brain = __uint_as_float(bits << 16);
    const float half = __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
    return p_.mask.dtype == DType::kBFloat16 ? brain : half;
  }
  __device__ __forceinline__ float2 of_halves(uint32_t word) const {
    return {of_half(word), of_half(word >> 16)};
  }

  template <class T>
  __device__ __forceinline__ const T* mask_place(int i, int j) const {
    const int64_t at = mask_ + i * p_.mask.stride_q + j * p_.mask.stride_k;
    return static_cast<const T*>(p_.mask.data) + at;
  }

 private:
  // Which of four bytes are not 0.
  static __device__ __forceinline__ uint32_t bits_of_bytes(uint32_t bytes) {
    const uint32_t tops = ((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu | bytes) & 0x80808080u;
    return tops * 0x00204081u >> 28;
  }

  const AttentionForward& p_;
  int64_t mask_;
  float slope_;
  int diagonal_;
  bool has_words_;  // 8 bytes of a row that begin at a multiple of 8
};

}  // namespace fl
