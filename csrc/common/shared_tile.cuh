// A tile of rows in shared memory, laid out so that ldmatrix, 16-byte copies, plain loads along and
// across rows, and the stores of accumulators are all free of bank conflicts; and the loads of
// fragments from it.
//
// Columns come in panels of 128 (or 64) bytes: panel, row, then 16-byte chunks, whose place within
// the row is XORed with a linear function of the row's number.
#pragma once

#include "common/copy_async.cuh"
#include "common/tensor_core.cuh"

namespace fl {

template <class T, int kRows_, int kColumns_>
struct SharedTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kSize = sizeof(T);
  static constexpr int kPanel = kColumns * kSize % 128 == 0 ? 128 / kSize : 64 / kSize;  // columns
  static constexpr int kRowBytes = kSize * kPanel, kChunks = kRowBytes / 16;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kSize * kRows * kColumns;
  static_assert(kColumns * kSize % 64 == 0 && kRows % 8 == 0);

  // Of the 8 rows that share the banks, no two have the same value; 32-bit numbers also need rows t
  // and, in panels of 128 bytes, rows 2t, t < 4, to differ above the last bit, because their
  // columns are two chunks wide.
  static __host__ __device__ constexpr int swizzle(int row) {
    if (kRowBytes == 64) return row & 2 | row >> 2 & 1;
    return kSize == 2 ? row & 7 : (row >> 2 & 1) * 5 ^ (row & 2) ^ (row & 1) << 2;
  }

  // Bytes from the tile's start to a chunk of a row.
  static __device__ __forceinline__ uint32_t at(int row, int chunk) {
    return chunk / kChunks * kPanelBytes + row * kRowBytes + (chunk % kChunks ^ swizzle(row)) * 16;
  }

  // From a lane's own address to that of `row` rows and `chunk` chunks further on, both known when
  // compiled: an XOR and immediates. A lane's own row and chunk have no bit in common with them.
  static __device__ __forceinline__ uint32_t moved(uint32_t lane_address, int row, int chunk) {
    return (lane_address ^ (chunk % kChunks ^ swizzle(row)) << 4) + chunk / kChunks * kPanelBytes +
           row * kRowBytes;
  }

