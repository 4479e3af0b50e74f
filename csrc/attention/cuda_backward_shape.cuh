// What the kernels of the attention backward on CUDA share: sizes of their tiles, which queries see
// a key, and the memory between the passes.
//
//   p = exp(s - lse), dp = dropout(do v'), ds = p (dp - delta), delta = rowsum(do o) - dlse
#pragma once

#include "attention/cuda_scores.cuh"
#include "common/shared_tile.cuh"

namespace fl {

constexpr int kRowUnit = 64;  // rows of a sequence begin at a multiple of it in the scratch memory

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kOldGpu = true;  // 64 KB of shared memory
#else
constexpr bool kOldGpu = false;
#endif

// One warp takes kWarpKeys keys, the rows of its tiles, and kStepM queries at a time, the columns.
template <class T_, int kDim_, bool kGeneral_, bool kOld_>
struct BackwardShape {
  using T = T_;
  static constexpr int kDim = kDim_;           // head_dim and head_dim_v at most
  static constexpr bool kGeneral = kGeneral_;  // ScoreRules, dropout, dims that are not kDim
  static constexpr int kColumns = kDim < 128 ? kDim : 128;  // of dq, dk and dv, per block
  static constexpr int kTilesM = kDim <= 64 && !kGeneral && !kOld_ ? 2 : 1;  // of 16 keys, per warp
  static constexpr int kWarps = kDim > 128 && kOld_ ? 2 : 4, kThreads = 32 * kWarps;
  static constexpr int kWarpKeys = 16 * kTilesM, kBlockN = kWarps * kWarpKeys;
  static constexpr int kBlockM = kDim > 128 ? 16 : kOld_ ? 32 : 64;
  static constexpr int kStepM = kDim == 128 && !kGeneral ? kBlockM : kBlockM < 32 ? 16 : 32;
  static constexpr int kTilesN = kStepM / 8, kTilesD = kColumns / 8;

  // dq of a block: kStepM queries and kColumnsQ columns each warp.
  static constexpr int kWarpsM = kBlockM / kStepM, kWarpsD = kWarps / kWarpsM;
  static constexpr int kColumnsQ = kColumns / kWarpsD;

  using TileQ = SharedTile<T, kBlockM, kDim>;
  using TileKv = SharedTile<T, kBlockN, kDim>;
  using TileDs = SharedTile<T, kBlockN, (kBlockM > 32 ? kBlockM : 32)>;  // keys x queries
  static constexpr int kPanel = TileQ::kPanel;
  static constexpr int kRowArrays = kGeneral ? 3 : 2;  // minus_lse, minus_delta, normalizer
};

// The block's tiles in shared memory, as 32-bit addresses; in general no wider than needed.
template <class S>
struct BackwardShared {
  uint32_t k, v, q, dout, ds, rows, end;

  __host__ __device__ __forceinline__ BackwardShared(uint32_t memory, int head_dim,
                                                     int head_dim_v) {
    const int dim = S::kGeneral ? head_dim : S::kDim, dim_v = S::kGeneral ? head_dim_v : S::kDim;
    k = memory;
    v = k + panels(dim) * S::TileKv::kPanelBytes;
    q = v + panels(dim_v) * S::TileKv::kPanelBytes;
    dout = q + panels(dim) * S::TileQ::kPanelBytes;
    ds = dout + panels(dim_v) * S::TileQ::kPanelBytes;
    rows = ds + S::TileDs::kBytes;
    end = rows + S::kRowArrays * S::kBlockM * 4;
  }
  static __host__ __device__ __forceinline__ int panels(int dim) {
    return (dim + S::kPanel - 1) / S::kPanel;
  }
};

// The queries that see some and that see all of the keys [j0, j1).
struct VisibleQueries {
  int some_begin, some_end, all_begin, all_end;

  __device__ __forceinline__ VisibleQueries(const Sequence& sequence, int j0, int j1) {
    some_begin = j0 < sequence.seqlen_k ? max(j0 - sequence.end_offset + 1, 0) : kFar;
    some_end = min(j1 - sequence.begin_offset, sequence.seqlen_q);
    all_begin = j1 <= sequence.seqlen_k ? j1 - sequence.end_offset : kFar;
    all_end = j0 - sequence.begin_offset + 1;
  }
  __device__ __forceinline__ bool none(int i0, int i1) const {
    return i0 >= some_end || i1 <= some_begin;
  }
  __device__ __forceinline__ bool all(int i0, int i1) const {
    return i0 >= all_begin && i1 <= all_end;
  }
};

// Memory between the passes. Each head has `rows` rows; those of a sequence begin at a multiple of
// kRowUnit, and rows behind its end are there up to the next.
struct BackwardScratch {
  float* dq;        // sums of ds k, (heads_q, rows, columns) in tiles of 16 x 8: see dq_tile
  float* row_data;  // (kRowArrays, heads_q, rows): minus_lse, minus_delta, normalizer
  int* turns;       // (heads_q, rows / 16, 2): key blocks that have added to dq
  int* ticket;
  int64_t rows, row_array;  // row_array: heads_q * rows
  int columns;              // of dq
  bool general;             // minus_lse is in natural units, and a normalizer is wanted

  __device__ __forceinline__ int64_t first_row(const AttentionForward& p, int b, int64_t h,
                                               const Sequence& sequence) const {
    const int64_t first = p.cu_seqlens_q ? (sequence.first_q + b * kRowUnit) / kRowUnit * kRowUnit
                                         : b * ((p.seqlen_q + kRowUnit - 1) / kRowUnit * kRowUnit);
    return h * rows + first;
  }
  // 16 rows x 8 columns of dq as a warp's accumulators hold them: element e of lane l is number
  // 32 e + l.
  __device__ __forceinline__ float* dq_tile(int64_t row, int column) const {
    return dq + (row / 16 * (columns / 8) + column / 8) * 128;
  }
};

}  // namespace fl
