// Panels and the innermost loop where the CPU has AMX: a 32 x 32 block of the result in four tile
// registers, two tiles of a and two of b beside them. See common/amx.h for how every type becomes
// parts of bfloat16.
//
// A panel holds 32 rows of a factor: for every 32 elements of k, and every part, two tiles.
#pragma once

#include "common/amx.h"
#include "linear_act/params.h"

namespace fl::FL_ISA {

constexpr int kTileM = 2 * kTileLines;
constexpr int kTileN = 2 * kTileLines;

// Chosen on a Xeon of the fifth generation (48 KB L1d, 2 MB L2 per core).
constexpr int64_t kBlockOwn = 192, kBlockShared = 512;

// Two elements of k, in parts: k and k + 16 of every 32.
template <int kCount>
struct PartPair {
  uint32_t bits[kCount];
};

template <class T>
struct PanelOf {
  using Step = PartPair<kParts<T>>;
  static constexpr int kDepth = 2;
  static constexpr int kGroup = kTileDepth / kDepth;  // steps to a tile
  static constexpr bool kSplits = kParts<T> > 1;
  static constexpr int64_t kChunkSteps = kSplits ? 384 : 192;  // of one part: half of the L1 cache
};

// A stretch of a factor as panels: `rows` from `row`, `depth` from `k`. Lines of a tile hold what
// is dense in memory; where the multiplication wants it otherwise, the tile is transposed. Missing
// rows and depth are 0.
template <class T>
class PanelPacker {
  static constexpr int kCount = kParts<T>;
  static constexpr int kUnits = kTileBytes / sizeof(float);  // of a tile

 public:
  PanelPacker(const GemmFactor& factor, int64_t row, int64_t rows, int64_t k, int64_t depth)
      : from_(static_cast<const T*>(factor.data) +
              (factor.k_dense ? row * factor.stride + k : k * factor.stride + row)),
        stride_(factor.stride),
        k_dense_(factor.k_dense),
        rows_(rows),
        depth_(depth) {}

  // Tiles in the order in which memory has them.
  void pack(bool lines_are_rows, PartPair<kCount>* panels) const {
    const bool transpose = k_dense_ != lines_are_rows;
    const int64_t groups = (depth_ + kTileDepth - 1) / kTileDepth;
    const int64_t halves = (rows_ + 2 * kTileLines - 1) / (2 * kTileLines) * 2;
    for (int64_t i = 0; i < groups * halves; ++i) {
      const int64_t group = k_dense_ ? i % groups : i / halves;
      const int64_t half = k_dense_ ? i / groups : i % halves;
      const int64_t tile = (half / 2 * groups + group) * 2 * kCount + half % 2;
      float* to = reinterpret_cast<float*>(panels) + tile * kUnits;
      if (!transpose) {
        pack_tiles(half * kTileLines, group * kTileDepth, to, 2 * kUnits);
        continue;
      }
      alignas(64) float lines[kCount * kUnits];
      pack_tiles(half * kTileLines, group * kTileDepth, lines, kUnits);
      for (int p = 0; p < kCount; ++p) transpose_tile(lines + p * kUnits, to + 2 * p * kUnits);
    }
  }

 private:
  FL_INLINE static Mask clip(int64_t n) {
    return first_lanes(static_cast<int>(n < 0 ? 0 : n < kLanes ? n : kLanes));
  }

