// The tiles of a product's factors on their way from global to shared memory.
#pragma once

#include <type_traits>

#include "linear_act/cuda_product.cuh"
#include "linear_act/params.h"

namespace fl {

constexpr int kGemmThreads = 128, kBlockRows = 128;  // rows of a and rows of b per block

// Where a block's rows of a factor begin. In the gated form 32 rows of the one weight and 32 of the
// other take turns in the tile of b, so that a warp has the columns that belong together.
struct FactorRows {
  int64_t first, rows;  // of the matrix; row `rows` and those behind it are not there
  bool gated;
};

// One thread's share of the tiles of one factor, each kBlockRows rows by kDepth of k, laid out as
// in memory: kDense: rows of kDepth elements, else kDepth rows of kBlockRows elements. Places in
// shared memory are one number, XORs and additions with constants; copies are of 16 bytes.
template <class T_, bool kDense, int kDepth>
class FactorCopy {
  using T = std::conditional_t<std::is_same_v<T_, Tf32>, float, T_>;  // in memory
  static constexpr int kChunk = 16 / sizeof(T);

 public:
  using Tile = std::conditional_t<kDense, SharedTile<T_, kBlockRows, kDepth>,
                                  SharedTile<T_, kDepth, kBlockRows>>;
  static constexpr int kCopies = Tile::kBytes / 16 / kGemmThreads;

  // A thread's first row and chunk of a tile, and where they lie.
  struct Place {
    int row, chunk, half;  // half: the row among the 64 that are copied first, where kDense
    __device__ __forceinline__ explicit Place(uint32_t thread) {
      const int lane = static_cast<int>(thread % 32), warp = static_cast<int>(thread / 32);
      if constexpr (kDense) {
        // Two lanes per row, the rows of eight lanes such that their chunks lie in other banks.
        half = 16 * warp + (Tile::kRowBytes == 128
                                ? (lane & 6) | (lane >> 3 & 1) | (lane >> 1 & 8)
                                : (lane >> 1 & 1) | (lane & 4) | (lane >> 2 & 2) | (lane >> 1 & 8));
        row = (half & 32) * 2 + (half & 31);
        chunk = lane & 1;
      } else {
        half = 0;
        row = static_cast<int>(thread / Tile::kChunks);
        chunk = static_cast<int>(thread % Tile::kChunks);
      }
    }
    __device__ __forceinline__ uint32_t offset() const { return Tile::at(row, chunk); }
  };

  // k_begin: where the first tile begins. second: the factor of the odd rows of 32 where gated.
  __device__ __forceinline__ void aim(const GemmFactor& factor, const GemmFactor& second,
                                      const FactorRows& where, int64_t k_begin, uint32_t thread) {
    const T* data = static_cast<const T*>(factor.data);
    const int64_t stride = factor.stride;
    aligned_ = (address(data) | stride * sizeof(T)) % 16 == 0;
    const Place own(thread);
    if constexpr (kDense) {
      const int64_t last = where.rows - 1;
      const int64_t row0 = where.first + (where.gated ? own.half : own.row);
      const int64_t row1 = where.gated ? row0 : row0 + 32;
      const T* data1 = static_cast<const T*>(where.gated ? second.data : factor.data);
      const int64_t stride1 = where.gated ? second.stride : stride;
      // Rows that are not there are read as the last one: what becomes of them is not stored.
      at_ = address(data + min(row0, last) * stride + k_begin + kChunk * own.chunk);
      at1_ = address(data1 + min(row1, last) * stride1 + k_begin + kChunk * own.chunk);
      aligned_ = aligned_ && (address(data1) | stride1 * sizeof(T)) % 16 == 0;
      whole_ = aligned_;
    } else {
      at_ = address(data + (k_begin + own.row) * stride + where.first + kChunk * own.chunk);
      row_step_ = kRowStep * stride * sizeof(T);
      columns_ = static_cast<int>(min(where.rows - where.first, int64_t{kBlockRows}));
      whole_ = aligned_ && where.first + kBlockRows <= where.rows;
    }
  }

