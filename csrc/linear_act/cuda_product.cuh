// A warp's part of a block's product: 64 x 64 sums in registers, factors in shared memory.
#pragma once

#include "common/codegen.cuh"
#include "common/shared_tile.cuh"

namespace fl {

constexpr int kWarpRows = 64, kWarpColumns = 64;
constexpr int kTilesM = kWarpRows / 16, kTilesN = kWarpColumns / 8;

// ldmatrix from `row` rows and `chunk` chunks behind a lane's address, most of it as a constant.
template <class Tile, bool kTransposed, int kOffset, int kRow, int kChunk>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t lane_address) {
  constexpr int kTurn = (kChunk % Tile::kChunks ^ Tile::swizzle(kRow)) << 4;
  constexpr int kBytes =
      kOffset + kChunk / Tile::kChunks * Tile::kPanelBytes + kRow * Tile::kRowBytes;
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(lane_address ^ kTurn), "n"(kBytes));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(lane_address ^ kTurn), "n"(kBytes));
  }
}

template <class S>
class WarpSums {
  using TileA = typename S::CopyA::Tile;
  using TileB = typename S::CopyB::Tile;

 public:
  Accumulator sums[kTilesM][kTilesN];

  // base: what a stage's number is told from; then, the warp's rows of a and of b in their tiles.
  __device__ __forceinline__ WarpSums(uint32_t base, int row, int column, int lane) {
    a_ = S::kDenseA ? TileA::lane_a(row * TileA::kRowBytes, lane)
                    : TileA::lane_a_transposed(row / TileA::kPanel * TileA::kPanelBytes, lane);
    b_ = S::kDenseB ? TileB::lane_b(column * TileB::kRowBytes, lane)
                    : TileB::lane_b_transposed(column / TileB::kPanel * TileB::kPanelBytes, lane);
    a_ = opaque(a_ + base);
    b_ = opaque(b_ + base);
#pragma unroll
    for (auto& row_of : sums) {
#pragma unroll
      for (Accumulator& sum : row_of) sum = {{0.0f, 0.0f, 0.0f, 0.0f}};
    }
  }

 protected:
  uint32_t a_, b_;  // this lane's places in the tiles, behind base
};

// 16-bit factors, sm_80 and newer: while one step is multiplied the fragments of the next are on
// their way, from one tile to the next as well.
template <class S>
class AheadProduct : public WarpSums<S> {
  using T = typename S::T;
  using TileA = typename S::CopyA::Tile;
  using TileB = typename S::CopyB::Tile;

 public:
  using WarpSums<S>::WarpSums;

  // A tile, the first or the one behind finish().
  __device__ __forceinline__ void start(uint32_t stage) { load<0>(stage); }
  // After it nothing of the tile is needed any more.
  __device__ __forceinline__ void advance(uint32_t stage) {
    unrolled<S::kSteps - 1>([&](auto step) {
      load<step + 1>(stage);
      multiply<step>();
    });
  }
  __device__ __forceinline__ void finish() { multiply<S::kSteps - 1>(); }

 private:
  template <int kStep>
  __device__ __forceinline__ void load(uint32_t stage) {
    unrolled<kTilesM>([&](auto m) {
      load_matrices<TileA, !S::kDenseA, 0, S::kDenseA ? 16 * m : 16 * kStep,
                    S::kDenseA ? 2 * kStep : 2 * m>(rows_[kStep % 2][m].r, stage + this->a_);
    });
    unrolled<kTilesN / 2>([&](auto n) {
      uint32_t r[4];
      load_matrices<TileB, !S::kDenseB, S::kTileB, S::kDenseB ? 16 * n : 16 * kStep,
                    S::kDenseB ? 2 * kStep : 2 * n>(r, stage + this->b_);
      for (int i = 0; i < 4; ++i) columns_[kStep % 2][2 * n + i / 2].r[i % 2] = r[i];
    });
  }

  template <int kStep>
  __device__ __forceinline__ void multiply() {
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
        mma<T>(this->sums[m][n], rows_[kStep % 2][m], columns_[kStep % 2][n], this->sums[m][n]);
      }
    }
  }

  FragmentA<T> rows_[2][kTilesM];
  FragmentB<T> columns_[2][kTilesN];
};

// Everything else: fragments take more registers, or tiles on their way to shared memory do, so
// that they are loaded where they are needed.
template <class S>
class DirectProduct : public WarpSums<S> {
  using T = typename S::T;
  using TileA = typename S::CopyA::Tile;
  using TileB = typename S::CopyB::Tile;

 public:
  using WarpSums<S>::WarpSums;

  __device__ __forceinline__ void start(uint32_t) {}
  __device__ __forceinline__ void advance(uint32_t stage) {
    const uint32_t b = stage + this->b_ + S::kTileB;
#pragma unroll(S::kUnrolled)
    for (int step = 0; step < S::kSteps; ++step) {
      FragmentA<T> rows[kTilesM];
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        if (S::kRowsStay) load_rows(rows[m], stage, step, m);
      }
#pragma unroll
      for (int n = 0; n < kTilesN; n += 2) {
        FragmentB<T> columns[2];
        if constexpr (S::kDenseB) {
          TileB::load_b(columns, b, step, 8 * n);
        } else {
          TileB::load_b_transposed(columns, b, n / 2, kDepth<T> * step);
        }
#pragma unroll
        for (int m = 0; m < kTilesM; ++m) {
          if (!S::kRowsStay) load_rows(rows[m], stage, step, m);
          mma<T>(this->sums[m][n], rows[m], columns[0], this->sums[m][n]);
          mma<T>(this->sums[m][n + 1], rows[m], columns[1], this->sums[m][n + 1]);
        }
      }
    }
  }
  __device__ __forceinline__ void finish() {}

 private:
  __device__ __forceinline__ void load_rows(FragmentA<T>& rows, uint32_t stage, int step, int m) {
    if constexpr (S::kDenseA) {
      TileA::load_a(rows, stage + this->a_, step, 16 * m);
    } else {
      TileA::load_a_transposed(rows, stage + this->a_, m, kDepth<T> * step);
    }
  }
};

}  // namespace fl
