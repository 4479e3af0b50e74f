// From dot products to scores, on CPU: which keys a query sees, softcap, ALiBi, masks, dropout.
// Only for cpu_*.cpp.
#pragma once

#include "attention/cpu_tile.h"
#include "attention/params.h"
#include "common/philox_simd.h"

namespace fl::FL_ISA {

constexpr float kInfinity = __builtin_inff();
constexpr int kBlockN = 128;  // keys per block; a multiple of kPanel and of the 64 of Philox

// The rows of sequence b, and where its diagonal lies.
struct Sequence {
  int64_t q_row = 0, k_row = 0;  // first rows, in packed tensors
  int64_t seqlen_q, seqlen_k, diagonal;

  Sequence(const AttentionForward& p, int64_t b) : seqlen_q(p.seqlen_q), seqlen_k(p.seqlen_k) {
    if (p.cu_seqlens_q) {
      q_row = p.cu_seqlens_q[b];
      k_row = p.cu_seqlens_k[b];
      seqlen_q = p.cu_seqlens_q[b + 1] - q_row;
      seqlen_k = p.cu_seqlens_k[b + 1] - k_row;
    }
    if (p.cache_seqlens) seqlen_k = least(p.cache_seqlens[b], p.seqlen_k);
    diagonal = p.bottom_right ? seqlen_k - seqlen_q : 0;
  }
};

// A query and the keys [begin, end) that causality, window and sequence length leave it.
struct QueryRow {
  int64_t head, query;
  int64_t begin, end;
};

FL_INLINE QueryRow query_row(const AttentionForward& p, const Sequence& seq, int64_t head,
                             int64_t query) {
  int64_t begin = 0, end = seq.seqlen_k;
  const int64_t centre = query + seq.diagonal;
  if (p.is_causal) end = least(end, centre + 1);
  if (p.window_right >= 0 && p.window_right < end - centre) end = centre + p.window_right + 1;
  if (p.window_left >= 0 && p.window_left < centre) begin = centre - p.window_left;
  return {head, query, begin, most(begin, end)};
}

// A row that pads a tile: it sees no key.
constexpr QueryRow kNoRow{0, 0, 0, 0};

// The columns [begin, end) of the key block at j0 that rows of a tile need, in whole panels, and
// whether some of them are hidden from some row.
struct Columns {
  int begin = 0, end = 0;
  bool partly_hidden = false;
};

FL_INLINE Columns needed_columns(const QueryRow* rows, int count, int64_t j0) {
  int64_t begin = kBlockN, end = 0;
  for (int r = 0; r < count; ++r) {
    if (rows[r].begin >= rows[r].end) continue;
    begin = least(begin, rows[r].begin - j0);
    end = most(end, rows[r].end - j0);
  }
  Columns columns;
  columns.begin = static_cast<int>(round_down(most(begin, 0), kPanel));
  columns.end = static_cast<int>(round_up(most(0, least(end, kBlockN)), kPanel));
  for (int r = 0; r < count; ++r) {
    columns.partly_hidden |= rows[r].begin > j0 + columns.begin || rows[r].end < j0 + columns.end;
  }
  return columns;
}

FL_INLINE Mask lanes_between(int64_t begin, int64_t end) {
  const Mask below_end = first_lanes(static_cast<int>(most(0, least(end, kLanes))));
  return below_end & ~first_lanes(static_cast<int>(most(0, least(begin, kLanes))));
}

// Everything between q . k and the exponent of 2 that is not in the plain case.
class ScoreRules {
 public:
  ScoreRules(const AttentionForward& p, int64_t b, const Sequence& seq)
      : p_(p),
        b_(b),
        seq_(seq),
        plain_(p.softcap == 0.0f && p.alibi_slopes == nullptr && p.mask.kind == MaskKind::kNone &&
               p.softmax_scale > 0.0f) {}

  // What values are multiplied by, after apply(), to be scores.
  FL_INLINE float score_scale() const { return plain_ ? p_.softmax_scale : 1.0f; }

  // Before apply() on rows of one head (or of several, where head is -1) in the key block at j0.
  void begin_block(int64_t head, int64_t j0);

  // s[r][c]: dot products in, scores out (-inf where hidden). softcap_slope, where not null,
  // receives d(capped score) / d(score).
  void apply(const QueryRow* rows, int count, int64_t j0, const Columns& columns, float* s,
             float* softcap_slope);

 private:
  void adjust_row(const QueryRow& row, int64_t j0, const Columns& columns, float* s,
                  float* softcap_slope);
  template <class Load>
  void read_mask(int64_t offset, int64_t j0, float* out, Load load_lanes);
  void load_mask_row(int64_t head, int64_t query, int64_t j0, float* out);

