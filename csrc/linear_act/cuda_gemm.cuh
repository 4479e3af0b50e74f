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
  static constexpr int kUnrolled = kRowsStay && sizeof(T) == 4 ? 1 : kSteps;
  // A stage's number is its distance from the first, or, where all of them have registers, its
  // address: that saves instructions.
  static constexpr bool kBaseInPlaces = kArch_ >= 80 && sizeof(T) == 4;
  using CopyA = FactorCopy<T, kDenseA, kTileDepth>;
  using CopyB = FactorCopy<T, kDenseB, kTileDepth>;
  static constexpr int kTileB = CopyA::Tile::kBytes;  // where it begins in a stage
  static constexpr uint32_t kStageBytes = CopyA::Tile::kBytes + CopyB::Tile::kBytes;
};

template <class S>
__device__ __forceinline__ int tiles_of(int64_t k) {
  return static_cast<int>((k + S::kTileDepth - 1) / S::kTileDepth);
}

// The block's first row and column of out. 8 rows of tiles are done column by column, then the next
// 8, so that blocks that run together share rows of a and b in the L2 cache.
template <class S>
struct BlockPlace {
  int row, column;
  bool gated;

  // To be computed where it is needed, so that it takes no register in between.
  __device__ __forceinline__ explicit BlockPlace(const GemmCall& call) {
    constexpr int kBand = 8;
    const int block = static_cast<int>(opaque(blockIdx.x));
    const int band = block / (kBand * call.tiles_n), within = block % (kBand * call.tiles_n);
    const int height = min(call.tiles_m - band * kBand, kBand);
    gated = S::kActivates && call.g.form == LinearActGemm::Form::kGated;
    row = (band * kBand + within % height) * kBlockRows;
    column = within / height * (gated ? kBlockRows / 2 : kBlockRows);
  }
};

// The tiles that the block sums over, of those of both products.
template <class S>
struct PartOfTiles {
  int begin, tiles;

  __device__ __forceinline__ explicit PartOfTiles(const GemmCall& call) {
    const int64_t all = tiles_of<S>(call.g.k[0]) + tiles_of<S>(call.g.k[1]);
    const uint32_t part = opaque(blockIdx.y);
    begin = static_cast<int>(all * part / call.splits);
    tiles = static_cast<int>(all * (part + 1) / call.splits) - begin;
  }
};

// Both factors' tiles, of the first product and then, in a sum, of the second.
template <class S>
class TileStream {
 public:
  // base: what a stage's number is told from.
  __device__ __forceinline__ TileStream(const GemmCall& call, uint32_t base, int tiles)
      : call_(call), more_(tiles > 0 ? kAll : 0) {
    place_a_ = opaque(base + typename S::CopyA::Place(threadIdx.x).offset());
    place_b_ = opaque(base + typename S::CopyB::Place(threadIdx.x).offset());
  }

