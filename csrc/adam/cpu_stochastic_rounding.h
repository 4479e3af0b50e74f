// Stochastic rounding of a block of float32, in place. Only for cpu_*.cpp.
#pragma once

#include "adam/stochastic_rounding.h"
#include "common/philox_simd.h"

namespace fl::FL_ISA {

// The 16 random bits of elements begin .. begin + count, in `out`; begin is a multiple of 64.
// Writes up to the next multiple of 64.
inline void random_bits(const RoundingStream& stream, int64_t begin, int64_t count, uint16_t* out) {
  using L = PhiloxLanes;
  for (int64_t n = 0; n < count; n += 8 * L::kCalls) {
    const uint64_t call = static_cast<uint64_t>(begin + n) / 8;
    L::Reg c0 = L::iota(static_cast<uint32_t>(call));
    L::Reg c1 = L::set1(static_cast<uint32_t>(call >> 32));
    L::Reg c2 = L::set1(stream.counter2), c3 = L::set1(stream.offset);
    uint32_t k0 = static_cast<uint32_t>(stream.seed);
    uint32_t k1 = static_cast<uint32_t>(stream.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const L::Reg p0 = L::multiply(c0, L::set1(kPhiloxM0));
      const L::Reg p1 = L::multiply(c2, L::set1(kPhiloxM1));
      c0 = L::xor3(L::high(p1), c1, L::set1(k0));
      c1 = p1;
      c2 = L::xor3(L::high(p0), c3, L::set1(k1));
      c3 = p0;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    const L::Reg words[4] = {c0, c1, c2, c3};
    alignas(64) uint32_t lanes[4][2 * L::kCalls];  // each word in the low half of 64 bits
    __builtin_memcpy(lanes, words, sizeof lanes);
    for (int c = 0; c < L::kCalls; ++c) {
      for (int w = 0; w < 4; ++w) {
        __builtin_memcpy(out + n + 8 * c + 2 * w, &lanes[w][2 * c], sizeof(uint32_t));
      }
    }
  }
}

// count <= 1024
inline void round_block(DType dtype, const RoundingStream& stream, int64_t begin, int64_t count,
                        float* block) {
  alignas(64) uint16_t random[1024];
  random_bits(stream, begin, count, random);
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < count; ++i) block[i] = round_to_bfloat16(block[i], random[i]);
  } else if (dtype == DType::kFloat16) {
    for (int64_t i = 0; i < count; ++i) block[i] = round_to_float16(block[i], random[i]);
  }
}

}  // namespace fl::FL_ISA
