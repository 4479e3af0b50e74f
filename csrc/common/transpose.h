// Transposing 32-bit units in registers. Only for cpu_*.cpp.
#pragma once

#include "common/simd.h"

namespace fl::FL_ISA {

// kLanes rows of 4 units to 4 rows of kLanes units.
FL_INLINE void transpose_strip(const float* src, int64_t ld, float* dst, int64_t dst_ld) {
#if defined(__AVX512F__)
  __m512 x[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {  // 128-bit lane l holds row 4 l + k
    const float* row = src + k * ld;
    x[k] = _mm512_castps128_ps512(_mm_loadu_ps(row));
    x[k] = _mm512_insertf32x4(x[k], _mm_loadu_ps(row + 4 * ld), 1);
    x[k] = _mm512_insertf32x4(x[k], _mm_loadu_ps(row + 8 * ld), 2);
    x[k] = _mm512_insertf32x4(x[k], _mm_loadu_ps(row + 12 * ld), 3);
  }
  const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1]));
  const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]));
  const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1]));
  const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
  _mm512_storeu_pd(dst, _mm512_unpacklo_pd(low01, low23));
  _mm512_storeu_pd(dst + dst_ld, _mm512_unpackhi_pd(low01, low23));
  _mm512_storeu_pd(dst + 2 * dst_ld, _mm512_unpacklo_pd(high01, high23));
  _mm512_storeu_pd(dst + 3 * dst_ld, _mm512_unpackhi_pd(high01, high23));
#else
  __m256 x[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const float* row = src + k * ld;
    x[k] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)),
                                _mm_loadu_ps(row + 4 * ld), 1);
  }
  const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(x[0], x[1]));
  const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(x[2], x[3]));
  const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(x[0], x[1]));
  const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(x[2], x[3]));
  const auto put = [&](int row, __m256d y) {
    _mm256_storeu_ps(dst + row * dst_ld, _mm256_castpd_ps(y));
  };
  put(0, _mm256_unpacklo_pd(low01, low23));
  put(1, _mm256_unpackhi_pd(low01, low23));
  put(2, _mm256_unpacklo_pd(high01, high23));
  put(3, _mm256_unpackhi_pd(high01, high23));
#endif
}

}  // namespace fl::FL_ISA
