// out = activation(a b' + bias) and its relatives (params.h) on tensor cores, float32 sums.
//
// A block of four warps owns 128 x 128 products, each warp 64 x 64. Tiles of a and b stream through
// a ring in shared memory; while one tile is multiplied the next ones arrive, and while a warp's
// tensor cores work on one step of a tile it loads the fragments of the next. Sums leave through
// shared memory, so that what is done to them is one short loop over 16-byte chunks of rows.
// Reads a ceil(n / 128) times and b ceil(m / 128) times, 8 rows of blocks after the other from the
// L2 cache; writes out once.
#pragma once

#include <climits>

#include "linear_act/cuda_epilogue.cuh"
#include "linear_act/cuda_factor.cuh"
#include "linear_act/cuda_passes.h"

namespace fl {

constexpr int kWarpRows = 64, kWarpColumns = 64, kStagedRows = 32;

// One for every architecture and type: what a block keeps in shared memory.
template <class T>
__host__ __device__ constexpr int gemm_depth(int arch) {  // elements of k per tile
  return (arch >= 80 && sizeof(T) == 2 ? 128 : 64) / static_cast<int>(sizeof(T));
}
template <class T>
__host__ __device__ constexpr int gemm_stages(int arch) {
  return arch >= 90 && sizeof(T) == 2 ? 3 : arch >= 80 && sizeof(T) == 4 ? 4 : 2;
}
template <class T>
constexpr int gemm_shared_bytes(int arch) {
  return gemm_stages<T>(arch) * 2 * kBlockRows * gemm_depth<T>(arch) * static_cast<int>(sizeof(T));
}

template <class T_, bool kDenseA_, bool kDenseB_, int kArch_>
struct GemmShape {
  using T = T_;
  static constexpr bool kDenseA = kDenseA_, kDenseB = kDenseB_;  // whether k is
  static constexpr bool kActivates = kDenseA && kDenseB;         // gradients are plain products
  static constexpr int kDepth = gemm_depth<T>(kArch_), kStages = gemm_stages<T>(kArch_);
  static constexpr int kStep = 32 / sizeof(T);  // depth of a product of the tensor cores
  static constexpr int kSteps = kDepth / kStep;
  static constexpr int kTilesM = kWarpRows / 16, kTilesN = kWarpColumns / 8;
  // Whether a step's fragments are loaded before the step before it is multiplied. On sm_75 their
  // registers are needed for tiles on their way to shared memory.
  static constexpr bool kAhead = kArch_ >= 80;
  using CopyA = FactorCopy<T, kDenseA, kDepth>;
  using CopyB = FactorCopy<T, kDenseB, kDepth>;
  static constexpr int kTileB = CopyA::Tile::kBytes;  // where it begins in a stage
  static constexpr uint32_t kStageBytes = CopyA::Tile::kBytes + CopyB::Tile::kBytes;
};

template <class S>
__device__ __forceinline__ int tiles_of(int64_t k) {
  return static_cast<int>((k + S::kDepth - 1) / S::kDepth);
}

// Both factors' tiles, of the first product and then, in a sum, of the second.
template <class S>
class TileStream {
 public:
  // From tile number `begin` of those of both products on, `tiles` of them.
  __device__ __forceinline__ TileStream(const LinearActGemm& g, int64_t m0, int64_t n0, int begin,
                                        int tiles)
      : g_(g), m0_(m0), n0_(n0), more_(tiles) {
    const int first = tiles_of<S>(g.k[0]);
    which_ = begin >= first;
    begin_ = static_cast<int64_t>(begin - (which_ ? first : 0)) * S::kDepth;
  }

  // The next tile, where there is one.
  __device__ __forceinline__ void next(uint32_t stage) {
    if (left_ <= 0 && more_ > 0) aim();
    if (left_ >= least_) {
      a_.template copy<0>(stage);
      b_.template copy<S::kTileB>(stage);
    } else if (left_ > 0) {
      a_.copy_tail(stage, min(left_, S::kDepth));
      b_.copy_tail(stage + S::kTileB, min(left_, S::kDepth));
    }
    a_.advance();
    b_.advance();
    left_ -= S::kDepth;
  }

