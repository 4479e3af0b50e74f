// Stochastic rounding of float32 to what a 16-bit dtype can hold: up with the probability that
// makes it right on average. Element n of a tensor takes 16 random bits from Philox4x32-10:
//
//   key     = seed, 64 bits
//   counter = (low and high half of n / 8,  4 * tensor + operand,  offset mod 2^32)
//   slot n % 8, word slot / 2, low half first
// with operand 0 for the parameter, 1 for exp_avg and 2 for exp_avg_sq.
#pragma once

#include <cstdint>

#include "adam/adam_math.h"
#include "common/philox.h"

namespace fl {

struct RoundingStream {
  uint64_t seed;
  uint32_t offset;
  uint32_t counter2;  // 4 * tensor + operand

  FL_ADAM_FN RoundingStream(const AdamStep& step, int64_t tensor, int operand)
      : seed(step.seed),
        offset(step.offset),
        counter2(static_cast<uint32_t>(4 * tensor) + (operand == kParam    ? 0u
                                                      : operand == kExpAvg ? 1u
                                                                           : 2u)) {}
};

FL_ADAM_FN uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

FL_ADAM_FN float bits_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// random: 16 bits. Infinities and NaNs stay.
FL_ADAM_FN float round_to_bfloat16(float x, uint32_t random) {
  const uint32_t bits = float_bits(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? bits_float((bits + random) & 0xffff0000u) : x;
}

// What float16 cannot hold (above its largest number) is left to the ordinary conversion.
FL_ADAM_FN float round_to_float16(float x, uint32_t random) {
  const uint32_t bits = float_bits(x);
  const float magnitude = bits_float(bits & 0x7fffffffu);
  const uint32_t thirteen = random >> 3;
  const float normal = bits_float((bits + thirteen) & 0xffffe000u);
  // Below 2^-14 the spacing is 2^-24 throughout.
  const float units = magnitude * 16777216.0f + static_cast<float>(thirteen) * (1.0f / 8192.0f);
  const float whole = static_cast<float>(static_cast<int32_t>(units < 2048.0f ? units : 0.0f));
  const float tiny = bits_float(float_bits(whole * (1.0f / 16777216.0f)) | (bits & 0x80000000u));
  const float rounded = magnitude < 6.103515625e-5f ? tiny : normal;
  return magnitude < 65504.0f ? rounded : x;
}

}  // namespace fl