  // The lane's own addresses, computed once per tile, for the loads and stores below. `tile` is a
  // multiple of 128, and so are the bytes of rows that may have been added to it.
  static __device__ __forceinline__ uint32_t lane_a(uint32_t tile, int lane) {
    return tile + (kPlain ? at(lane / 4, 0) : at(lane & 15, lane >> 4));
  }
  static __device__ __forceinline__ uint32_t lane_b(uint32_t tile, int lane) {
    return tile + (kPlain ? at(lane % 4 * 2, 0) : at((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1));
  }
  template <Order kOrder = Order::kStraight>
  static __device__ __forceinline__ uint32_t lane_a_transposed(uint32_t tile, int lane) {
    if constexpr (kSize == 2) return lane_b(tile, lane);
    const int row = kPlain ? 0 : kOrder == Order::kPaired ? lane % 4 * 2 : lane % 4;
    return tile + at(row, lane >> 4) + lane / 4 % 4 * 4;
  }
  template <Order kOrder = Order::kStraight>
  static __device__ __forceinline__ uint32_t lane_b_transposed(uint32_t tile, int lane) {
    if constexpr (kSize == 2) return lane_a(tile, lane);
    if constexpr (kPlain) return tile + at(0, lane >> 1 & 1) + (lane & 1) * 8;
    return lane_a_transposed<kOrder>(tile, lane);
  }
  static __device__ __forceinline__ uint32_t lane_accumulator(uint32_t tile, int lane) {
    const int t = lane % 4;
    return tile + (kSize == 2 ? at(lane / 4, 0) + 4 * t : at(lane / 4, t >> 1) + (t & 1) * 8);
  }

  // Fragments whose depth lies along rows: kDepth columns, number `step`, and 16 rows from `row`
  // on, which are the rows of a, or the columns of two b. `row` is a multiple of 8 everywhere.
  static __device__ __forceinline__ void load_a(FragmentA<T>& a, uint32_t lane_address, int step,
                                                int row) {
    if constexpr (kPlain) {
#pragma unroll
      for (int i = 0; i < 2; ++i) load_row(a.r[i], lane_address, row + 8 * i, 2 * step);
    } else {
      uint32_t words[4];
      ldmatrix(words, moved(lane_address, row, 2 * step));
#pragma unroll
      for (int i = 0; i < 4; ++i) a.set(i, words[i]);
    }
  }
  static __device__ __forceinline__ void load_b(FragmentB<T> (&b)[2], uint32_t lane_address,
                                                int step, int row) {
    if constexpr (kPlain) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_row(b[i / 2].r[i % 2], lane_address, row + i / 2 * 8 + i % 2, 2 * step);
      }
    } else {
      uint32_t words[4];
      ldmatrix(words, moved(lane_address, row, 2 * step));
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i / 2].set(i % 2, words[i]);
    }
  }

  // Fragments whose depth lies across rows: kDepth rows from `row` on, in kOrder, and 16 columns,
  // number `pair`, which are the rows of a, or the columns of two b.
  template <Order kOrder = Order::kStraight>
  static __device__ __forceinline__ void load_a_transposed(FragmentA<T>& a, uint32_t lane_address,
                                                           int pair, int row) {
    if constexpr (kPlain) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const uint32_t word =
            load_word(moved(lane_address, row + i / 2, kPairChunks * pair + i % 2 * 2));
        a.r[i % 2][i / 2] = __uint_as_float(word);
      }
    } else {
      uint32_t words[4];
      load_across<kOrder>(words, lane_address, pair, row);
#pragma unroll
      for (int i = 0; i < 4; ++i) a.set(i, words[i]);
    }
  }
  template <Order kOrder = Order::kStraight>
  static __device__ __forceinline__ void load_b_transposed(FragmentB<T> (&b)[2],
                                                           uint32_t lane_address, int pair,
                                                           int row) {
    if constexpr (kPlain) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float (&to)[2][8] = b[i % 2].r;
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                     : "=f"(to[0][i / 2]), "=f"(to[1][i / 2])
                     : "r"(moved(lane_address, row + i / 2, kPairChunks * pair + i % 2 * 2)));
      }
    } else {
      uint32_t words[4];
      load_across<kOrder>(words, lane_address, pair, row);
      // 16 bits: the lanes give rows first, then chunks; 32 bits: as for a.
      constexpr bool k16 = kSize == 2;
      b[0].set(0, words[0]);
      b[!k16].set(k16, words[1]);
      b[k16].set(!k16, words[2]);
      b[1].set(1, words[3]);
    }
  }

  // The accumulator, rounded to T, to 16 rows from `row` on and 8 columns, number `column`.
  static __device__ __forceinline__ void store(uint32_t lane_address, int row, int column,
                                               const Accumulator& c) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t to = moved(lane_address, row + 8 * i, kSize / 2 * column);
      if constexpr (kSize == 2) {
        shared_at<uint32_t>(to) = pack<T>(c.r[2 * i], c.r[2 * i + 1]);
      } else {
        shared_at<float2>(to) = make_float2(c.r[2 * i], c.r[2 * i + 1]);
      }
    }
  }

 private:
  // 32-bit numbers that no tensor core multiplies.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static constexpr bool kPlain = kSize == 4;
#else
  static constexpr bool kPlain = false;
#endif
  static constexpr int kPairChunks = kSize;  // of 16 columns

  static __device__ __forceinline__ uint32_t load_word(uint32_t address) {
    uint32_t word;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address));
    return word;
  }

  static __device__ __forceinline__ void load_row(float (&to)[8], uint32_t lane_address, int row,
                                                  int chunk) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(to[i]), "=f"(to[i + 1]), "=f"(to[i + 2]), "=f"(to[i + 3])
                   : "r"(moved(lane_address, row, chunk + i / 4)));
    }
  }

  // ldmatrix turns matrices of 16-bit numbers around; of 32-bit ones a lane reads its own four.
  template <Order kOrder>
  static __device__ __forceinline__ void load_across(uint32_t (&words)[4], uint32_t lane_address,
                                                     int pair, int row) {
    if constexpr (kSize == 2) {
      ldmatrix_transposed(words, moved(lane_address, row, kPairChunks * pair));
    } else {
      constexpr int kStep = kOrder == Order::kPaired ? 1 : 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] =
            load_word(moved(lane_address, row + i / 2 * kStep, kPairChunks * pair + i % 2 * 2));
      }
    }
  }
};

