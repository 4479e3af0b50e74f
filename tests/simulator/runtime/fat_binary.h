// The PTX that nvcc embeds beside the host code of a .cu file.
#pragma once

#include <string_view>
#include <vector>

namespace sim {

struct Image {
  int arch;  // 75, 80, 90
  std::string_view ptx;
};

// `wrapper` is what __cudaRegisterFatBinary receives. Compressed PTX is not read: nvcc has to be
// told --no-compress. Throws std::runtime_error where the layout is not the known one.
std::vector<Image> read_fat_binary(const void* wrapper);

}  // namespace sim
