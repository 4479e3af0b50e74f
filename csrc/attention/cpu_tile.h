// Building blocks of the CPU attention kernels: packing, and a register-tiled matrix product. Only
// for cpu_*.cpp.
#pragma once

#if defined(__AMX_BF16__)
#include "attention/cpu_tile_amx.h"
#else
#include "attention/cpu_operands.h"
#endif
#include "attention/params.h"
#include "common/amx.h"
#include "common/transpose.h"

namespace fl::FL_ISA {

// c (kRows x kVecs registers) = [decay[r] * c +] a . b
template <class Dot, Update kUpdate, int kVecs>
FL_INLINE void micro_product(int64_t depth, OperandA a, OperandB b, float* c, int64_t ldc,
                             const float* decay) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec(0.0f);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec column[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) column[v] = load(b.data + k * b.depth + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec row(a.data[r * a.row + k * a.depth]);
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) acc[r][v] = Dot::step(row, column[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      float* at = c + r * ldc + v * kLanes;
      if constexpr (kUpdate == Update::kSet) store(at, acc[r][v]);
      if constexpr (kUpdate == Update::kAdd) store(at, load(at) + acc[r][v]);
      if constexpr (kUpdate == Update::kDecayAndAdd) {
        store(at, fma(load(at), Vec(decay[r]), acc[r][v]));
      }
    }
  }
}

// Of a depth that is summed up in one go.
template <class Dot, Update kUpdate>
void product_part(int64_t rows, int64_t vecs, int64_t depth, OperandA a, OperandB b, float* c,
                  int64_t ldc, const float* decay) {
  for (int64_t v = 0; v < vecs; v += 2) {
    const OperandB panel{b.data + v / 2 * b.panel, b.panel, b.depth};
    for (int64_t r = 0; r < rows; r += kRows) {
      const OperandA part{a.data + r * a.row, a.row, a.depth};
      float* out = c + r * ldc + v * kLanes;
      const float* part_decay = kUpdate == Update::kDecayAndAdd ? decay + r : nullptr;
      if (v + 1 < vecs) {
        micro_product<Dot, kUpdate, 2>(depth, part, panel, out, ldc, part_decay);
      } else {
        micro_product<Dot, kUpdate, 1>(depth, part, panel, out, ldc, part_decay);
      }
    }
  }
}

// c (rows x vecs * kLanes) = [decay[r] * c +] a . b;  rows is a multiple of kRows, depth in units.
//
// The depth goes in parts: sums of more than 16 terms one after the other round more than those of
// the matrix products that they are compared with.
template <class Dot, Update kUpdate>
void product(int64_t rows, int64_t vecs, int64_t depth, OperandA a, OperandB b, float* c,
             int64_t ldc, const float* decay = nullptr) {
#if defined(__AMX_BF16__)
  if constexpr (Dot::kPair == 2) {
    return tile_product<kUpdate>(rows, vecs, depth, a, b, c, ldc, decay);
  }
#endif
  constexpr int64_t kPart = 16;
  product_part<Dot, kUpdate>(rows, vecs, least(depth, kPart), a, b, c, ldc, decay);
  for (int64_t k = kPart; k < depth; k += kPart) {
    product_part<Dot, Update::kAdd>(rows, vecs, least(depth - k, kPart),
                                    {a.data + k * a.depth, a.row, a.depth},
                                    {b.data + k * b.depth, b.panel, b.depth}, c, ldc, nullptr);
  }
}

// How a head's (seqlen, dim) matrices are laid out when packed.
template <class Dot>
struct Layout {
  int64_t dim;

  FL_INLINE int64_t padded() const { return round_up(dim, Dot::kPair * kLanes); }
  FL_INLINE int64_t row_units() const { return padded() / Dot::kPair; }  // of row-major rows
  FL_INLINE int64_t depth_units() const { return (dim + Dot::kPair - 1) / Dot::kPair; }
  FL_INLINE int64_t padded_depth() const { return round_up(depth_units(), Dot::kDepthUnits); }
  FL_INLINE int64_t vecs() const { return (dim + kLanes - 1) / kLanes; }
  FL_INLINE int64_t panel_stride() const { return padded_depth() * kPanel; }
  FL_INLINE OperandA as_a(const float* rows) const { return {rows, row_units(), 1}; }
  FL_INLINE OperandB as_columns(const float* columns) const { return {columns, kPanel, padded()}; }
  FL_INLINE OperandB as_transposed(const float* panels) const {
    return {panels, panel_stride(), kPanel};
  }
};