// Rows of a matrix in global memory, on their way into one shared tile after the other: what one of
// kThreads threads copies. It has one chunk of a panel and every kStep-th row; where it puts them
// differs by constants. kDirection is 1, or -1 where the tiles are wanted from the last to the
// first.
template <class Tile, int kThreads, class T, int kDirection = 1>
class TileCopy {
  static constexpr int kStep = kThreads / Tile::kChunks, kPanels = Tile::kColumns / Tile::kPanel;
  static constexpr int kSteps = Tile::kRows / kStep;
  static constexpr int kChunk = 16 / sizeof(T);  // columns
  static_assert(Tile::kRows % kStep == 0 && kStep % 8 == 0);

 public:
  // Rows from `rows` and columns from `columns` on are zero; the first tile begins with row `row`.
  __device__ __forceinline__ TileCopy(uint32_t tile, const T* data, int64_t stride, int row,
                                      int rows, int columns, int thread)
      : stride_(stride), row_(row), rows_(rows), columns_(columns) {
    thread_row_ = thread / Tile::kChunks;
    chunk_ = thread % Tile::kChunks;
    to_ = tile + Tile::at(thread_row_, chunk_);
    at_ = data + (row + thread_row_) * stride + kChunk * chunk_;
    aligned_ = (reinterpret_cast<uintptr_t>(data) | stride * sizeof(T)) % 16 == 0;
    step_ = static_cast<int32_t>(kStep * stride * sizeof(T));
    const bool near =
        static_cast<uint64_t>(stride) < 1 << 20;  // a tile's rows span 2^31 bytes at most
    whole_rows_ = aligned_ && near && columns == Tile::kColumns ? rows : 0;
  }

  // Tiles that end at this row or before it may be copied by next_whole.
  __device__ __forceinline__ int whole_rows() const { return whole_rows_; }

  // The next tile.
  __device__ __forceinline__ void next() {
    row_ + Tile::kRows <= whole_rows_ ? next_whole() : next_partial();
  }
  __device__ __forceinline__ void next_whole() {
#pragma unroll
    for (int r = 0; r < kSteps; ++r) {
      const T* from = r == 0 ? at_ : behind(r);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        copy_async(to_ + panel * Tile::kPanelBytes + r * kStep * Tile::kRowBytes,
                   from + panel * Tile::kPanel, 16);
      }
    }
    at_ = behind(kDirection * kSteps);
    row_ += kDirection * Tile::kRows;
  }

 private:
  // `steps` times kStep rows further on: one instruction where step_ is exact.
  __device__ __forceinline__ const T* behind(int steps) const {
    return reinterpret_cast<const T*>(reinterpret_cast<intptr_t>(at_) +
                                      static_cast<int64_t>(step_) * steps);
  }

  __device__ __forceinline__ void next_partial() {
#pragma unroll 1
    for (int r = 0; r < kSteps; ++r) {
      const bool inside = row_ + thread_row_ + r * kStep < rows_;
      const T* from = at_ + r * kStep * stride_;
#pragma unroll 1
      for (int panel = 0; panel < kPanels; ++panel) {
        const int left = columns_ - panel * Tile::kPanel - kChunk * chunk_;
        copy_chunk(to_ + panel * Tile::kPanelBytes + r * kStep * Tile::kRowBytes,
                   from + panel * Tile::kPanel, inside ? min(max(left, 0), kChunk) : 0, aligned_);
      }
    }
    at_ += kDirection * Tile::kRows * stride_;
    row_ += kDirection * Tile::kRows;
  }

  const T* at_;
  int64_t stride_;
  uint32_t to_;
  int32_t step_;  // bytes of kStep rows
  int row_, rows_, columns_, whole_rows_, thread_row_, chunk_;
  bool aligned_;
};

}  // namespace fl
