// Dropout decisions from the counter-based generator Philox4x32-10 (Salmon et al. 2011, "Parallel
// random numbers: as easy as 1, 2, 3"), the same on every backend: one seed gives one mask
// everywhere.
//
// key     = seed, 64 bits
// counter = ((j / 64) * 8 + j % 8,  i,  b * heads + h,  offset mod 2^32)
// The decision for key position j takes 16 of the 128 bits: slot (j / 8) % 8, word slot / 2, low
// half first. An element is kept where its 16 bits are >= threshold, threshold = round(p * 65536),
// and then scaled by 65536 / (65536 - threshold).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FL_PHILOX_FN __host__ __device__ __forceinline__
#else
#define FL_PHILOX_FN inline
#endif

namespace fl {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;

struct Dropout {
  uint64_t seed;
  uint32_t offset;
  uint32_t threshold;  // 0: dropout is off; 65536: everything is dropped

  FL_PHILOX_FN bool enabled() const { return threshold != 0; }
  FL_PHILOX_FN float scale() const {
    return threshold >= 65536 ? 0.0f : 65536.0f / (65536.0f - threshold);
  }
};

inline uint32_t dropout_threshold(double p) { return static_cast<uint32_t>(p * 65536.0 + 0.5); }

struct PhiloxWords {
  uint32_t word[4];
};

FL_PHILOX_FN PhiloxWords philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                       uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0;
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fl
