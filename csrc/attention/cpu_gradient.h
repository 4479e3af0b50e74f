// What the passes of the attention backward on CPU share: packed queries and keys, and one tile's
// probabilities and score gradients. Only for cpu_*.cpp.
//
//   p = exp(s - lse), dp = dropout(do v'), ds = p (dp - delta), delta = do . o - dlse
#pragma once

#include "attention/cpu_few_rows.h"
#include "attention/cpu_scores.h"

namespace fl::FL_ISA {

constexpr int kGradientTileM = 64;  // queries per tile of the backward

// What attention_row_sums() finds of every query row, (B, Hq, Sq) each.
struct RowSums {
  float *delta = nullptr, *normalizer = nullptr;
};

// The queries [begin, end) of one head, packed.
template <class T>
class QueryChunk {
  using Dot = typename DotFor<T>::type;

 public:
  // columns: whether q and do are needed as the columns of dk and dv too.
  // sums: of every row, or null arrays: delta is then computed here from o.
  QueryChunk(const AttentionBackward& p, int64_t capacity, bool columns, const RowSums& sums,
             Arena& arena)
      : p_(p), qk_{p.forward.head_dim}, v_{p.forward.head_dim_v}, columns_(columns), sums_(sums) {
    const int64_t padded = round_up(capacity, kGradientTileM);
    q = arena.take<float>(padded * qk_.row_units());
    dout = arena.take<float>(padded * v_.row_units());
    q_pairs_ = arena.take<float>(columns ? column_units(qk_, padded) : 0);
    dout_pairs_ = arena.take<float>(columns ? column_units(v_, padded) : 0);
    lse = arena.take<float>(padded);
    delta = arena.take<float>(padded);
    dlse = arena.take<float>(padded);
    p_sink = arena.take<float>(padded);
    normalizer = arena.take<float>(padded);
    dp_scale = arena.take<float>(padded);
    rows = arena.take<QueryRow>(padded);
  }

  void load(int64_t b, const Sequence& seq, int64_t head, int64_t begin, int64_t end);
  bool has_sums() const { return sums_.delta != nullptr; }

  int64_t count = 0;
  float *q, *dout;
  const float *q_columns = nullptr, *dout_columns = nullptr;
  float *lse, *delta, *dlse;
  float* p_sink;      // of the sink
  float* normalizer;  // of exp(s - lse): 1, or what undoes the rounding of lse
  float* dp_scale;    // of dropout; 0 where the row's one probability is 1 whatever its score
  QueryRow* rows;