  // Whether tiles of kDepth may be taken by copy(); else by copy_tail().
  __device__ __forceinline__ bool whole() const { return whole_; }

  // The next tile, all of it. place: Place::offset() behind the tile, but for kOffset more.
  template <int kOffset>
  __device__ __forceinline__ void copy(uint32_t place) {
    unrolled<kCopies>([&](auto i) {
      const uint64_t from = source(i);
#if __CUDA_ARCH__ >= 800
      copy_async<kOffset + constant_part(i), source_constant(i)>(
          register_part(place, i), reinterpret_cast<const void*>(from));
#else
      const uint4 bits = *reinterpret_cast<const uint4*>(from + source_constant(i));
      if constexpr (kHolds) {
        held_[i] = bits;
      } else {
        shared_at<uint4>(register_part(place, i) + kOffset + constant_part(i)) = bits;
      }
#endif
    });
    holds_ = kHolds;
  }

  // On to the next tile.
  __device__ __forceinline__ void advance() {
    if constexpr (kDense) {
      at_ += kDepth * sizeof(T);
      at1_ += kDepth * sizeof(T);
    } else {
      at_ += kDepth / kRowStep * row_step_;
    }
  }

  // What copy() took, where it could not be asynchronous.
  __device__ __forceinline__ void deposit(uint32_t place) {
#if __CUDA_ARCH__ < 800
    if constexpr (kHolds) {
      if (!holds_) return;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        shared_at<uint4>(register_part(place, i) + constant_part(i)) = held_[i];
      }
      holds_ = false;
    }
#endif
  }

  // The next tile, of which `depth` (1 to kDepth) are there; the rest is 0.
  __device__ __forceinline__ void copy_tail(uint32_t place, int depth) {
    const Place own(opaque(threadIdx.x));  // which takes no register elsewhere
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i) {
      const int count = min(max(count_of(i, depth, own), 0), kChunk);
      const T* from = reinterpret_cast<const T*>(source(i) + source_constant(i));
      const uint32_t to = register_part(place, i) + constant_part(i);
      copy_chunk(to, from, count, aligned_);
    }
  }

 private:
  // Whether copies wait in registers: float32 has none to spare.
  static constexpr bool kHolds = sizeof(T) == 2;
  static constexpr int kPanels = Tile::kColumns / Tile::kPanel;
  static constexpr int kRowStep = kGemmThreads / Tile::kChunks;

  // Where copy i goes, from where, and how many elements of it are there. Constants stand apart.
  static __device__ __forceinline__ uint32_t register_part(uint32_t place, int i) {
    return kDense ? place ^ (i / 2) << 5 : place;
  }
  static __device__ constexpr int constant_part(int i) {
    return kDense ? i % 2 * 32 * Tile::kRowBytes
                  : i % kPanels * Tile::kPanelBytes + i / kPanels * kRowStep * Tile::kRowBytes;
  }
  __device__ __forceinline__ uint64_t source(int i) const {
    return kDense ? i % 2 ? at1_ : at_ : at_ + i / kPanels * row_step_;
  }
  static __device__ constexpr int source_constant(int i) {  // bytes
    return kDense ? i / 2 * 32 : i % kPanels * Tile::kRowBytes;
  }
  __device__ __forceinline__ int count_of(int i, int depth, const Place& own) const {
    if constexpr (kDense) {
      return depth - kChunk * own.chunk - i / 2 * 2 * kChunk;
    } else {
      return own.row + i / kPanels * kRowStep < depth
                 ? columns_ - kChunk * own.chunk - i % kPanels * Tile::kPanel
                 : 0;
    }
  }
  static __device__ __forceinline__ uint64_t address(const T* data) {
    return reinterpret_cast<uint64_t>(data);
  }
  uint64_t at_, at1_, row_step_;  // addresses and bytes
  int columns_;                   // of a tile, those that are there
  bool aligned_, whole_, holds_ = false;
#if __CUDA_ARCH__ < 800
  uint4 held_[kHolds ? kCopies : 1];
#endif
};

}  // namespace fl