  __device__ __forceinline__ void deposit(uint32_t stage) {
    a_.deposit(stage);
    b_.deposit(stage + S::kTileB);
  }

 private:
  __device__ __forceinline__ void aim() {
    const bool gated = g_.form == LinearActGemm::Form::kGated;
    const uint32_t thread = threadIdx.x;
    const int w = which_;
    a_.aim(g_.a[w], g_.a[w], {m0_, g_.m, false}, begin_, thread);
    b_.aim(g_.b[w], g_.b[1], {n0_, g_.n, gated}, begin_, thread);
    const int tiles = min(tiles_of<S>(g_.k[w] - begin_), more_);
    left_ = static_cast<int>(min(g_.k[w] - begin_, int64_t{tiles} * S::kDepth));
    least_ = a_.whole() && b_.whole() ? S::kDepth : INT_MAX;
    more_ -= tiles;
    which_ = 1;
    begin_ = 0;
  }

  const LinearActGemm& g_;
  int64_t m0_, n0_, begin_;
  int which_, more_;           // the factors that come next, and how many tiles of them
  int left_ = 0, least_ = 1;  // of k; where less is left, tiles take more care
  typename S::CopyA a_;
  typename S::CopyB b_;
};

// A warp's 64 x 64 sums, and how it multiplies a stage's tiles into them.
template <class S>
class WarpProduct {
  using T = typename S::T;
  using TileA = typename S::CopyA::Tile;
  using TileB = typename S::CopyB::Tile;

 public:
  Accumulator sums[S::kTilesM][S::kTilesN];

  __device__ __forceinline__ WarpProduct(int row, int column, int lane) {
    a_ = S::kDenseA ? TileA::lane_a(row * TileA::kRowBytes, lane)
                    : TileA::lane_b(row / TileA::kPanel * TileA::kPanelBytes, lane);
    b_ = S::kDenseB ? TileB::lane_b(column * TileB::kRowBytes, lane)
                    : TileB::lane_transposed(column / TileB::kPanel * TileB::kPanelBytes, lane);
    keep(a_);
    keep(b_);
#pragma unroll
    for (auto& row_of : sums) {
#pragma unroll
      for (Accumulator& sum : row_of) sum = {{0.0f, 0.0f, 0.0f, 0.0f}};
    }
  }

  // The fragments of step kStep.
  template <int kStep>
  __device__ __forceinline__ void load(uint32_t stage) {
    constexpr int kDepth = S::kStep * kStep;  // where the step begins
    repeat<S::kTilesM>([&]<int m>() {
      uint32_t(&r)[4] = rows_[slot(kStep)][m].r;
      if constexpr (S::kDenseA) {
        ldmatrix<TileA::row_offset(kStep, 16 * m)>(r, TileA::turned(stage + a_, kStep));
      } else {
        ldmatrix_transposed<TileA::row_offset(m, kDepth)>(r, TileA::turned(stage + a_, m));
      }
    });
    repeat<S::kTilesN / 2>([&]<int n>() {
      uint32_t(&r)[4] = columns_[slot(kStep)][n];
      if constexpr (S::kDenseB) {
        ldmatrix<S::kTileB + TileB::row_offset(kStep, 16 * n)>(r, TileB::turned(stage + b_, kStep));
      } else {
        ldmatrix_transposed<S::kTileB + TileB::row_offset(n, kDepth)>(
            r, TileB::turned(stage + b_, n));
      }
    });
  }

  __device__ __forceinline__ void multiply(int step) {
#pragma unroll
    for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < S::kTilesN; ++n) {
        const uint32_t* b = columns_[slot(step)][n / 2] + n % 2 * 2;
        mma<T>(sums[m][n], rows_[slot(step)][m], b[0], b[1], sums[m][n]);
      }
    }
  }

 private:
  static constexpr int kSlots = S::kAhead ? 2 : 1;
  static __device__ constexpr int slot(int step) { return step % kSlots; }

  uint32_t a_, b_;  // this lane's places in the tiles
  FragmentA rows_[kSlots][S::kTilesM];
  uint32_t columns_[kSlots][S::kTilesN / 2][4];
};

