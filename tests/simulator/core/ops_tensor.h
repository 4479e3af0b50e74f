// What the tensor-core families share: the formats of elements, and one m16n8 tile's product.
//
// Products are exact. Sums in float32 are cut off as hardware cuts them off, which bends long sums
// towards zero; other sums are doubles, rounded once.
#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "numbers.h"
#include "program.h"
#include "warp.h"

namespace sim {

void add_mma(Decoders*);
void add_ldmatrix(Decoders*);
void add_wgmma(Decoders*);

// .aligned: every lane of the warp executes the instruction.
inline void need_whole_warp(uint32_t mask) {
  if (mask == kAll) return;
  fault(Kind::kDivergence, first_lane(~mask), "a lane is absent, all 32 have to be there");
}

// The elements of A and B: bytes of one, and its value from the low bits of a word.
struct F16 {
  static constexpr int kBytes = 2;
  static double value(uint32_t word) { return f16_to_f32(word & 0xffff); }
};
struct Bf16 {
  static constexpr int kBytes = 2;
  static double value(uint32_t word) { return bf16_to_f32(word & 0xffff); }
};
struct Tf32 {  // a float whose last 13 bits do not count
  static constexpr int kBytes = 4;
  static double value(uint32_t word) { return f32_of_bits(word & 0xffffe000u); }
};
struct E4m3 {
  static constexpr int kBytes = 1;
  static double value(uint32_t word) {
    static const std::array<double, 256> table = [] {
      std::array<double, 256> values;
      for (uint32_t i = 0; i < 256; ++i) values[i] = e4m3_to_f32(i);
      return values;
    }();
    return table[word & 0xff];
  }
};
struct E5m2 {
  static constexpr int kBytes = 1;
  static double value(uint32_t word) { return e5m2_to_f32(word & 0xff); }
};
struct S8 {
  static constexpr int kBytes = 1;
  static double value(uint32_t word) { return static_cast<int8_t>(word & 0xff); }
};
struct U8 {
  static constexpr int kBytes = 1;
  static double value(uint32_t word) { return word & 0xff; }
};

template <int K>
using TileA = double[16][K];
template <int K>
using TileB = double[K][8];
using TileC = double[16][8];

using Row = double __attribute__((vector_size(64)));  // of 8 columns

// c += a b
template <int K>
inline void multiply_exactly(const TileA<K>& a, const TileB<K>& b, TileC& c) {
  constexpr int kRows = 4;  // at a time: independent sums hide the latency of additions
  for (int m = 0; m < 16; m += kRows) {
    Row sum[kRows] = {}, line;
    for (int k = 0; k < K; ++k) {
      std::memcpy(&line, b[k], sizeof line);
      for (int r = 0; r < kRows; ++r) sum[r] += a[m + r][k] * line;
    }
    for (int r = 0; r < kRows; ++r) {
      for (int n = 0; n < 8; ++n) c[m + r][n] += sum[r][n];
    }
  }
}

// As many columns as the CPU takes at once.
#if defined(__AVX512F__)
constexpr int kColumns = 8;
#else
constexpr int kColumns = 4;
#endif
using Columns = double __attribute__((vector_size(8 * kColumns)));
using Bits = int64_t __attribute__((vector_size(8 * kColumns)));

// Of doubles: 2^exponent, infinity where they are not finite, 0 of 0.
inline Columns leading(Columns x) {
  return reinterpret_cast<Columns>(reinterpret_cast<Bits>(x) & 0x7ff0000000000000);
}
inline Columns cut_to_float(Columns x) {
  return reinterpret_cast<Columns>(reinterpret_cast<Bits>(x) & ~((int64_t{1} << 29) - 1));
}
inline Columns toward_zero(Columns x) {
#if defined(__AVX512F__)
  return _mm512_roundscale_pd(x, _MM_FROUND_TO_ZERO);
#elif defined(__AVX__)
  return _mm256_round_pd(x, _MM_FROUND_TO_ZERO);
#else
  for (int n = 0; n < kColumns; ++n) x[n] = std::trunc(x[n]);
  return x;
#endif
}
inline Columns splat(double x) { return Columns{} + x; }

// Bits after the point of the largest term that a sum keeps: one more than float32 has. On purpose
// fewer than a real GPU was seen to keep: an H100 has another, and takes all of k at once in
// mma.sync. See also Fasi, Higham, Mikaitis, Pranesh 2021, "Numerical behavior of NVIDIA tensor
// cores", PeerJ Computer Science 7:e330.
constexpr int64_t kKeptBits = 24;

// sum + products in float32: aligned to the largest exponent among them, cut off, and added; the
// result is cut off to a float. top: that exponent as 2^exponent.
template <int kCount>
inline Columns add_cutting(Columns sum, const Columns (&products)[kCount], Columns top) {
  constexpr int64_t kOne = int64_t{1} << 52;  // in an exponent
  const Bits exponent = reinterpret_cast<Bits>(top);
  const auto unit = reinterpret_cast<Columns>(exponent - kKeptBits * kOne);
  const auto per_unit = reinterpret_cast<Columns>((2046 + kKeptBits) * kOne - exponent);
  Columns units = toward_zero(sum * per_unit);
  for (const Columns& term : products) units += toward_zero(term * per_unit);
  const Columns cut = cut_to_float(units * unit);
  const Bits endless = ~(top < splat(std::numeric_limits<double>::infinity()));
  int64_t any = 0;
  for (int n = 0; n < kColumns; ++n) any |= endless[n];
  if (!any) return cut;
  for (const Columns& term : products) sum += term;
  return endless ? sum : cut;
}

// c += a b in float32, kBlock products and c at a time.
template <int K, int kBlock>
inline void multiply_cutting(const TileA<K>& a, const TileB<K>& b, TileC& c) {
  for (int n = 0; n < 8; n += kColumns) {
    Columns lines[K], exponents[K];
    for (int k = 0; k < K; ++k) {
      std::memcpy(&lines[k], b[k] + n, sizeof lines[k]);
      exponents[k] = leading(lines[k]);
    }
    for (int m = 0; m < 16; ++m) {
      Columns sum;
      std::memcpy(&sum, c[m] + n, sizeof sum);
      for (int k0 = 0; k0 < K; k0 += kBlock) {
        Columns top = leading(sum), products[kBlock];
        top = top > splat(0x1p-900) ? top : splat(0x1p-900);
        for (int k = 0; k < kBlock; ++k) {
          const Columns x = splat(a[m][k0 + k]);
          products[k] = x * lines[k0 + k];
          const Columns exponent = leading(x) * exponents[k0 + k];
          top = exponent <= top ? top : exponent;  // NaN of infinity times 0, too
        }
        sum = add_cutting(sum, products, top);
      }
      std::memcpy(c[m] + n, &sum, sizeof sum);
    }
  }
}

template <int kBytes>
using Element =
    std::conditional_t<kBytes == 1, uint8_t, std::conditional_t<kBytes == 2, uint16_t, uint32_t>>;

// A fragment in registers: lane 4 g + t holds, per 32-bit register, neighbours in k from row g or
// g + 8. a0, a1: rows g, g + 8 of the first half of k; a2, a3: of the second. PTX ISA, "Matrix
// Fragments for mma.m16n8k16" and the other shapes, which differ only in elements per register. The
// 32 words of one register are therefore 8 rows of 16 bytes, one after the other.
template <class T, int K>
inline void read_a(Warp& w, const Ref* refs, TileA<K>& a) {
  constexpr int kHalf = 16 / T::kBytes;
  for (int r = 0; r < 2 * K / kHalf; ++r) {
    const auto* from = w.lanes<Element<T::kBytes>>(refs[r]);
    for (int g = 0; g < 8; ++g) {
      double* row = a[g + 8 * (r % 2)] + r / 2 * kHalf;
      for (int e = 0; e < kHalf; ++e) row[e] = T::value(from[g * kHalf + e]);
    }
  }
}

// B likewise: column g, b0 the first half of k, b1 the second.
template <class T, int K>
inline void read_b(Warp& w, const Ref* refs, TileB<K>& b) {
  constexpr int kHalf = 16 / T::kBytes;
  for (int r = 0; r < K / kHalf; ++r) {
    const auto* from = w.lanes<Element<T::kBytes>>(refs[r]);
    Element<T::kBytes> turned[kHalf][8];
    for (int g = 0; g < 8; ++g) {
      for (int e = 0; e < kHalf; ++e) turned[e][g] = from[g * kHalf + e];
    }
    for (int e = 0; e < kHalf; ++e) {
      for (int g = 0; g < 8; ++g) b[r * kHalf + e][g] = T::value(turned[e][g]);
    }
  }
}

struct ExactSum {
  template <int K, int kBlock>
  static void multiply(const TileA<K>& a, const TileB<K>& b, TileC& c) {
    multiply_exactly<K>(a, b, c);
  }
};

// Accumulators: lane 4 g + t holds columns 2 t, 2 t + 1 of row g, then of row g + 8.
struct SumF32 {
  static constexpr int kRegisters = 4;
  template <int K, int kBlock>
  static void multiply(const TileA<K>& a, const TileB<K>& b, TileC& c) {
    multiply_cutting<K, kBlock>(a, b, c);
  }
  static void read(Warp& w, const Ref* refs, TileC& c) {
    for (int r = 0; r < 4; r += 2) {
      const float *even = w.lanes<float>(refs[r]), *odd = w.lanes<float>(refs[r + 1]);
      for (int g = 0; g < 8; ++g) {
        double* row = c[g + 4 * r];
        for (int t = 0; t < 4; ++t) {
          row[2 * t] = even[4 * g + t];
          row[2 * t + 1] = odd[4 * g + t];
        }
      }
    }
  }
  static void write(Warp& w, const Ref* refs, const TileC& c, bool) {
    for (int r = 0; r < 4; r += 2) {
      float *even = w.lanes<float>(refs[r]), *odd = w.lanes<float>(refs[r + 1]);
      for (int g = 0; g < 8; ++g) {
        const double* row = c[g + 4 * r];
        for (int t = 0; t < 4; ++t) {
          even[4 * g + t] = static_cast<float>(row[2 * t]);
          odd[4 * g + t] = static_cast<float>(row[2 * t + 1]);
        }
      }
    }
  }
};

// Rounded once: the float between is odd where it is not exact.
inline uint32_t f64_to_f16(double x) {
  const float nearest = static_cast<float>(x);
  uint32_t bits = bits_of_f32(nearest);
  if (std::isfinite(nearest) && nearest != x && !(bits & 1)) {
    bits += std::fabs(x) > std::fabs(nearest) ? 1 : -1u;
  }
  return f32_to_f16(f32_of_bits(bits));
}

struct SumF16 : ExactSum {
  static constexpr int kRegisters = 2;
  static void read(Warp& w, const Ref* refs, TileC& c) {
    for (int r = 0; r < 2; ++r) {
      const uint32_t* words = w.lanes<uint32_t>(refs[r]);
      for (int lane = 0; lane < kLanes; ++lane) {
        double* pair = c[lane / 4 + 8 * r] + lane % 4 * 2;
        pair[0] = f16_to_f32(words[lane] & 0xffff);
        pair[1] = f16_to_f32(words[lane] >> 16);
      }
    }
  }
  static void write(Warp& w, const Ref* refs, const TileC& c, bool) {
    for (int r = 0; r < 2; ++r) {
      uint32_t* words = w.lanes<uint32_t>(refs[r]);
      for (int lane = 0; lane < kLanes; ++lane) {
        const double* pair = c[lane / 4 + 8 * r] + lane % 4 * 2;
        words[lane] = f64_to_f16(pair[0]) | f64_to_f16(pair[1]) << 16;
      }
    }
  }
};

// Integers wrap, or stay in range with .satfinite; a double holds every sum exactly.
struct SumS32 : ExactSum {
  static constexpr int kRegisters = 4;
  static void read(Warp& w, const Ref* refs, TileC& c) {
    for (int r = 0; r < 4; ++r) {
      const int32_t* words = w.lanes<int32_t>(refs[r]);
      for (int lane = 0; lane < kLanes; ++lane) {
        c[lane / 4 + 8 * (r / 2)][lane % 4 * 2 + r % 2] = words[lane];
      }
    }
  }
  static void write(Warp& w, const Ref* refs, const TileC& c, bool saturate) {
    for (int r = 0; r < 4; ++r) {
      uint32_t* words = w.lanes<uint32_t>(refs[r]);
      for (int lane = 0; lane < kLanes; ++lane) {
        double value = c[lane / 4 + 8 * (r / 2)][lane % 4 * 2 + r % 2];
        if (saturate) value = std::fmin(std::fmax(value, -0x1p31), 0x1p31 - 1);
        words[lane] = static_cast<uint32_t>(static_cast<int64_t>(value));
      }
    }
  }
};

}  // namespace sim