// rows x dim elements to row-major units, zeros up to padded_rows and the padded width.
template <class T>
void pack_rows(Layout<FloatDot> layout, const T* src, int64_t stride, int64_t rows,
               int64_t padded_rows, float* dst) {
  const int64_t ld = layout.row_units(), whole = round_down(layout.dim, kLanes);
  const Mask tail = first_lanes(static_cast<int>(layout.dim - whole));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < whole; c += kLanes) store(dst + r * ld + c, load(src + r * stride + c));
    if (whole < ld) store(dst + r * ld + whole, load(src + r * stride + whole, tail));
  }
  for (int64_t u = rows * ld; u < padded_rows * ld; u += kLanes) store(dst + u, Vec(0.0f));
}

// The units of row-major rows as depth: row r of one product is depth r of another. float32 has the
// same layout for both.
FL_INLINE const float* pack_columns(Layout<FloatDot>, const float* rows, int64_t, float*) {
  return rows;
}
template <class Dot>
FL_INLINE int64_t column_units(Layout<Dot> layout, int64_t rows) {
  return Dot::kPair == 1 ? 0 : rows / Dot::kPair * layout.padded();
}

#if defined(__AVX512BF16__)
inline void pack_rows(Layout<PairDot> layout, const BFloat16* src, int64_t stride, int64_t rows,
                      int64_t padded_rows, float* dst) {
  const int64_t ld = layout.row_units();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t u = 0; u < ld; u += kLanes) {
      const int64_t left = least(layout.dim - 2 * u, 2 * kLanes);
      const __mmask32 lanes = _bzhi_u32(~0u, static_cast<uint32_t>(left));
      const __m512i pairs = _mm512_maskz_loadu_epi16(lanes, src + r * stride + 2 * u);
      store(dst + r * ld + u, Vec(_mm512_castsi512_ps(pairs)));
    }
  }
  for (int64_t u = rows * ld; u < padded_rows * ld; u += kLanes) store(dst + u, Vec(0.0f));
}

// Two vectors of 32 bfloat16 each to units (low[t], high[t]), t = 0..15 and 16..31.
FL_INLINE void interleave(__m512i low, __m512i high, float* dst) {
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i upper = _mm512_add_epi16(order, _mm512_set1_epi16(16));
  _mm512_storeu_si512(dst, _mm512_permutex2var_epi16(low, order, high));
  _mm512_storeu_si512(dst + kLanes, _mm512_permutex2var_epi16(low, upper, high));
}

// 16 bfloat16 of one row in the lower half, 16 of the next in the upper half, to units (lower[t],
// upper[t]).
FL_INLINE void store_paired(__m512i halves, float* dst) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(dst, _mm512_permutexvar_epi16(order, halves));
}

// Rows 2 k and 2 k + 1 to units that pair them; rows is even.
inline const float* pack_columns(Layout<PairDot> layout, const float* rows, int64_t count,
                                 float* dst) {
  const int64_t ld = layout.row_units();
  for (int64_t r = 0; r < count; r += 2) {
    for (int64_t u = 0; u < ld; u += kLanes) {
      interleave(_mm512_loadu_si512(rows + r * ld + u), _mm512_loadu_si512(rows + (r + 1) * ld + u),
                 dst + r / 2 * layout.padded() + 2 * u);
    }
  }
  return dst;
}
#endif

// Row-major units to panels: row r becomes column r. rows is a multiple of kPanel.
template <class Dot>
void pack_transposed(Layout<Dot> layout, const float* src, int64_t rows, float* dst) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    float* panel = dst + r / kPanel * layout.panel_stride() + r % kPanel;
    for (int64_t u = 0; u < layout.padded_depth(); u += 4) {
      transpose_strip(src + r * layout.row_units() + u, layout.row_units(), panel + u * kPanel,
                      kPanel);
    }
  }
}

// dst = scale * src, rows x dim, to the storage type.
template <class T>
FL_INLINE void store_row(const float* src, int64_t dim, float scale, T* dst) {
  const int64_t whole = round_down(dim, kLanes);
  for (int64_t c = 0; c < whole; c += kLanes) store(dst + c, load(src + c) * Vec(scale));
  if (whole < dim) {
    store(dst + whole, load(src + whole) * Vec(scale), first_lanes(static_cast<int>(dim - whole)));
  }
}

template <class T>
void store_rows(const float* src, int64_t ld, int64_t rows, int64_t dim, float scale, T* dst,
                int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) store_row(src + r * ld, dim, scale, dst + r * stride);
}

template <class T>
FL_INLINE T* row_at(const TensorView4& x, int64_t b, int64_t h, int64_t row) {
  return static_cast<T*>(x.data) + b * x.stride_b + h * x.stride_h + row * x.stride_s;
}

}  // namespace fl::FL_ISA