// Half of a warp's sums in shared memory: 32 rows of 64 floats, swizzled so that stores of pairs,
// loads of 16 bytes by rows, and those that take columns c and c + 32 apart, have no conflicts.
struct StagedSums {
  uint32_t base;

  __device__ __forceinline__ uint32_t at(int row, int column) const {
    const int swizzled = column ^ (row & 3) << 3 ^ ((column >> 5 ^ row) & 1) << 2;
    return base + (row * kWarpColumns + swizzled) * 4;
  }

  template <int kTilesN>
  __device__ __forceinline__ void put(const Accumulator (&sums)[kTilesN], int first_row,
                                      int lane) const {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t to = at(lane / 4, 8 * n + lane % 4 * 2) + (first_row + 8 * r) * kWarpColumns * 4;
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(sums[n].r[2 * r]),
                     "f"(sums[n].r[2 * r + 1]));
      }
    }
  }

  template <int kCount>
  __device__ __forceinline__ Chunk<kCount> get(int row, int column) const {
    Chunk<kCount> chunk;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(chunk.v[i]), "=f"(chunk.v[i + 1]), "=f"(chunk.v[i + 2]),
                     "=f"(chunk.v[i + 3])
                   : "r"(at(row, column + i)));
    }
    return chunk;
  }
};

// The staged rows, from row `row` of out on; the warp's columns begin at `column`.
template <class S>
__device__ __forceinline__ void store_staged(const LinearActGemm& g, const StagedSums& staged,
                                             int64_t row, int64_t column, int lane) {
  using T = typename S::T;
  constexpr int kChunk = 16 / sizeof(T);
  const bool gated = S::kActivates && g.form == LinearActGemm::Form::kGated;
  const int per_row = (gated ? kWarpColumns / 2 : kWarpColumns) / kChunk;
  const int own = lane % per_row * kChunk;
  if (column + own >= g.n) return;
  const Epilogue<T, kChunk, S::kActivates> epilogue(g, column + own);
#pragma unroll 1
  for (int r = lane / per_row; r < kStagedRows && row + r < g.m; r += 32 / per_row) {
    const Chunk<kChunk> sums = staged.get<kChunk>(r, own);
    Chunk<kChunk> sums_up = sums;
    if (gated) sums_up = staged.get<kChunk>(r, own + kWarpColumns / 2);
    epilogue.store(row + r, sums, sums_up);
  }
}

// The same for a part of the sum.
__device__ __forceinline__ void store_partial(const GemmCall& call, const StagedSums& staged,
                                              int64_t row, int64_t column, int lane) {
  const LinearActGemm& g = call.g;
  const bool gated = g.form == LinearActGemm::Form::kGated;
  const int own = lane % 16 * 4;
  const bool up = gated && own >= kWarpColumns / 2;
  const int64_t to_column = column + own - (up ? kWarpColumns / 2 : 0);
  if (to_column >= g.n) return;
  const int64_t matrix = g.m * call.partial_stride;
  float* to = call.partial + (blockIdx.y * (gated ? 2 : 1) + up) * matrix + to_column;
#pragma unroll 1
  for (int r = lane / 16; r < kStagedRows && row + r < g.m; r += 2) {
    staged.get<4>(r, own).store(to + (row + r) * call.partial_stride, 4);
  }
}

// The block's place among the tiles of out: 8 rows of tiles are done column by column, then the
// next 8, so that blocks that run together share rows of a and b in the L2 cache.
__device__ __forceinline__ void place_of_block(const GemmCall& call, int* tile_m, int* tile_n) {
  constexpr int kBand = 8;
  const int band = static_cast<int>(blockIdx.x) / (kBand * call.tiles_n);
  const int within = static_cast<int>(blockIdx.x) % (kBand * call.tiles_n);
  const int height = min(call.tiles_m - band * kBand, kBand);
  *tile_m = band * kBand + within % height;
  *tile_n = within / height;
}