 private:
  const AttentionBackward& p_;
  const Layout<Dot> qk_, v_;
  const bool columns_;
  const RowSums sums_;
  float *q_pairs_, *dout_pairs_;
};

template <class T>
FL_INLINE float dot_rows(const T* a, const T* b, int64_t dim) {
  const int64_t whole = round_down(dim, kLanes);
  const Mask tail = first_lanes(static_cast<int>(dim - whole));
  Vec sum = 0.0f;
  for (int64_t c = 0; c < whole; c += kLanes) sum = fma(load(a + c), load(b + c), sum);
  if (whole < dim) sum = fma(load(a + whole, tail), load(b + whole, tail), sum);
  return reduce_add(sum);
}

// Whether all keys that a row sees lie in one key block, whose tile then knows the whole row; in
// the key block at j0.
FL_INLINE bool is_whole(const QueryRow& row) {
  return row.begin < row.end && row.begin / kBlockN == (row.end - 1) / kBlockN;
}
FL_INLINE bool is_whole_in(const QueryRow& row, int64_t j0) {
  return row.begin < row.end && row.begin >= j0 && row.end <= j0 + kBlockN;
}

template <class T>
void QueryChunk<T>::load(int64_t b, const Sequence& seq, int64_t head, int64_t begin, int64_t end) {
  const AttentionForward& f = p_.forward;
  count = end - begin;
  const int64_t padded = round_up(count, kGradientTileM), first = seq.q_row + begin;
  pack_rows(qk_, row_at<const T>(f.q, b, head, first), f.q.stride_s, count, padded, q);
  pack_rows(v_, row_at<const T>(p_.dout, b, head, first), p_.dout.stride_s, count, padded, dout);
  if (columns_) {
    q_columns = pack_columns(qk_, q, padded, q_pairs_);
    dout_columns = pack_columns(v_, dout, padded, dout_pairs_);
  }
  const float dropout_scale = f.dropout.enabled() ? f.dropout.scale() : 1.0f;
  const int64_t lse_row = b * f.lse_stride_b + head * f.lse_stride_h + first;
  for (int64_t r = 0; r < padded; ++r) {
    // A row that saw nothing: +inf makes all of its probabilities 0.
    lse[r] = r < count && f.lse[lse_row + r] != -kInfinity ? f.lse[lse_row + r] : kInfinity;
    dlse[r] = r < count && p_.dlse ? p_.dlse[lse_row + r] : 0.0f;
    p_sink[r] = f.sinks ? __builtin_expf(f.sinks[head] - lse[r]) : 0.0f;
    rows[r] = r < count ? query_row(f, seq, head, begin + r) : kNoRow;
    const bool is_constant = rows[r].end - rows[r].begin == 1 && f.sinks == nullptr;
    dp_scale[r] = is_constant ? 0.0f : dropout_scale;
    delta[r] = 0.0f;
    normalizer[r] = 1.0f;
    if (r >= count) continue;
    if (sums_.delta) {
      const int64_t at = (b * f.heads_q + head) * f.seqlen_q + begin + r;
      delta[r] = sums_.delta[at];
      normalizer[r] = sums_.normalizer[at];
      p_sink[r] *= normalizer[r];
    } else if (!is_whole(rows[r])) {
      const T* o = row_at<const T>(f.o, b, head, first + r);
      const T* dout_row = row_at<const T>(p_.dout, b, head, first + r);
      delta[r] = dot_rows(o, dout_row, f.head_dim_v) - dlse[r];
    }
  }
}

// One block of keys and values, packed.
template <class T>
class KeyBlock {
  using Dot = typename DotFor<T>::type;

 public:
  KeyBlock(const AttentionForward& p, Arena& arena) : p_(p), qk_{p.head_dim}, v_{p.head_dim_v} {
    k_rows = arena.take<float>(kBlockN * qk_.row_units());
    v_rows_ = arena.take<float>(kBlockN * v_.row_units());
    k_pairs_ = arena.take<float>(column_units(qk_, kBlockN));
    k_panels = arena.take<float>(kBlockN / kPanel * qk_.panel_stride());
    v_panels = arena.take<float>(kBlockN / kPanel * v_.panel_stride());
  }

  void load(int64_t b, const Sequence& seq, int64_t head_k, int64_t j0) {
    const int64_t keys = least(kBlockN, seq.seqlen_k - j0), padded = round_up(keys, kPanel);
    pack_rows(qk_, row_at<const T>(p_.k, b, head_k, seq.k_row + j0), p_.k.stride_s, keys, padded,
              k_rows);
    pack_rows(v_, row_at<const T>(p_.v, b, head_k, seq.k_row + j0), p_.v.stride_s, keys, padded,
              v_rows_);
    k_columns = pack_columns(qk_, k_rows, padded, k_pairs_);
    pack_transposed(qk_, k_rows, padded, k_panels);
    pack_transposed(v_, v_rows_, padded, v_panels);
  }

  const float* k_columns = nullptr;
  float *k_rows, *k_panels, *v_panels;

 private:
  const AttentionForward& p_;
  const Layout<Dot> qk_, v_;
  float *v_rows_, *k_pairs_;
};

// What turns one row's scores into gradients.
struct RowTerms {
  Vec score_scale, minus_lse, minus_delta, dp_scale;
  uint64_t keep[kBlockN / 64];
  bool drops, is_exponential = false;  // is_exponential: s holds exp(s - lse) already
  Vec normalizer;

