#include "fat_binary.h"

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace sim {
namespace {

// Layouts as nvcc 12 and 13 write them.
struct Wrapper {
  uint32_t magic, version;
  const char* data;
  void* unused;
};

struct Header {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;  // of all entries
};

struct Entry {
  uint16_t kind, version;
  uint32_t header_bytes;
  uint64_t bytes;
  uint32_t compressed_bytes, options;
  uint16_t minor, major;
  uint32_t arch;
};

constexpr uint32_t kWrapperMagic = 0x466243B1, kMagic = 0xBA55ED50;
constexpr uint16_t kPtx = 1;

template <class T>
T read(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

}  // namespace

std::vector<Image> read_fat_binary(const void* wrapper) {
  const auto outer = read<Wrapper>(static_cast<const char*>(wrapper));
  if (outer.magic != kWrapperMagic) throw std::runtime_error("no fat binary");
  const auto header = read<Header>(outer.data);
  if (header.magic != kMagic) throw std::runtime_error("a fat binary of an unknown layout");
  std::vector<Image> images;
  const char* at = outer.data + header.header_bytes;
  const char* end = at + header.bytes;
  while (at < end) {
    const auto entry = read<Entry>(at);
    const std::string_view text(at + entry.header_bytes, entry.bytes);
    if (entry.kind == kPtx) {
      if (text.find(".version") == text.npos) {
        throw std::runtime_error("the PTX is compressed: nvcc needs --no-compress");
      }
      images.push_back({static_cast<int>(entry.arch), text.substr(0, text.find('\0'))});
    }
    at += entry.header_bytes + entry.bytes;
  }
  return images;
}

}  // namespace sim
