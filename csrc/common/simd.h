// Vec: one register of float32, in AVX2 (8 lanes) or AVX-512 (16 lanes), and Mask: one truth value
// per lane. Loads and stores convert from and to float16 and bfloat16, rounding to nearest even.
// Only for cpu_*.cpp: everything lives in fl::FL_ISA, so that each instruction set keeps its own
// copy.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/dtype.h"

#define FL_INLINE __attribute__((always_inline)) inline

namespace fl::FL_ISA {

#if defined(__AVX512F__)

using Mask = __mmask16;

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;
  Vec() = default;
  FL_INLINE Vec(__m512 value) : v(value) {}
  FL_INLINE Vec(float value) : v(_mm512_set1_ps(value)) {}
};

FL_INLINE Mask first_lanes(int n) { return static_cast<Mask>((1u << n) - 1u); }  // n in [0, 16]

FL_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
FL_INLINE Vec load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FL_INLINE Vec bf16_to_float(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
FL_INLINE Vec load(const BFloat16* p) {
  return bf16_to_float(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Lanes outside the mask are 0 and their memory is not touched.
FL_INLINE Vec load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
FL_INLINE Vec load(const Half* p, Mask m) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, p));
}
FL_INLINE Vec load(const BFloat16* p, Mask m) {
  return bf16_to_float(_mm256_maskz_loadu_epi16(m, p));
}

#if defined(__AVX512BF16__)
FL_INLINE __m256i float_to_bf16(Vec x) {  // subnormal numbers become 0
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
}
#else
FL_INLINE __m256i float_to_bf16(Vec x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const Mask nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
#endif
FL_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
FL_INLINE void store(Half* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
FL_INLINE void store(BFloat16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), float_to_bf16(x));
}
FL_INLINE void store(float* p, Vec x, Mask m) { _mm512_mask_storeu_ps(p, m, x.v); }
FL_INLINE void store(Half* p, Vec x, Mask m) {
  _mm256_mask_storeu_epi16(p, m, _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
FL_INLINE void store(BFloat16* p, Vec x, Mask m) {
  _mm256_mask_storeu_epi16(p, m, float_to_bf16(x));
}

FL_INLINE Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
FL_INLINE Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
FL_INLINE Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
FL_INLINE Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
FL_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }    // a * b + c
FL_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }  // c - a * b
// Where either is NaN, the second operand comes back, as in the instruction.
FL_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
FL_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
FL_INLINE Vec sqrt(Vec a) { return _mm512_sqrt_ps(a.v); }
FL_INLINE Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
FL_INLINE Vec copysign(Vec magnitude, Vec sign) {
  const __m512i bit = _mm512_set1_epi32(INT32_MIN);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign.v),
                                                       _mm512_castps_si512(magnitude.v), 0xca));
}
FL_INLINE Vec round(Vec a) {
  return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

FL_INLINE Mask operator<(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
FL_INLINE Mask operator<=(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
FL_INLINE Mask operator>(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
FL_INLINE Mask operator>=(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
FL_INLINE Mask operator==(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
FL_INLINE Vec select(Mask m, Vec yes, Vec no) { return _mm512_mask_blend_ps(m, no.v, yes.v); }

// a 2^n of a near 1 and a whole n or NaN; overflows to inf; 0 where it would be subnormal or less:
// some CPUs take a hundred cycles to make a subnormal number or to lose one.
FL_INLINE Vec scale_by_power_of_2(Vec a, Vec n) {
  const __mmask16 normal = _mm512_cmp_ps_mask(n.v, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, a.v, n.v);
}

FL_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
FL_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

#else  // AVX2

struct Mask {
  __m256 v;
};
FL_INLINE Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.v, b.v)}; }
FL_INLINE Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.v, b.v)}; }
FL_INLINE Mask operator~(Mask a) {
  return {_mm256_xor_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))};
}

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;
  Vec() = default;
  FL_INLINE Vec(__m256 value) : v(value) {}
  FL_INLINE Vec(float value) : v(_mm256_set1_ps(value)) {}
};