template <class S>
__device__ __forceinline__ void run_gemm(const GemmCall& call, uint32_t memory) {
  const LinearActGemm& g = call.g;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int warp_row = warp % 2 * kWarpRows, warp_column = warp / 2 * kWarpColumns;
  const bool gated = S::kActivates && g.form == LinearActGemm::Form::kGated;
  int tile_m, tile_n;
  place_of_block(call, &tile_m, &tile_n);
  const int64_t m0 = int64_t{kBlockRows} * tile_m;
  const int64_t n0 = int64_t{gated ? kBlockRows / 2 : kBlockRows} * tile_n;

  const int64_t all = tiles_of<S>(g.k[0]) + tiles_of<S>(g.k[1]);
  const int begin = static_cast<int>(all * blockIdx.y / call.splits);
  const int tiles = static_cast<int>(all * (blockIdx.y + 1) / call.splits) - begin;

  TileStream<S> stream(g, m0, n0, begin, tiles);
  WarpProduct<S> product(warp_row, warp_column, lane);
  const uint32_t last = memory + (S::kStages - 1) * S::kStageBytes;
#pragma unroll 1
  for (uint32_t stage = memory; stage != last; stage += S::kStageBytes) {
    stream.next(stage);
    stream.deposit(stage);
    commit_copies();
  }
  wait_for_copies<S::kStages - 2>();
  __syncthreads();
  uint32_t read = memory, write = last;
  if (tiles > 0) product.template load<0>(read);
#pragma unroll 1
  for (int left = tiles; left > 0; --left) {
    // The stage that is written was read last before the barrier that this tile came through.
    stream.next(write);
    commit_copies();
    repeat<S::kSteps - 1>([&]<int step>() {
      if (S::kAhead) product.template load<step + 1>(read);
      product.multiply(step);
      if (!S::kAhead) product.template load<step + 1>(read);
    });
    stream.deposit(write);
    wait_for_copies<S::kStages - 2>();
    __syncthreads();
    write = read;
    read = read + S::kStageBytes > last ? memory : read + S::kStageBytes;
    if (!S::kAhead) product.multiply(S::kSteps - 1);
    if (left > 1) product.template load<0>(read);
    if (S::kAhead) product.multiply(S::kSteps - 1);
  }

  // All that was in shared memory has been read: the last barrier came after it.
  const StagedSums staged{memory + warp * kStagedRows * kWarpColumns * 4};
  const int64_t column = n0 + (gated ? warp_column / 2 : warp_column);
#pragma unroll 1
  for (int half = 0; half < kWarpRows / kStagedRows; ++half) {
    __syncwarp();
    if (half == 0) {
      staged.put(product.sums[0], 0, lane);
      staged.put(product.sums[1], 16, lane);
    } else {
      staged.put(product.sums[2], 0, lane);
      staged.put(product.sums[3], 16, lane);
    }
    __syncwarp();
    const int64_t row = m0 + warp_row + half * kStagedRows;
    if (call.splits > 1) {
      store_partial(call, staged, row, column, lane);
    } else {
      store_staged<S>(g, staged, row, column, lane);
    }
  }
}

template <class T, bool kDenseA, bool kDenseB>
__global__ void __launch_bounds__(kGemmThreads, 2)
    linear_act_gemm_kernel(const __grid_constant__ GemmCall call) {
#if __CUDA_ARCH__
  if constexpr (__CUDA_ARCH__ >= 800 || !std::is_same_v<T, __nv_bfloat16>) {
    extern __shared__ __align__(128) uint8_t memory[];
    run_gemm<GemmShape<T, kDenseA, kDenseB, __CUDA_ARCH__ / 10>>(call, shared_address(memory));
  }
#endif
}

}  // namespace fl
