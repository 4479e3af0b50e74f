// Conversions between number formats, and arithmetic with a rounding mode, on plain integers and
// floats: loops over them vectorise.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace sim {

enum class Round : uint8_t { kNearest, kZero, kDown, kUp, kAway };

inline uint32_t bits_of_f32(float x) { return std::bit_cast<uint32_t>(x); }
inline float f32_of_bits(uint32_t x) { return std::bit_cast<float>(x); }

inline float flush(float x) {
  return f32_of_bits((bits_of_f32(x) & 0x7f800000u) ? bits_of_f32(x)
                                                    : bits_of_f32(x) & 0x80000000u);
}

inline float f16_to_f32(uint32_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
  // Subnormals come out of the multiplication right; infinities and NaN get their exponent.
  const float scaled = f32_of_bits(rest << 13) * 0x1p112f;
  const uint32_t special = rest >= 0x7c00u ? 0x7f800000u : 0;
  return f32_of_bits(sign | bits_of_f32(scaled) | special);
}

inline float bf16_to_f32(uint32_t b) { return f32_of_bits(b << 16); }

inline uint32_t f32_to_bf16(float x) {
  const uint32_t u = bits_of_f32(x);
  const uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1)) >> 16;
  return (u & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded;
}

inline uint32_t f32_to_f16(float x) {
  const uint32_t u = bits_of_f32(x), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
  const uint32_t normal = (a + 0xfffu + (a >> 13 & 1) - (112u << 23)) >> 13;
  // Below 2^-14 the float addition itself rounds to a multiple of 2^-24.
  const uint32_t small = bits_of_f32(f32_of_bits(a) + 0.5f) - 0x3f000000u;
  uint32_t h = a < 0x38800000u ? small : normal;
  h = a >= 0x477ff000u ? 0x7c00u : h;
  h = a > 0x7f800000u ? 0x7fffu : h;
  return a > 0x7f800000u ? 0x7fffu : sign | h;
}

// A format with `exponent` and `mantissa` bits inside 32: f16 (5, 10), bf16 (8, 7), tf32 (8, 10).
struct Format {
  int exponent, mantissa;
};
constexpr Format kF16{5, 10}, kBf16{8, 7}, kTf32{8, 10}, kE4m3{4, 3}, kE5m2{5, 2};

// x rounded to `format`, as a double: the value, not the bits. Overflow goes to infinity, or to the
// largest number where the mode says so.
inline double round_to(double x, Format format, Round mode) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int bias = (1 << (format.exponent - 1)) - 1;
  const int exponent = std::max(std::ilogb(x), 1 - bias);
  const double unit = std::ldexp(1.0, exponent - format.mantissa);
  const double scaled = x / unit;  // exact: a power of two
  double whole;
  switch (mode) {
    case Round::kZero:
      whole = std::trunc(scaled);
      break;
    case Round::kDown:
      whole = std::floor(scaled);
      break;
    case Round::kUp:
      whole = std::ceil(scaled);
      break;
    case Round::kAway:
      whole = std::round(scaled);
      break;
    default:
      whole = std::nearbyint(scaled);
  }
  const double largest = std::ldexp(2.0 - std::ldexp(1.0, -format.mantissa), bias);
  const double value = whole * unit;
  if (std::fabs(value) <= largest) return std::copysign(value, x);
  const bool stays =
      mode == Round::kZero || (mode == Round::kDown && x > 0) || (mode == Round::kUp && x < 0);
  return std::copysign(stays ? largest : std::numeric_limits<double>::infinity(), x);
}

