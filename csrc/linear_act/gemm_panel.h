// Panels: the factors of a product, rearranged so that the inner loop reads them in order.
//
// A panel holds kWidth rows of a factor, interleaved: step 0 of every row, then step 1. A step is
// one float (float16 and bfloat16 are converted on the way), or, where the CPU multiplies bfloat16
// itself, two neighbours along k. Missing rows, and the missing half of an odd last pair, are 0.
#pragma once

#include "common/simd.h"
#include "linear_act/params.h"

namespace fl::FL_ISA {

struct BFloat16Pair {
  uint32_t bits;  // element k in the low half, k + 1 in the high half
};

// How elements of type T stand in a panel: kDepth of them to a Step.
template <class T>
struct PanelOf {
  using Step = float;
  static constexpr int kDepth = 1;
  static constexpr int kGroup = 1;             // panels have whole groups of steps
  static constexpr int64_t kChunkSteps = 192;  // summed up in one go; chosen as the blocks
  static constexpr bool kSplits = false;       // whether T is multiplied in parts, see common/amx.h
};
#if defined(__AVX512BF16__)
template <>
struct PanelOf<BFloat16> {
  using Step = BFloat16Pair;
  static constexpr int kDepth = 2;
  static constexpr int kGroup = 1;
  static constexpr int64_t kChunkSteps = 192;
  static constexpr bool kSplits = false;
};
#endif

// Four steps along k of one row, whose elements are dense.
FL_INLINE __m128 load_steps(const float* p, float) { return _mm_loadu_ps(p); }
FL_INLINE __m128 load_steps(const Half* p, float) {
  return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
FL_INLINE __m128 load_steps(const BFloat16* p, float) {
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16));
}
FL_INLINE __m128 load_steps(const BFloat16* p, BFloat16Pair) {
  return _mm_loadu_ps(reinterpret_cast<const float*>(p));
}

// One step of one row; `count` of its elements (1 or 2) exist, `stride` apart.
FL_INLINE float one_step(const float* p, int64_t, int64_t, float) { return *p; }
FL_INLINE float one_step(const Half* p, int64_t, int64_t, float) { return _cvtsh_ss(p->bits); }
FL_INLINE float one_step(const BFloat16* p, int64_t, int64_t, float) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(p->bits) << 16);
}
FL_INLINE BFloat16Pair one_step(const BFloat16* p, int64_t stride, int64_t count, BFloat16Pair) {
  return {p[0].bits | (count > 1 ? static_cast<uint32_t>(p[stride].bits) << 16 : 0u)};
}

// One step of the rows under the mask, whose elements are dense; 0 elsewhere.
template <class T>
FL_INLINE Vec load_rows(const T* p, int64_t, int64_t, Mask rows, float) {
  return load(p, rows);
}
#if defined(__AVX512BF16__)
FL_INLINE Vec load_rows(const BFloat16* p, int64_t stride, int64_t count, Mask rows, BFloat16Pair) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(rows, p));
  if (count < 2) return _mm512_castsi512_ps(low);
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(rows, p + stride));
  return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif

// One panel of a factor that is dense along k: blocks of 4 rows by 4 steps are transposed.
// p points at (first row, first k); rows <= kWidth of them exist.
template <int kWidth, class T, class Step>
FL_INLINE void pack_k_dense(const T* p, int64_t stride, int rows, int64_t depth, Step* panel) {
  constexpr int kDepth = PanelOf<T>::kDepth;
  const int64_t steps = (depth + kDepth - 1) / kDepth;
  const int64_t blocked_steps = depth / (4 * kDepth) * 4;
  const int blocked_rows = rows / 4 * 4;
  for (int64_t s = 0; s < blocked_steps; s += 4) {
    for (int r = 0; r < blocked_rows; r += 4) {
      const T* block = p + r * stride + s * kDepth;
      __m128 x0 = load_steps(block, Step{}), x1 = load_steps(block + stride, Step{});
      __m128 x2 = load_steps(block + 2 * stride, Step{}),
             x3 = load_steps(block + 3 * stride, Step{});
      _MM_TRANSPOSE4_PS(x0, x1, x2, x3);
      float* to = reinterpret_cast<float*>(panel + s * kWidth + r);
      _mm_storeu_ps(to, x0);
      _mm_storeu_ps(to + kWidth, x1);
      _mm_storeu_ps(to + 2 * kWidth, x2);
      _mm_storeu_ps(to + 3 * kWidth, x3);
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    for (int r = s < blocked_steps ? blocked_rows : 0; r < kWidth; ++r) {
      const T* from = p + r * stride + s * kDepth;
      panel[s * kWidth + r] = r < rows ? one_step(from, 1, depth - s * kDepth, Step{}) : Step{};
    }
  }
}

// Rows [row, row + rows) and elements [k, k + depth) of a factor as ceil(rows / kWidth) panels, one
// after the other, each of ceil(depth / kDepth) steps.
template <int kWidth, class T, class Step = typename PanelOf<T>::Step>
void pack_panels(const GemmFactor& factor, int64_t row, int64_t rows, int64_t k, int64_t depth,
                 Step* panels) {
  constexpr int kDepth = PanelOf<T>::kDepth;
  const int64_t steps = (depth + kDepth - 1) / kDepth;
  const int64_t stride = factor.stride;
  const T* data = static_cast<const T*>(factor.data);
  if (factor.k_dense) {
    for (int64_t r = 0; r < rows; r += kWidth, panels += steps * kWidth) {
      const int here = static_cast<int>(rows - r < kWidth ? rows - r : kWidth);
      pack_k_dense<kWidth>(data + (row + r) * stride + k, stride, here, depth, panels);
    }
    return;
  }
  // Dense along the rows: copied, a whole step of all panels at a time, so that reads run on. Each
  // step starts on another page, where the hardware does not prefetch.
  constexpr int64_t kStepsAhead = 12;
  for (int64_t s = 0; s < steps; ++s) {
    const T* from = data + (k + s * kDepth) * stride + row;
    float* to = reinterpret_cast<float*>(panels + s * kWidth);
    for (int64_t r = 0; r < rows; r += kWidth, to += steps * kWidth) {
      for (int lane = 0; lane < kWidth; lane += kLanes) {
        const T* ahead = from + kStepsAhead * kDepth * stride + r + lane;
        for (int i = 0; i < kDepth; ++i) _mm_prefetch(ahead + i * stride, _MM_HINT_T0);
        const int64_t left = rows - r - lane;
        const int width = kWidth - lane < kLanes ? kWidth - lane : kLanes;
        const int here = static_cast<int>(left < 0 ? 0 : left < width ? left : width);
        store(to + lane,
              load_rows(from + r + lane, stride, depth - s * kDepth, first_lanes(here), Step{}),
              first_lanes(width));
      }
    }
  }
}

}  // namespace fl::FL_ISA
