// What a tensor map (CUtensorMap) says, in an encoding of our own: the GPU's is not public.
#pragma once

#include <array>
#include <cstdint>

namespace sim {

constexpr int kMaxRank = 5;

// 128 bytes, as a kernel's parameter, in global or in shared memory. Dimension 0 is the dense one.
struct TensorMap {
  uint8_t element_type;  // as tensormap.replace numbers them: .u8, .u16, .u32, .s32, .u64, ...
  uint8_t rank;          // dimensions - 1, likewise
  uint8_t interleave, swizzle, fill, swizzle_atomicity;  // swizzle: 0 none, 1 32, 2 64, 3 128 bytes
  uint16_t unused;
  uint64_t address;
  std::array<uint32_t, kMaxRank> sizes;  // elements
  std::array<uint32_t, kMaxRank> box;    // elements
  std::array<uint32_t, kMaxRank> steps;  // element strides of a box
  uint32_t unused_too;
  std::array<uint64_t, kMaxRank - 1> strides;  // bytes, of dimensions 1 and on
  std::array<uint64_t, 2> rest;
};
static_assert(sizeof(TensorMap) == 128);

// 0 where the number is none.
inline uint32_t element_bytes(uint8_t type) {
  constexpr uint8_t kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};
  return type < sizeof kBytes ? kBytes[type] : 0;
}

}  // namespace sim