FL_INLINE Mask first_lanes(int n) {  // n in [0, 8]
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane))};
}

FL_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
FL_INLINE Vec load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FL_INLINE Vec bf16_to_float(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
FL_INLINE Vec load(const BFloat16* p) {
  return bf16_to_float(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// Lanes outside the mask are 0 and their memory is not touched. The mask is a prefix:
// first_lanes(n).
FL_INLINE Vec load(const float* p, Mask m) {
  return _mm256_maskload_ps(p, _mm256_castps_si256(m.v));
}
FL_INLINE __m128i load_16bit(const void* p, Mask m) {
  alignas(16) uint16_t lanes[8] = {};
  const int count = __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(m.v)));
  for (int i = 0; i < count; ++i) lanes[i] = static_cast<const uint16_t*>(p)[i];
  return _mm_load_si128(reinterpret_cast<const __m128i*>(lanes));
}
FL_INLINE Vec load(const Half* p, Mask m) { return _mm256_cvtph_ps(load_16bit(p, m)); }
FL_INLINE Vec load(const BFloat16* p, Mask m) { return bf16_to_float(load_16bit(p, m)); }

FL_INLINE __m128i float_to_bf16(Vec x) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  return _mm256_castsi256_si128(packed);
}
FL_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x.v); }
FL_INLINE void store(Half* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
FL_INLINE void store(BFloat16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), float_to_bf16(x));
}
FL_INLINE void store(float* p, Vec x, Mask m) {
  _mm256_maskstore_ps(p, _mm256_castps_si256(m.v), x.v);
}
FL_INLINE void store_16bit(void* p, __m128i x, Mask m) {
  alignas(16) uint16_t lanes[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), x);
  const int count = __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(m.v)));
  for (int i = 0; i < count; ++i) static_cast<uint16_t*>(p)[i] = lanes[i];
}
FL_INLINE void store(Half* p, Vec x, Mask m) {
  store_16bit(p, _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT), m);
}
FL_INLINE void store(BFloat16* p, Vec x, Mask m) { store_16bit(p, float_to_bf16(x), m); }

FL_INLINE Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
FL_INLINE Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
FL_INLINE Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
FL_INLINE Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
FL_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }    // a * b + c
FL_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a.v, b.v, c.v); }  // c - a * b
// Where either is NaN, the second operand comes back, as in the instruction.
FL_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
FL_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
FL_INLINE Vec sqrt(Vec a) { return _mm256_sqrt_ps(a.v); }
FL_INLINE Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
FL_INLINE Vec copysign(Vec magnitude, Vec sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_and_ps(bit, sign.v), _mm256_andnot_ps(bit, magnitude.v));
}
FL_INLINE Vec round(Vec a) {
  return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// As above; in two steps of half the exponent each, so that neither factor leaves the normal range.
FL_INLINE Vec scale_by_power_of_2(Vec a, Vec n) {
  const __m256 normal = _mm256_cmp_ps(n.v, _mm256_set1_ps(-125.0f), _CMP_NLT_UQ);
  const __m256i whole = _mm256_cvtps_epi32(min(max(n, Vec(-125.0f)), Vec(252.0f)).v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const auto power = [&](__m256i e) {
    return Vec(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, bias), 23)));
  };
  const Vec scaled = a * power(half) * power(_mm256_sub_epi32(whole, half));
  return Vec(_mm256_and_ps(scaled.v, normal));
}

FL_INLINE Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
FL_INLINE Mask operator<=(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
FL_INLINE Mask operator>(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
FL_INLINE Mask operator>=(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
FL_INLINE Mask operator==(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
FL_INLINE Vec select(Mask m, Vec yes, Vec no) { return _mm256_blendv_ps(no.v, yes.v, m.v); }

FL_INLINE float reduce_add(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
FL_INLINE float reduce_max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

#endif

constexpr int kLanes = Vec::kLanes;

FL_INLINE Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
FL_INLINE Vec operator-(Vec a) { return Vec(-0.0f) - a; }

}  // namespace fl::FL_ISA

#include "common/vec_math.h"
