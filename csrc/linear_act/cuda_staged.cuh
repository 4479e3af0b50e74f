// A warp's sums on their way out, through shared memory: what is done to them is one short loop
// over 16-byte chunks of rows, not unrolled over every accumulator.
#pragma once

#include "linear_act/cuda_epilogue.cuh"
#include "linear_act/cuda_passes.h"
#include "linear_act/cuda_product.cuh"

namespace fl {

constexpr int kStagedRows = 32;

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
        const uint32_t to =
            at(lane / 4, 8 * n + lane % 4 * 2) + (first_row + 8 * r) * kWarpColumns * 4;
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
  using T = typename S::Element;
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

}  // namespace fl