  FL_INLINE Vec exponential(Vec s) const {
    return is_exponential ? s : exp(fma(s, score_scale, minus_lse));
  }

  // s and dp to p after dropout (but for its scale), and ds.
  FL_INLINE void differentiate(int column, Vec s, Vec dp, Vec& kept, Vec& ds) const {
    const Vec p = exponential(s) * normalizer;
    Vec difference = fma(dp, dp_scale, minus_delta);
    kept = p;
    if (drops) {
      const Mask lanes = kept_lanes(keep, column);
      difference = select(lanes, difference, minus_delta);
      kept = select(lanes, p, Vec(0.0f));
    }
    ds = p * difference;
  }

  // s to exp(s - lse); adds up sum_j exp(s - lse) and sum_j dropout(exp(s - lse) dp).
  FL_INLINE void exponentiate(const Columns& columns, float* s, const float* dp, float& sum,
                              float& dot) {
    Vec sums = 0.0f, dots = 0.0f;
    for (int c = columns.begin; c < columns.end; c += kLanes) {
      const Vec p = exponential(load(s + c));
      const Vec product = p * load(dp + c) * dp_scale;
      dots += drops ? select(kept_lanes(keep, c), product, Vec(0.0f)) : product;
      sums += p;
      store(s + c, p);
    }
    is_exponential = true;
    sum += reduce_add(sums);
    dot += reduce_add(dots);
  }

  // The row's sums over all keys.
  FL_INLINE void normalize(float sum, float dot, float dlse) {
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    normalizer = inverse;
    minus_delta = dlse - dot * inverse;
  }
};

// p and ds of one tile, each (kGradientTileM, kBlockN).
template <class T>
class GradientTile {
  using Dot = typename DotFor<T>::type;

 public:
  GradientTile(const AttentionForward& p, Arena& arena) : p_(p), qk_{p.head_dim}, v_{p.head_dim_v} {
    constexpr int64_t kSize = kGradientTileM * kBlockN;
    s = arena.take<float>(kSize);
    dp = arena.take<float>(kSize);
    slope_ = p.softcap > 0.0f ? arena.take<float>(kSize) : nullptr;
    if (Dot::kPair == 2) {
      p_pairs_ = arena.take<float>(kSize / 2);
      ds_pairs_ = arena.take<float>(kSize / 2);
      ds_rows_ = arena.take<float>(kSize / 2);
    }
  }

  // The columns that the tile's rows [r0, ...) of the chunk need.
  Columns columns_of(const QueryChunk<T>& queries, int64_t r0, int64_t j0) const {
    return needed_columns(queries.rows + r0, rows_of(queries, r0), j0);
  }
  static int rows_of(const QueryChunk<T>& queries, int64_t r0) {
    return static_cast<int>(least(kGradientTileM, round_up(queries.count - r0, Dot::kPairedRows)));
  }

  // s and dp: dot products of rows [r0, ...) with the columns, s as scores. float32 products of few
  // queries are summed in lanes, as in the forward: no other row averages their rounding out.
  void products(const QueryChunk<T>& queries, int64_t r0, const KeyBlock<T>& keys, int64_t j0,
                const Columns& columns, ScoreRules& rules);
  void products_of_few(const QueryChunk<T>& queries, const KeyBlock<T>& keys,
                       const Columns& columns);

  // s to dropped p, dp to ds (through the softcap, but for softmax_scale and the scale of dropout
  // in p), as operands of the products for dv, dk and dq.
  void differentiate(const QueryChunk<T>& queries, int64_t r0, int64_t b, int64_t j0,
                     const Columns& columns, float score_scale);

  // dp to ds before the softcap, in float32 for every dtype.
  void score_gradient(const QueryChunk<T>& queries, int64_t r0, int64_t b, int64_t j0,
                      const Columns& columns, float score_scale);

