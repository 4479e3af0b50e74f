// The innermost loop: a kTileM x kTileN block of the result, held in registers.
//
// AVX-512: 8 x 48, so 24 accumulators, 3 registers of b and the broadcast of a; per step 24
// multiply-adds against 11 loads. AVX2: 4 x 24, 12 accumulators of the 16 registers there are.
#pragma once

#include "linear_act/gemm_panel.h"

namespace fl::FL_ISA {

constexpr int kTileVecs = 3;
constexpr int kTileM = kLanes == 16 ? 8 : 4;
constexpr int kTileN = kTileVecs * kLanes;

// Chosen on Zen 5 (48 KB L1d, 1 MB L2 per core).
constexpr int64_t kBlockOwn = 96, kBlockShared = 768;

template <class T>
void pack_a(const GemmFactor& a, int64_t row, int64_t rows, int64_t k, int64_t depth,
            typename PanelOf<T>::Step* panels) {
  pack_panels<kTileM, T>(a, row, rows, k, depth, panels);
}
template <class T>
void pack_b(const GemmFactor& b, int64_t row, int64_t rows, int64_t k, int64_t depth,
            typename PanelOf<T>::Step* panels) {
  pack_panels<kTileN, T>(b, row, rows, k, depth, panels);
}

FL_INLINE Vec multiply_add(float a, Vec b, Vec sum) { return fma(Vec(a), b, sum); }
FL_INLINE Vec load_panel(const float* p) { return load(p); }
#if defined(__AVX512BF16__)
FL_INLINE Vec load_panel(const BFloat16Pair* p) { return load(reinterpret_cast<const float*>(p)); }
FL_INLINE Vec multiply_add(BFloat16Pair a, Vec b, Vec sum) {
  const __m512i both = _mm512_set1_epi32(static_cast<int>(a.bits));
  return _mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(both), reinterpret_cast<__m512bh>(b.v));
}
#endif

// c = a b' (+ c where accumulate), over `steps` of one panel each. c: kTileM rows, stride_c apart.
template <class Step>
__attribute__((noinline)) void multiply_tile(int64_t steps, const Step* a, const Step* b, float* c,
                                             int64_t stride_c, bool accumulate) {
  Vec sum[kTileM][kTileVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kTileM; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < kTileVecs; ++v) sum[i][v] = Vec(0.0f);
  }
  for (int64_t s = 0; s < steps; ++s, a += kTileM, b += kTileN) {
    Vec columns[kTileVecs];
#pragma GCC unroll 3
    for (int v = 0; v < kTileVecs; ++v) columns[v] = load_panel(b + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileM; ++i) {
#pragma GCC unroll 3
      for (int v = 0; v < kTileVecs; ++v) sum[i][v] = multiply_add(a[i], columns[v], sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileM; ++i) {
#pragma GCC unroll 3
    for (int v = 0; v < kTileVecs; ++v) {
      float* to = c + i * stride_c + v * kLanes;
      store(to, accumulate ? sum[i][v] + load(to) : sum[i][v]);
    }
  }
}

}  // namespace fl::FL_ISA
