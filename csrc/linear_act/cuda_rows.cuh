// How the passes over rows and columns share them out: a block takes kPassRows rows of a strip of
// columns, each lane of a warp one chunk of 16 bytes, each warp every eighth row.
#pragma once

#include "linear_act/cuda_chunk.cuh"

namespace fl {

constexpr int kPassWarps = 8, kPassThreads = 32 * kPassWarps, kPassRows = 64;

template <class T>
struct Strip {
  static constexpr int kChunk = 16 / sizeof(T), kColumns = 32 * kChunk;
  int64_t number, part, strips;  // which strip, and which rows of it
  int64_t column, first_row, end_row;
  int lane, warp, count;  // of the chunk's columns, those that are there

  __device__ __forceinline__ Strip(int64_t rows, int64_t cols) {
    strips = (cols + kColumns - 1) / kColumns;
    number = blockIdx.x % strips;
    part = blockIdx.x / strips;
    lane = static_cast<int>(threadIdx.x % 32);
    warp = static_cast<int>(threadIdx.x / 32);
    column = number * kColumns + lane * kChunk;
    first_row = part * kPassRows + warp;
    end_row = min(rows, (part + 1) * kPassRows);
    count = static_cast<int>(max(min(cols - column, int64_t{kChunk}), int64_t{0}));
  }
};

// How many parts the rows make, and how many blocks it takes.
inline int64_t pass_parts(int64_t rows) { return (rows + kPassRows - 1) / kPassRows; }
template <class T>
int64_t pass_strips(int64_t cols) {
  return (cols + Strip<T>::kColumns - 1) / Strip<T>::kColumns;
}

}  // namespace fl