  const AttentionForward& p_;
  const int64_t b_;
  const Sequence& seq_;
  const bool plain_;
  bool mask_is_shared_ = false;
  alignas(64) float shared_mask_[kBlockN];
  alignas(64) float row_mask_[kBlockN];
};

inline void ScoreRules::begin_block(int64_t head, int64_t j0) {
  const MaskView& mask = p_.mask;
  mask_is_shared_ =
      mask.kind != MaskKind::kNone && mask.stride_q == 0 && (mask.stride_h == 0 || head >= 0);
  if (mask_is_shared_) load_mask_row(most(head, 0), 0, j0, shared_mask_);
}

// load_lanes(offset, count): the first `count` lanes of the mask at `offset`, as what is added.
template <class Load>
void ScoreRules::read_mask(int64_t offset, int64_t j0, float* out, Load load_lanes) {
  const int64_t left = least(seq_.seqlen_k - j0, kBlockN);
  for (int64_t c = 0; c < kBlockN; c += kLanes) {
    const int count = static_cast<int>(most(0, least(left - c, kLanes)));
    store(out + c, load_lanes(offset + (j0 + c) * p_.mask.stride_k, count));
  }
}

// The mask of one query over a key block as float32: a bool mask as 0 and -inf, 0 past the end.
inline void ScoreRules::load_mask_row(int64_t head, int64_t query, int64_t j0, float* out) {
  const MaskView& mask = p_.mask;
  const int64_t offset = b_ * mask.stride_b + head * mask.stride_h + query * mask.stride_q;
  if (mask.kind == MaskKind::kBool) {
    const auto* data = static_cast<const uint8_t*>(mask.data);
    read_mask(offset, j0, out, [&](int64_t at, int count) {
      alignas(64) float lanes[kLanes] = {};
      for (int t = 0; t < count; ++t) lanes[t] = data[at + t * mask.stride_k] ? 0.0f : -kInfinity;
      return load(lanes);
    });
    return;
  }
  const auto read_as = [&](auto* data) {
    read_mask(offset, j0, out, [&](int64_t at, int count) {
      const Mask wanted = first_lanes(count);
      if (mask.stride_k == 1) return load(data + at, wanted);
      alignas(64) __typeof__(*data) lanes[kLanes];
      for (int t = 0; t < count; ++t) lanes[t] = data[at + t * mask.stride_k];
      return load(lanes, wanted);
    });
  };
  if (mask.dtype == DType::kFloat32) read_as(static_cast<float*>(const_cast<void*>(mask.data)));
  if (mask.dtype == DType::kFloat16) read_as(static_cast<Half*>(const_cast<void*>(mask.data)));
  if (mask.dtype == DType::kBFloat16) read_as(static_cast<BFloat16*>(const_cast<void*>(mask.data)));
}

inline void ScoreRules::adjust_row(const QueryRow& row, int64_t j0, const Columns& columns,
                                   float* s, float* softcap_slope) {
  const float* mask = nullptr;
  if (p_.mask.kind != MaskKind::kNone) {
    if (!mask_is_shared_) load_mask_row(row.head, row.query, j0, row_mask_);
    mask = mask_is_shared_ ? shared_mask_ : row_mask_;
  }
  const bool hides = p_.mask.kind == MaskKind::kBool;
  const bool has_alibi = p_.alibi_slopes != nullptr;
  const Vec alibi = has_alibi ? p_.alibi_slopes[b_ * p_.alibi_stride_b + row.head] : 0.0f;
  alignas(64) float iota[kLanes];
  for (int t = 0; t < kLanes; ++t) iota[t] = static_cast<float>(t);
  const Vec lanes = load(iota);
  const bool capped = p_.softcap > 0.0f;
  const Vec cap = p_.softcap;
  for (int c = columns.begin; c < columns.end; c += kLanes) {
    Vec t = load(s + c) * Vec(p_.softmax_scale);
    if (capped) {
      const Vec bounded = tanh(t / cap);
      t = cap * bounded;
      if (softcap_slope) store(softcap_slope + c, fnma(bounded, bounded, Vec(1.0f)));
    }
    if (has_alibi) {
      const float first = static_cast<float>(row.query + seq_.diagonal - j0 - c);
      t = fnma(alibi, abs(Vec(first) - lanes), t);
    }
    if (mask) {
      const Vec bias = load(mask + c);
      t = hides ? select(bias < Vec(0.0f), bias, t) : t + bias;
    }
    store(s + c, t);
  }
}

inline void ScoreRules::apply(const QueryRow* rows, int count, int64_t j0, const Columns& columns,
                              float* s, float* softcap_slope) {
  if (!plain_) {
    for (int r = 0; r < count; ++r) {
      float* slope = softcap_slope ? softcap_slope + r * kBlockN : nullptr;
      adjust_row(rows[r], j0, columns, s + r * kBlockN, slope);
    }
  }
  if (!columns.partly_hidden) return;
  for (int r = 0; r < count; ++r) {
    const int64_t begin = rows[r].begin - j0, end = rows[r].end - j0;
    for (int c = columns.begin; c < columns.end; c += kLanes) {
      if (c >= begin && c + kLanes <= end) continue;
      float* at = s + r * kBlockN + c;
      store(at, select(lanes_between(begin - c, end - c), load(at), Vec(-kInfinity)));
    }
  }
}

// Dropout decisions of a row for the key block at j0: bit t of keep[w] is key j0 + 64 w + t.
FL_INLINE void dropout_row(const AttentionForward& p, int64_t b, const QueryRow& row, int64_t j0,
                           const Columns& columns, uint64_t* keep) {
  const auto bh = static_cast<uint32_t>(b * p.heads_q + row.head);
  for (int w = columns.begin / 64; w < (columns.end + 63) / 64; ++w) {
    keep[w] = p.dropout.threshold >= 65536
                  ? 0
                  : dropout_keep_64(p.dropout, bh, static_cast<uint32_t>(row.query),
                                    static_cast<uint32_t>(j0 / 64 + w));
  }
}

FL_INLINE Mask kept_lanes(const uint64_t* keep, int column) {
  const auto bits = static_cast<uint32_t>(keep[column / 64] >> (column % 64));
#if defined(__AVX512F__)
  return static_cast<Mask>(bits);
#else
  const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane_bit);
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane_bit))};
#endif
}

}  // namespace fl::FL_ISA
