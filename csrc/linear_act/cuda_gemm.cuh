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

#include "linear_act/cuda_factor.cuh"
#include "linear_act/cuda_passes.h"
#include "linear_act/cuda_product.cuh"
#include "linear_act/cuda_staged.cuh"

namespace fl {

// What a block keeps in shared memory, and so what host and device have to agree on.
template <class T>
__host__ __device__ constexpr int gemm_depth(int arch) {  // elements of k per tile
  return (arch >= 80 && sizeof(T) == 2 ? 128 : 64) / static_cast<int>(sizeof(T));
}
template <class T>
__host__ __device__ constexpr int gemm_stages(int arch) {
  return arch < 80 ? 2 : sizeof(T) == 4 ? 4 : arch >= 90 ? 3 : 2;
}
template <class T>
constexpr int gemm_shared_bytes(int arch) {
  return gemm_stages<T>(arch) * 2 * kBlockRows * gemm_depth<T>(arch) * static_cast<int>(sizeof(T));
}

template <class T_, bool kDenseA_, bool kDenseB_, int kArch_>
struct GemmShape {
  using T = T_;
  using Element = std::conditional_t<std::is_same_v<T, Tf32>, float, T>;  // in memory
  static constexpr bool kDenseA = kDenseA_, kDenseB = kDenseB_;           // whether k is
  static constexpr bool kActivates = kDenseA && kDenseB;  // gradients are plain products
  static constexpr int kTileDepth = gemm_depth<T>(kArch_), kStages = gemm_stages<T>(kArch_);
  static constexpr int kSteps = kTileDepth / kDepth<T>;
  static constexpr bool kAhead = kArch_ >= 80 && sizeof(T) == 2;
  // Fragments of float32 fill many registers: without tensor cores too many to stay for a step, and
  // with them too many for two steps at once.
  static constexpr bool kRowsStay = kArch_ >= 80 || sizeof(T) == 2;
  static constexpr int kUnrolled = sizeof(T) == 2 ? kSteps : 1;
  using CopyA = FactorCopy<T, kDenseA, kTileDepth>;
  using CopyB = FactorCopy<T, kDenseB, kTileDepth>;
  static constexpr int kTileB = CopyA::Tile::kBytes;  // where it begins in a stage
  static constexpr uint32_t kStageBytes = CopyA::Tile::kBytes + CopyB::Tile::kBytes;
};

template <class S>
__device__ __forceinline__ int tiles_of(int64_t k) {
  return static_cast<int>((k + S::kTileDepth - 1) / S::kTileDepth);
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
    begin_ = static_cast<int64_t>(begin - (which_ ? first : 0)) * S::kTileDepth;
    place_a_ = typename S::CopyA::Place(threadIdx.x).offset();
    place_b_ = typename S::CopyB::Place(threadIdx.x).offset();
    keep(place_a_);
    keep(place_b_);
  }

  // The next tile, where there is one. The first of a product takes the long way, too.
  __device__ __forceinline__ void next(uint32_t stage) {
    if (left_ >= least_) {
      a_.template copy<0>(stage + place_a_);
      b_.template copy<S::kTileB>(stage + place_b());
    } else {
      if (left_ <= 0 && more_ > 0) aim();
      if (left_ > 0) {
        a_.copy_tail(stage + place_a_, min(left_, S::kTileDepth));
        b_.copy_tail(stage + place_b() + S::kTileB, min(left_, S::kTileDepth));
      }
    }
    a_.advance();
    b_.advance();
    left_ -= S::kTileDepth;
  }

  __device__ __forceinline__ void deposit(uint32_t stage) {
    a_.deposit(stage + place_a_);
    b_.deposit(stage + place_b() + S::kTileB);
  }

 private:
  __device__ __forceinline__ void aim() {
    const bool gated = g_.form == LinearActGemm::Form::kGated;
    const uint32_t thread = threadIdx.x;
    const int w = which_;
    a_.aim(g_.a[w], g_.a[w], {m0_, g_.m, false}, begin_, thread);
    b_.aim(g_.b[w], g_.b[1], {n0_, g_.n, gated}, begin_, thread);
    const int tiles = min(tiles_of<S>(g_.k[w] - begin_), more_);
    left_ = static_cast<int>(min(g_.k[w] - begin_, int64_t{tiles} * S::kTileDepth));
    least_ = a_.whole() && b_.whole() ? S::kTileDepth : INT_MAX;
    more_ -= tiles;
    which_ = 1;
    begin_ = 0;
  }

  __device__ __forceinline__ uint32_t place_b() const {  // one register where both lie alike
    return std::is_same_v<typename S::CopyA, typename S::CopyB> ? place_a_ : place_b_;
  }

  const LinearActGemm& g_;
  int64_t m0_, n0_, begin_;
  uint32_t place_a_, place_b_;  // this thread's, in the tiles
  int which_, more_;            // the factors that come next, and how many tiles of them
  int left_ = 0, least_ = 1;    // of k; where less is left, tiles take more care
  typename S::CopyA a_;
  typename S::CopyB b_;
};

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
  std::conditional_t<S::kAhead, AheadProduct<S>, DirectProduct<S>> product(warp_row, warp_column,
                                                                           lane);
  uint32_t first = memory, last = memory + (S::kStages - 1) * S::kStageBytes;
  keep(first);
  keep(last);
#pragma unroll 1
  for (uint32_t stage = first; stage != last; stage += S::kStageBytes) {
    stream.next(stage);
    stream.deposit(stage);
    commit_copies();
  }
  wait_for_copies<S::kStages - 2>();
  __syncthreads();
  uint32_t read = first, write = last;
  if (tiles > 0) product.start(read);
#pragma unroll 1
  for (int left = tiles; left > 0; --left) {
    // The stage that is written was read last before the barrier that this tile came through.
    stream.next(write);
    commit_copies();
    product.advance(read);
    stream.deposit(write);
    wait_for_copies<S::kStages - 2>();
    __syncthreads();
    write = read;
    read = S::kStages == 2 ? first + last - read : read == last ? first : read + S::kStageBytes;
    if (left > 1) product.start(read);
    product.finish();
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
  // Before sm_80 no tensor core multiplies TF32: the launcher takes the kernel of float.
  if constexpr (kHasMma<T> && (__CUDA_ARCH__ >= 800 || !std::is_same_v<T, Tf32>)) {
    extern __shared__ __align__(128) uint8_t memory[];
    run_gemm<GemmShape<T, kDenseA, kDenseB, __CUDA_ARCH__ / 10>>(call, shared_address(memory));
  }
#endif
}

}  // namespace fl