  // Adds the tile's part of each row's sum_j exp(s - lse) and sum_j exp(s - lse) dp.
  void add_sums(const QueryChunk<T>& queries, int64_t r0, int64_t b, int64_t j0,
                const Columns& columns, float score_scale, float* sums, float* dots);

  // Operands beginning at column `column`: p' and ds' (depth: queries), ds (depth: keys).
  OperandA p_transposed(int column) const {
    return {(Dot::kPair == 1 ? s : p_pairs_) + column, 1, kBlockN};
  }
  OperandA ds_transposed(int column) const {
    return {(Dot::kPair == 1 ? dp : ds_pairs_) + column, 1, kBlockN};
  }
  OperandA ds_rows(int column) const {
    return {Dot::kPair == 1 ? dp + column : ds_rows_ + column / 2, kBlockN / Dot::kPair, 1};
  }

  float *s, *dp;

 private:
  RowTerms terms(const QueryChunk<T>& queries, int64_t r0, int r, int64_t b, int64_t j0,
                 const Columns& columns, float score_scale) const;
  RowTerms normalized_terms(const QueryChunk<T>& queries, int64_t r0, int r, int64_t b, int64_t j0,
                            const Columns& columns, float score_scale);
  void store_operands(int r, int c, const Vec* kept, const Vec* ds);

