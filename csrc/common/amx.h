// AMX, the tile unit of Intel's Xeons: products of bfloat16 matrices, 16 rows of C at once.
// Only for cpu_*.cpp.
//
// One tile instruction adds a (16 x 32) b (32 x 16) to a tile of float32: 16 cycles for 8192
// multiplications, where AVX-512 multiplies 32 float32 per cycle. So much faster that float32
// matrices are multiplied in bfloat16 too, with float32's accuracy: a float32 is the sum of three
// bfloat16, x = x0 + x1 + x2, each the rounded rest of the one before, and
//
//   x y = x0 y0 + x0 y1 + x1 y0 + x1 y1 + x0 y2 + x2 y0     to about 2^-25 |x y|
//
// six tile instructions in place of 16 times as many multiply-adds. A float16 is the sum of two.
// Where x or y is not finite, or rounds to a bfloat16 that is not, parts of both signs meet and the
// sum is NaN: whoever splits into parts looks for sums that are not finite, and computes them again
// with the instructions for float32. Parts below 2^-126 count as 0.
//
// In memory a tile is 16 lines of 16 pairs of bfloat16. As the left factor its lines are rows of a
// matrix, and a pair is two elements along the depth; as the right factor its lines are pairs of
// the depth, side by side for 16 columns. Which elements make a pair, neighbours or others, is free
// as long as both factors have the same.
#pragma once

#include "common/simd.h"
#include "common/transpose.h"

#if defined(__AMX_BF16__)

namespace fl::FL_ISA {

constexpr int kTileLines = 16;
constexpr int kTileDepth = 32;  // bfloat16 along the depth
constexpr int kTileBytes = 1024;

template <class T>
constexpr int kParts = sizeof(T) == 4 ? 3 : 2;
template <>
constexpr int kParts<BFloat16> = 1;

// A thread's tile registers, for as long as this object lives: all eight of 16 lines of 64 bytes.
class TileRegisters {
 public:
  FL_INLINE TileRegisters() {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = kTileLines;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  FL_INLINE ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// Two vectors to 16 pairs (of x0, of x1) of bfloat16 for each part.
template <int kCount>
FL_INLINE void split(Vec x0, Vec x1, __m512i (&parts)[kCount]) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __m512i half = _mm512_set1_epi32(0x8000);
#pragma GCC unroll 3
  for (int p = 0; p < kCount; ++p) {
    __m512i bits0 = _mm512_castps_si512(x0.v), bits1 = _mm512_castps_si512(x1.v);
    if (p + 1 < kCount) {  // the last part is exact
      bits0 = _mm512_add_epi32(bits0, half);
      bits1 = _mm512_add_epi32(bits1, half);
    }
    // (bits0 >> 16) | (bits1 & upper)
    parts[p] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(bits0, 16), bits1, upper, 0xf8);
    x0 = x0 - Vec(_mm512_castsi512_ps(_mm512_and_si512(bits0, upper)));
    x1 = x1 - Vec(_mm512_castsi512_ps(_mm512_and_si512(bits1, upper)));
  }
}

FL_INLINE void transpose_tile(const float* tile, float* to) {
  for (int u = 0; u < kTileLines; u += 4) {
    transpose_strip(tile + u, kTileLines, to + u * kTileLines, kTileLines);
  }
}

}  // namespace fl::FL_ISA

#else

namespace fl::FL_ISA {

struct TileRegisters {};  // for code that is compiled with AMX and without

}  // namespace fl::FL_ISA

#endif
