// The three storage types. Half and BFloat16 are bit patterns: arithmetic is always float32.
#pragma once

#include <cstdint>

namespace fl {

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

}  // namespace fl
