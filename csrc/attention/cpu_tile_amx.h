// The product of packed bfloat16 pairs where the CPU has AMX. The layouts are those of cpu_tile.h:
// 16 units of depth of 16 rows, or of 16 columns, are a tile as they lie there. Only for cpu_*.cpp.
#pragma once

#include "attention/cpu_operands.h"
#include "common/amx.h"

namespace fl::FL_ISA {

constexpr int kMaxTurned = 32;  // units of depth: the queries of a tile of the backward, in pairs

// Where A lies column by column, `rows` of it turned round; else A as it is.
FL_INLINE OperandA tile_rows(OperandA a, int64_t rows, int64_t depth, float* turned) {
  if (a.depth == 1) return a;
  for (int64_t k = 0; k < depth; k += kTileLines) {
    for (int64_t r = 0; r < rows; r += 4) {
      transpose_strip(a.data + k * a.depth + r, a.depth, turned + r * depth + k, depth);
    }
  }
  return {turned, depth, 1};
}

// c (16 rows, or kTall 32; 16 columns, or kWide 32) = [c +] a . b
template <bool kAdd, bool kTall, bool kWide>
FL_INLINE void tile_micro_product(int64_t depth, OperandA a, OperandB b, float* c, int64_t ldc) {
  const int64_t c_bytes = ldc * 4, a_bytes = a.row * 4, b_bytes = b.depth * 4;
  float* below = c + kTileLines * ldc;
  if constexpr (kAdd) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kWide) _tile_loadd(1, c + kLanes, c_bytes);
    if constexpr (kTall) _tile_loadd(2, below, c_bytes);
    if constexpr (kTall && kWide) _tile_loadd(3, below + kLanes, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kWide) _tile_zero(1);
    if constexpr (kTall) _tile_zero(2);
    if constexpr (kTall && kWide) _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += kTileLines) {
    const float* b_tile = b.data + k * b.depth;
    _tile_loadd(4, a.data + k, a_bytes);
    _tile_loadd(6, b_tile, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kWide) {
      _tile_loadd(7, b_tile + kLanes, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTall) {
      _tile_loadd(5, a.data + kTileLines * a.row + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kTall && kWide) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kWide) _tile_stored(1, c + kLanes, c_bytes);
  if constexpr (kTall) _tile_stored(2, below, c_bytes);
  if constexpr (kTall && kWide) _tile_stored(3, below + kLanes, c_bytes);
}

FL_INLINE void decay_rows(int64_t rows, int64_t vecs, float* c, int64_t ldc, const float* decay) {
  for (int64_t r = 0; r < rows; ++r) {
    if (decay[r] == 1.0f) continue;  // most rows, after their first blocks of keys
    float* row = c + r * ldc;
    for (int64_t v = 0; v < vecs * kLanes; v += kLanes)
      store(row + v, load(row + v) * Vec(decay[r]));
  }
}

// As product() in cpu_tile.h. Rows are written in sixteens: those past `rows` get what they like.
template <Update kUpdate>
__attribute__((noinline)) void tile_product(int64_t rows, int64_t vecs, int64_t depth, OperandA a,
                                            OperandB b, float* c, int64_t ldc, const float* decay) {
  constexpr bool kAdd = kUpdate != Update::kSet;
  alignas(64) float turned[2 * kTileLines * kMaxTurned];
  for (int64_t r = 0; r < rows; r += 2 * kTileLines) {
    const bool tall = rows - r > kTileLines;
    const int64_t here = tall ? 2 * kTileLines : kTileLines;
    float* to = c + r * ldc;
    if constexpr (kUpdate == Update::kDecayAndAdd) decay_rows(here, vecs, to, ldc, decay + r);
    const OperandA part = tile_rows({a.data + r * a.row, a.row, a.depth}, here, depth, turned);
    asm volatile("" ::: "memory");  // tile instructions read what was stored above
    for (int64_t v = 0; v < vecs; v += 2, to += 2 * kLanes) {
      const OperandB panel{b.data + v / 2 * b.panel, b.panel, b.depth};
      const bool wide = v + 1 < vecs;
      if (tall && wide) tile_micro_product<kAdd, true, true>(depth, part, panel, to, ldc);
      if (tall && !wide) tile_micro_product<kAdd, true, false>(depth, part, panel, to, ldc);
      if (!tall && wide) tile_micro_product<kAdd, false, true>(depth, part, panel, to, ldc);
      if (!tall && !wide) tile_micro_product<kAdd, false, false>(depth, part, panel, to, ldc);
    }
  }
}

}  // namespace fl::FL_ISA