  // The next tile, where there is one. The first of a product takes the long way, too.
  __device__ __forceinline__ void next(uint32_t stage) {
    if (left_ >= least_) {
      a_.template copy<0>(stage + place_a_);
      b_.template copy<S::kTileB>(stage + place_b());
    } else {
      if (left_ <= 0 && more_ != 0) aim();
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
  static constexpr int kAll = -1;

  // At the first tile of the block's, or, where those of the first product are done, the second's.
  __device__ __forceinline__ void aim() {
    const LinearActGemm& g = call_.g;
    const BlockPlace<S> block(call_);
    int w = 1;
    int64_t k = 0;
    if (more_ == kAll) {
      const PartOfTiles<S> part(call_);
      const int first = tiles_of<S>(g.k[0]);
      w = part.begin >= first;
      k = int64_t{part.begin - (w ? first : 0)} * S::kTileDepth;
      more_ = part.tiles;
    }
    const uint32_t thread =
        opaque(threadIdx.x);  // what follows from it is not kept through the loop for the next time
    a_.aim(g.a[w], g.a[w], {block.row, g.m, false}, k, thread);
    b_.aim(g.b[w], g.b[1], {block.column, g.n, block.gated}, k, thread);
    const int tiles = min(tiles_of<S>(g.k[w] - k), more_);
    left_ = static_cast<int>(min(g.k[w] - k, int64_t{tiles} * S::kTileDepth));
    least_ = a_.whole() && b_.whole() ? S::kTileDepth : INT_MAX;
    more_ -= tiles;
  }

  __device__ __forceinline__ uint32_t place_b() const {  // one register where both lie alike
    return std::is_same_v<typename S::CopyA, typename S::CopyB> ? place_a_ : place_b_;
  }

  const GemmCall& call_;
  uint32_t place_a_, place_b_;  // this thread's, in the tiles, behind base
  int more_;                    // tiles behind those that left_ tells of
  int left_ = 0, least_ = 1;    // of k; where less is left, tiles take more care
  typename S::CopyA a_;
  typename S::CopyB b_;
};

// Where a warp's rows and columns of a block begin.
__device__ __forceinline__ int warp_row() { return threadIdx.x / 32 % 2 * kWarpRows; }
__device__ __forceinline__ int warp_column() { return threadIdx.x / 64 * kWarpColumns; }

// The warp's sums, through shared memory of its own at `memory`, to out.
template <class S>
__device__ __forceinline__ void store_sums(const GemmCall& call,
                                           const Accumulator (&sums)[kTilesM][kTilesN],
                                           uint32_t memory) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const StagedSums staged{memory + threadIdx.x / 32 * kStagedRows * kWarpColumns * 4};
  const BlockPlace<S> block(call);
  const int column = block.column + (block.gated ? warp_column() / 2 : warp_column());
#pragma unroll 1
  for (int half = 0; half < kWarpRows / kStagedRows; ++half) {
    __syncwarp();
    if (half == 0) {
      staged.put(sums[0], 0, lane);
      staged.put(sums[1], 16, lane);
    } else {
      staged.put(sums[2], 0, lane);
      staged.put(sums[3], 16, lane);
    }
    __syncwarp();
    const int row = block.row + warp_row() + half * kStagedRows;
    if (call.splits > 1) {
      store_partial(call, staged, row, column, lane);
    } else {
      store_staged<S>(call.g, staged, row, column, lane);
    }
  }
}

template <class S>
__device__ __forceinline__ void run_gemm(const GemmCall& call, uint32_t memory) {
  const int tiles = PartOfTiles<S>(call).tiles;
  const uint32_t base = S::kBaseInPlaces ? memory : 0;
  uint32_t first = memory - base, last = first + (S::kStages - 1) * S::kStageBytes;
  if (!S::kBaseInPlaces) {
    first = opaque(first);
    last = opaque(last);
  }
  TileStream<S> stream(call, base, tiles);
  std::conditional_t<S::kAhead, AheadProduct<S>, DirectProduct<S>> product(
      base, warp_row(), warp_column(), static_cast<int>(threadIdx.x % 32));
#pragma unroll 1
  for (uint32_t stage = first; stage != last; stage += S::kStageBytes) {
    stream.next(stage);
    stream.deposit(stage);
    commit_copies();
  }
  wait_for_copies<S::kStages - 2>();
  __syncthreads();
  uint32_t read = first;
  if (tiles > 0) product.start(read);
#pragma unroll 1
  for (int left = tiles; left > 0; --left) {
    // The stage that is written was read last before the barrier that this tile came through.
    const uint32_t write = S::kStages == 2 ? first + last - read
                           : read == first ? last
                                           : read - S::kStageBytes;
    stream.next(write);
    commit_copies();
    product.advance(read);
    stream.deposit(write);
    wait_for_copies<S::kStages - 2>();
    __syncthreads();
    read = S::kStages == 2 ? write : read == last ? first : read + S::kStageBytes;
    if (left > 1) product.start(read);
    product.finish();
  }

  // All that was in shared memory has been read: the last barrier came after it.
  store_sums<S>(call, product.sums, memory);
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