// The bits of a value that `format` holds exactly.
inline uint32_t encode(double x, Format format) {
  const int width = format.exponent + format.mantissa;
  const uint32_t sign = std::signbit(x) ? 1u << width : 0;
  const uint32_t top = ((1u << format.exponent) - 1) << format.mantissa;
  if (std::isnan(x)) return (1u << width) - 1;
  if (std::isinf(x)) return sign | top;
  if (x == 0) return sign;
  const int bias = (1 << (format.exponent - 1)) - 1;
  const int exponent = std::ilogb(x);
  const double a = std::fabs(x);
  if (exponent < 1 - bias) {
    return sign | static_cast<uint32_t>(std::ldexp(a, bias - 1 + format.mantissa));
  }
  const auto fraction = static_cast<uint32_t>(std::ldexp(a, format.mantissa - exponent));
  return sign | ((static_cast<uint32_t>(exponent + bias - 1) << format.mantissa) + fraction);
}

// 8-bit floats. e4m3 has no infinity: 0x7f is NaN, 448 the largest.
inline float e4m3_to_f32(uint32_t x) {
  const uint32_t rest = x & 0x7f;
  const float sign = x & 0x80 ? -1.0f : 1.0f;
  if (rest == 0x7f) return std::numeric_limits<float>::quiet_NaN();
  const int exponent = static_cast<int>(rest >> 3);
  const float fraction = static_cast<float>(rest & 7) / 8;
  return sign * (exponent ? std::ldexp(1 + fraction, exponent - 7) : std::ldexp(fraction, -6));
}
inline float e5m2_to_f32(uint32_t x) { return f16_to_f32(x << 8); }

inline uint32_t f32_to_e4m3_saturated(float x) {
  if (std::isnan(x)) return 0x7f;
  const double clamped = std::fmin(std::fabs(static_cast<double>(x)), 448.0);
  // The exponent field reaches one higher than in a format with infinities.
  const int exponent = clamped == 0 ? -6 : std::max(std::ilogb(clamped), -6);
  const double unit = std::ldexp(1.0, exponent - 3);
  const double value = std::fmin(std::nearbyint(clamped / unit) * unit, 448.0);
  const uint32_t sign = std::signbit(x) ? 0x80 : 0;
  if (value == 0) return sign;
  const int e = std::ilogb(value);
  if (e < -6) return sign | static_cast<uint32_t>(std::ldexp(value, 9));
  return sign |
         ((static_cast<uint32_t>(e + 6) << 3) + static_cast<uint32_t>(std::ldexp(value, 3 - e)));
}
inline uint32_t f32_to_e5m2_saturated(float x) {
  if (std::isnan(x)) return 0x7f;
  const double clamped = std::fmin(std::fmax(static_cast<double>(x), -57344.0), 57344.0);
  return encode(round_to(clamped, kE5m2, Round::kNearest), kE5m2);
}

// The sum of two doubles rounded to odd: inexact results get an odd last bit, so that a second
// rounding to fewer bits comes out as if it were the only one. Boldo & Melquiond 2008.
inline double made_odd(double x, double error) {  // error: of what is exact, minus x
  const bool exact = !(error > 0 || error < 0);   // NaN: of an infinite operand
  if (exact || !std::isfinite(x) || (std::bit_cast<uint64_t>(x) & 1)) return x;
  const bool away = (error > 0) == (x > 0);
  return std::bit_cast<double>(std::bit_cast<uint64_t>(x) + (away ? 1 : -1));
}

inline double odd_sum(double a, double b) {
  const double sum = a + b;
  const double back = sum - a;
  return made_odd(sum, (a - (sum - back)) + (b - back));
}

inline double odd_fma(double a, double b, double c) {  // a * b has to be exact in double
  return odd_sum(a * b, c);
}

inline float to_f32(double x, Round mode) {
  const float nearest = static_cast<float>(x);
  if (mode == Round::kNearest || std::isnan(x)) return nearest;
  const double back = nearest;
  if (back == x) return nearest;
  const bool down = mode == Round::kDown || (mode == Round::kZero && x > 0);
  if (down && back > x) return std::nextafter(nearest, -std::numeric_limits<float>::infinity());
  if (!down && back < x) return std::nextafter(nearest, std::numeric_limits<float>::infinity());
  return nearest;
}

}  // namespace sim
