// Philox dropout decisions for a row of 64 keys at a time, on AVX2 or AVX-512. Only for cpu_*.cpp.
#pragma once

#include "common/philox.h"
#include "common/simd.h"

namespace fl::FL_ISA {

// One Philox call per 64-bit lane, its four words in the low halves of four registers.
#if defined(__AVX512F__)
struct PhiloxLanes {
  using Reg = __m512i;
  static constexpr int kCalls = 8;
  static FL_INLINE Reg set1(uint32_t x) { return _mm512_set1_epi64(x); }
  static FL_INLINE Reg iota(uint32_t first) {
    return _mm512_add_epi64(set1(first), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static FL_INLINE Reg multiply(Reg a, Reg b) { return _mm512_mul_epu32(a, b); }
  static FL_INLINE Reg high(Reg a) { return _mm512_srli_epi64(a, 32); }
  static FL_INLINE Reg xor3(Reg a, Reg b, Reg c) {
    return _mm512_ternarylogic_epi64(a, b, c, 0x96);
  }
  // Bit 4 l + {0, 1, 2, 3}: are the halves (first low, first high, second low, second high) of lane
  // l kept?
  static FL_INLINE uint32_t kept(Reg first, Reg second, uint32_t threshold) {
    const Reg halves = _mm512_mask_blend_epi32(0xaaaa, first, _mm512_slli_epi64(second, 32));
    return _mm512_cmpge_epu16_mask(halves, _mm512_set1_epi16(static_cast<short>(threshold)));
  }
};
#else
struct PhiloxLanes {
  using Reg = __m256i;
  static constexpr int kCalls = 4;
  static FL_INLINE Reg set1(uint32_t x) { return _mm256_set1_epi64x(x); }
  static FL_INLINE Reg iota(uint32_t first) {
    return _mm256_add_epi64(set1(first), _mm256_setr_epi64x(0, 1, 2, 3));
  }
  static FL_INLINE Reg multiply(Reg a, Reg b) { return _mm256_mul_epu32(a, b); }
  static FL_INLINE Reg high(Reg a) { return _mm256_srli_epi64(a, 32); }
  static FL_INLINE Reg xor3(Reg a, Reg b, Reg c) {
    return _mm256_xor_si256(a, _mm256_xor_si256(b, c));
  }
  static FL_INLINE uint32_t kept(Reg first, Reg second, uint32_t threshold) {
    const Reg halves = _mm256_blend_epi32(first, _mm256_slli_epi64(second, 32), 0xaa);
    const Reg limit = _mm256_set1_epi16(static_cast<short>(threshold));
    const Reg at_least = _mm256_cmpeq_epi16(_mm256_max_epu16(halves, limit), halves);
    return _pext_u32(static_cast<uint32_t>(_mm256_movemask_epi8(at_least)), 0x55555555u);
  }
};
#endif

// Bit t of the result: is key 64 * block + t of query row i in head bh kept?  threshold in [0,
// 65535].
FL_INLINE uint64_t dropout_keep_64(const Dropout& dropout, uint32_t bh, uint32_t i,
                                   uint32_t block) {
  using L = PhiloxLanes;
  uint64_t bits = 0;
  for (int call = 0; call < 8; call += L::kCalls) {
    L::Reg c0 = L::iota(block * 8 + call), c1 = L::set1(i), c2 = L::set1(bh),
           c3 = L::set1(dropout.offset);
    uint32_t k0 = static_cast<uint32_t>(dropout.seed),
             k1 = static_cast<uint32_t>(dropout.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const L::Reg p0 = L::multiply(c0, L::set1(kPhiloxM0)),
                   p1 = L::multiply(c2, L::set1(kPhiloxM1));
      c0 = L::xor3(L::high(p1), c1, L::set1(k0));
      c1 = p1;
      c2 = L::xor3(L::high(p0), c3, L::set1(k1));
      c3 = p0;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    const uint32_t kept01 = L::kept(c0, c1, dropout.threshold);
    const uint32_t kept23 = L::kept(c2, c3, dropout.threshold);
    for (int half = 0; half < 4; ++half) {
      const uint32_t every_fourth = 0x11111111u << half;
      bits |= static_cast<uint64_t>(_pext_u32(kept01, every_fourth)) << (8 * half + call);
      bits |= static_cast<uint64_t>(_pext_u32(kept23, every_fourth)) << (32 + 8 * half + call);
    }
  }
  return bits;
}

}  // namespace fl::FL_ISA