  // Rows [r, r + 16), depth [d, d + 32): a tile for each part, `next` units apart.
  FL_INLINE void pack_tiles(int64_t r, int64_t d, float* tiles, int64_t next) const {
    const T* from = from_ + (k_dense_ ? r * stride_ + d : d * stride_ + r);
    const int64_t lines = k_dense_ ? rows_ - r : depth_ - d;
    const int64_t second = k_dense_ ? kLanes : kTileLines * stride_;
    const Mask here0 = clip(k_dense_ ? depth_ - d : rows_ - r);
    const Mask here1 = k_dense_ ? clip(depth_ - d - kLanes) : here0;
    const int64_t lines1 = k_dense_ ? lines : lines - kTileLines;
    for (int line = 0; line < kTileLines; ++line, from += stride_) {
      // Two tiles on: rows lie on other pages, where the hardware does not look ahead.
      _mm_prefetch(from + kTileDepth, _MM_HINT_T0);
      _mm_prefetch(from + second + kTileDepth, _MM_HINT_T0);
      const Vec x0 = line < lines ? load(from, here0) : Vec(0.0f);
      const Vec x1 = line < lines1 ? load(from + second, here1) : Vec(0.0f);
      __m512i parts[kCount];
      split(x0, x1, parts);
      for (int p = 0; p < kCount; ++p) {
        _mm512_storeu_si512(tiles + p * next + line * kTileLines, parts[p]);
      }
    }
  }

  const T* const from_;
  const int64_t stride_;
  const bool k_dense_;
  const int64_t rows_, depth_;
};

template <class T>
void pack_a(const GemmFactor& a, int64_t row, int64_t rows, int64_t k, int64_t depth,
            PartPair<kParts<T>>* panels) {
  PanelPacker<T>(a, row, rows, k, depth).pack(true, panels);
}
template <class T>
void pack_b(const GemmFactor& b, int64_t row, int64_t rows, int64_t k, int64_t depth,
            PartPair<kParts<T>>* panels) {
  PanelPacker<T>(b, row, rows, k, depth).pack(false, panels);
}

// c = a b' (+ c where accumulate), over `steps` of one panel each. c: kTileM rows, stride_c apart.
template <int kCount>
__attribute__((noinline)) void multiply_tile(int64_t steps, const PartPair<kCount>* a,
                                             const PartPair<kCount>* b, float* c, int64_t stride_c,
                                             bool accumulate) {
  asm volatile("" ::: "memory");  // the tile instructions below read what was packed
  const int64_t bytes_c = stride_c * static_cast<int64_t>(sizeof(float));
  float* below = c + kTileLines * stride_c;
  if (accumulate) {
    _tile_loadd(0, c, bytes_c);
    _tile_loadd(1, c + kTileLines, bytes_c);
    _tile_loadd(2, below, bytes_c);
    _tile_loadd(3, below + kTileLines, bytes_c);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const char* at = reinterpret_cast<const char*>(a);
  const char* bt = reinterpret_cast<const char*>(b);
  const auto a_tile = [&](int part, int half) { return at + (2 * part + half) * kTileBytes; };
  const auto b_tile = [&](int part, int half) { return bt + (2 * part + half) * kTileBytes; };
  // The products with another part of a, or of b, than before.
  const auto multiply_a = [&](int part) {
    _tile_loadd(4, a_tile(part, 0), 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a_tile(part, 1), 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  };
  const auto multiply_b = [&](int part) {
    _tile_loadd(6, b_tile(part, 0), 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, b_tile(part, 1), 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  };
  constexpr int64_t kBytes = 2 * kCount * kTileBytes;
  for (int64_t s = 0; s < steps; s += kTileLines, at += kBytes, bt += kBytes) {
    // Small products first, more or less.
    _tile_loadd(6, b_tile(0, 0), 64);
    _tile_loadd(7, b_tile(0, 1), 64);
    if constexpr (kCount == 3) multiply_a(2);
    if constexpr (kCount >= 2) multiply_a(1);
    if constexpr (kCount == 3) multiply_b(1);
    multiply_a(0);
    if constexpr (kCount >= 2) multiply_b(kCount - 1);
    if constexpr (kCount == 3) multiply_b(0);
  }
  _tile_stored(0, c, bytes_c);
  _tile_stored(1, c + kTileLines, bytes_c);
  _tile_stored(2, below, bytes_c);
  _tile_stored(3, below + kTileLines, bytes_c);
}

}  // namespace fl::FL_ISA
