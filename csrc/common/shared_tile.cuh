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
    constexpr int kSteps = kPanel / 16;
    return (lane_address ^ (step % kSteps) << 5) + step / kSteps * kPanelBytes + row * kRowBytes;
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

// Rows of a matrix in global memory: how they can be read.
template <class T>
struct RowReader {
  const T* data;   // row 0
  int64_t stride;  // elements between rows
  int rows;        // those from here on are zero
  int columns;     // likewise
  bool aligned;    // every row begins at a multiple of 16 bytes

  // Eight columns to shared memory: by an asynchronous copy, or one by one.
  __device__ __forceinline__ void copy(uint32_t to, int row, int column) const {
    const int count = row < rows ? min(max(columns - column, 0), 8) : 0;
    const T* from = data + (count > 0 ? row * stride + column : 0);
    bool whole = aligned;
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
};

// The tile's rows from `row` of the matrix on, by kThreads threads.
template <class Tile, int kThreads, class T>
__device__ __forceinline__ void copy_tile(uint32_t tile, const RowReader<T>& from, int row,
                                          int thread) {
  constexpr int kChunksPerRow = Tile::kColumns / 8;
  constexpr int kTurns = Tile::kRows * kChunksPerRow / kThreads;
  static_assert(Tile::kRows * kChunksPerRow % kThreads == 0);
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int index = turn * kThreads + thread;
    const int r = index / kChunksPerRow, chunk = index % kChunksPerRow;
    from.copy(tile + Tile::at(r, chunk), row + r, 8 * chunk);
  }
}

}  // namespace fl