  const AttentionForward& p_;
  const Layout<Dot> qk_, v_;
  float *slope_, *p_pairs_ = nullptr, *ds_pairs_ = nullptr, *ds_rows_ = nullptr;
};

template <class T>
void GradientTile<T>::products(const QueryChunk<T>& queries, int64_t r0, const KeyBlock<T>& keys,
                               int64_t j0, const Columns& columns, ScoreRules& rules) {
  const int count = rows_of(queries, r0), vecs = (columns.end - columns.begin) / kLanes;
  OperandB k = qk_.as_transposed(keys.k_panels), v = v_.as_transposed(keys.v_panels);
  k.data += columns.begin / kPanel * k.panel;
  v.data += columns.begin / kPanel * v.panel;
  if (Dot::kPair == 1 && queries.count <= Dot::kFewQueries) {
    products_of_few(queries, keys, columns);
  } else {
    product<Dot, Update::kSet>(count, vecs, qk_.depth_units(),
                               qk_.as_a(queries.q + r0 * qk_.row_units()), k, s + columns.begin,
                               kBlockN);
  }
  rules.apply(queries.rows + r0, count, j0, columns, s, slope_);
  product<Dot, Update::kSet>(count, vecs, v_.depth_units(),
                             v_.as_a(queries.dout + r0 * v_.row_units()), v, dp + columns.begin,
                             kBlockN);
}

template <class T>
void GradientTile<T>::products_of_few(const QueryChunk<T>& queries, const KeyBlock<T>& keys,
                                      const Columns& columns) {
  for (int c = columns.begin; c < columns.end; ++c) {
    const float* key = keys.k_rows + c * qk_.row_units();
    for (int r = 0; r < queries.count; ++r) {
      dot_keys(queries.q + r * qk_.row_units(), qk_.dim, &key, 1, s + r * kBlockN + c);
    }
  }
}

template <class T>
FL_INLINE RowTerms GradientTile<T>::terms(const QueryChunk<T>& queries, int64_t r0, int r,
                                          int64_t b, int64_t j0, const Columns& columns,
                                          float score_scale) const {
  const int64_t at = r0 + r;
  RowTerms terms;
  terms.score_scale = score_scale;
  terms.minus_lse = -queries.lse[at];
  terms.minus_delta = -queries.delta[at];
  terms.normalizer = queries.normalizer[at];
  terms.drops = p_.dropout.enabled();
  terms.dp_scale = queries.dp_scale[at];
  if (terms.drops) dropout_row(p_, b, queries.rows[at], j0, columns, terms.keep);
  return terms;
}

// A row that lies in the tile as a whole gets its normalizer and its delta from there. They undo
// the rounding of lse and agree with dp to the last bit: where one key has nearly all of the
// weight, ds = p (dp - delta) is small and would show both.
template <class T>
FL_INLINE RowTerms GradientTile<T>::normalized_terms(const QueryChunk<T>& queries, int64_t r0,
                                                     int r, int64_t b, int64_t j0,
                                                     const Columns& columns, float score_scale) {
  RowTerms row = terms(queries, r0, r, b, j0, columns, score_scale);
  if (queries.has_sums() || !is_whole_in(queries.rows[r0 + r], j0)) return row;
  float sum = queries.p_sink[r0 + r], dot = 0.0f;
  row.exponentiate(columns, s + r * kBlockN, dp + r * kBlockN, sum, dot);
  row.normalize(sum, dot, queries.dlse[r0 + r]);
  return row;
}

template <class T>
void GradientTile<T>::score_gradient(const QueryChunk<T>& queries, int64_t r0, int64_t b,
                                     int64_t j0, const Columns& columns, float score_scale) {
  for (int r = 0; r < rows_of(queries, r0); ++r) {
    const RowTerms row = normalized_terms(queries, r0, r, b, j0, columns, score_scale);
    for (int c = columns.begin; c < columns.end; c += kLanes) {
      const int at = r * kBlockN + c;
      Vec kept, ds;
      row.differentiate(c, load(s + at), load(dp + at), kept, ds);
      store(dp + at, ds);
    }
  }
}

template <class T>
void GradientTile<T>::add_sums(const QueryChunk<T>& queries, int64_t r0, int64_t b, int64_t j0,
                               const Columns& columns, float score_scale, float* sums,
                               float* dots) {
  for (int r = 0; r < rows_of(queries, r0); ++r) {
    RowTerms row = terms(queries, r0, r, b, j0, columns, score_scale);
    row.exponentiate(columns, s + r * kBlockN, dp + r * kBlockN, sums[r], dots[r]);
  }
}

template <class T>
void GradientTile<T>::differentiate(const QueryChunk<T>& queries, int64_t r0, int64_t b, int64_t j0,
                                    const Columns& columns, float score_scale) {
  for (int r = 0; r < rows_of(queries, r0); r += Dot::kPair) {
    RowTerms row[Dot::kPair];
    for (int k = 0; k < Dot::kPair; ++k) {
      row[k] = normalized_terms(queries, r0, r + k, b, j0, columns, score_scale);
    }
    for (int c = columns.begin; c < columns.end; c += kLanes) {
      Vec kept[Dot::kPair], ds[Dot::kPair];
#pragma GCC unroll 2
      for (int k = 0; k < Dot::kPair; ++k) {
        const int at = (r + k) * kBlockN + c;
        row[k].differentiate(c, load(s + at), load(dp + at), kept[k], ds[k]);
        if (slope_) ds[k] = ds[k] * load(slope_ + at);
      }
      store_operands(r, c, kept, ds);
    }
  }
}

template <class T>
FL_INLINE void GradientTile<T>::store_operands(int r, int c, const Vec* kept, const Vec* ds) {
  if constexpr (Dot::kPair == 1) {
    store(s + r * kBlockN + c, kept[0]);
    store(dp + r * kBlockN + c, ds[0]);
  } else {
#if defined(__AVX512BF16__)
    // Lower half: row r, upper half: row r + 1.
    const auto p_both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(kept[1].v, kept[0].v));
    const auto ds_both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(ds[1].v, ds[0].v));
    store_paired(p_both, p_pairs_ + r / 2 * kBlockN + c);
    store_paired(ds_both, ds_pairs_ + r / 2 * kBlockN + c);
    float* ds_row = ds_rows_ + (r * kBlockN + c) / 2;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_row), _mm512_castsi512_si256(ds_both));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds_row + kBlockN / 2),
                        _mm512_extracti64x4_epi64(ds_both, 1));
#endif
  }
}

}  // namespace fl::FL_ISA
