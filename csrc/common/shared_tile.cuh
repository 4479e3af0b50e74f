// A tile of rows of 16-bit numbers in shared memory, laid out so that ldmatrix, 16-byte copies and
// the stores of accumulators are all free of bank conflicts.
//
// Columns come in panels of 64 (or 32): panel, row, then 16-byte chunks, whose place within the row
// is XORed with the row's number, as in CUTLASS's Swizzle<3, 3, 3> (Swizzle<2, 3, 3>).
#pragma once

#include "common/tensor_core.cuh"

namespace fl {

template <int kRows_, int kColumns_>
struct SharedTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kPanel = kColumns % 64 == 0 ? 64 : 32;
  static constexpr int kRowBytes = 2 * kPanel, kChunks = kPanel / 8;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = 2 * kRows * kColumns;
  static_assert(kColumns % 32 == 0 && kRows % 8 == 0);

  // Bytes from the tile's start to 8 columns of a row.
  static __device__ __forceinline__ uint32_t at(int row, int chunk) {
    const int swizzle = kPanel == 64 ? row & 7 : row >> 1 & 3;
    return chunk / kChunks * kPanelBytes + row * kRowBytes + (chunk % kChunks ^ swizzle) * 16;
  }

  // Fragments of 16 columns (number `step`) and 16 rows from `row` on. The lane's own address is
  // computed once, by lane_a, lane_b or lane_transposed; what comes then is one XOR and immediates.
  static __device__ __forceinline__ uint32_t step_of(uint32_t lane_address, int step, int row) {
    return turned(lane_address, step) + row_offset(step, row);
  }
  // The two parts of it: the one that takes a register, and the constant.
  static __device__ __forceinline__ uint32_t turned(uint32_t lane_address, int step) {
    return lane_address ^ (step % (kPanel / 16)) << 5;
  }
  static __device__ constexpr int row_offset(int step, int row) {
    return step / (kPanel / 16) * kPanelBytes + row * kRowBytes;
  }

  // a: rows x depth. Matrices in the order of FragmentA.
  static __device__ __forceinline__ uint32_t lane_a(uint32_t tile, int lane) {
    return tile + at(lane & 15, lane >> 4);
  }
  // b, its columns being the tile's rows, two times 8 of them: b0, b1 of the first, of the second.
  static __device__ __forceinline__ uint32_t lane_b(uint32_t tile, int lane) {
    return tile + at((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
  }
  // b, its depth being the tile's rows: the same order, transposed on the way.
  static __device__ __forceinline__ uint32_t lane_transposed(uint32_t tile, int lane) {
    return tile + at(lane & 15, lane >> 4);
  }
};

// Rows of a matrix in global memory, on their way into one shared tile after the other: what one of
// kThreads threads copies. It has one chunk of a panel and every kStep-th row; where it puts them
// differs by constants.
template <class Tile, int kThreads, class T>
class TileCopy {
  static constexpr int kStep = kThreads / Tile::kChunks, kPanels = Tile::kColumns / Tile::kPanel;
  static_assert(Tile::kRows % kStep == 0 && kStep % 8 == 0);

 public:
  // Rows from `rows` and columns from `columns` on are zero; the first tile begins with row `row`.
  __device__ __forceinline__ TileCopy(uint32_t tile, const T* data, int64_t stride, int row,
                                      int rows, int columns, int thread)
      : step_(kStep * stride), row_(row), rows_(rows), columns_(columns) {
    thread_row_ = thread / Tile::kChunks;
    chunk_ = thread % Tile::kChunks;
    to_ = tile + Tile::at(thread_row_, chunk_);
    at_ = data + (row + thread_row_) * stride + 8 * chunk_;
    aligned_ = (reinterpret_cast<uintptr_t>(data) | stride * sizeof(T)) % 16 == 0;
    whole_rows_ = aligned_ && columns == Tile::kColumns ? rows : 0;
  }

  // The next tile.
  __device__ __forceinline__ void next() {
    row_ += Tile::kRows;
    if (row_ > whole_rows_) return copy_tail();
#pragma unroll
    for (int r = 0; r < Tile::kRows; r += kStep) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        copy_async(to_ + panel * Tile::kPanelBytes + r * Tile::kRowBytes,
                   at_ + panel * Tile::kPanel, 16);
      }
      at_ += step_;
    }
  }

 private:
  __device__ __forceinline__ void copy_tail() {
    for (int r = 0; r < Tile::kRows; r += kStep) {
      const bool inside = row_ - Tile::kRows + thread_row_ + r < rows_;
      for (int panel = 0; panel < kPanels; ++panel) {
        const int left = columns_ - panel * Tile::kPanel - 8 * chunk_;
        copy_chunk(to_ + panel * Tile::kPanelBytes + r * Tile::kRowBytes,
                   at_ + panel * Tile::kPanel, inside ? min(max(left, 0), 8) : 0);
      }
      at_ += step_;
    }
  }

  // `count` of eight columns: by an asynchronous copy, or one by one.
  __device__ __forceinline__ void copy_chunk(uint32_t to, const T* from, int count) const {
    bool whole = aligned_;
#if __CUDA_ARCH__ < 800
    whole = whole && (count == 8 || count == 0);
#endif
    if (whole) return copy_async(to, from, 2 * count);
    T values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = i < count ? from[i] : T(0.0f);
    const uint4 bits = *reinterpret_cast<const uint4*>(values);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(bits.x), "r"(bits.y),
                 "r"(bits.z), "r"(bits.w));
  }

  const T* at_;
  int64_t step_;
  uint32_t to_;
  int row_, rows_, columns_, whole_rows_, thread_row_, chunk_;
  bool aligned_;
};

}  // namespace fl
