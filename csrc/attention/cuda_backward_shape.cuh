// What the kernels of the attention backward on CUDA share: sizes of their tiles, which queries see
// a key, and the memory between the passes.
//
//   p = exp(s - lse), dp = dropout(do v'), ds = p (dp - delta), delta = rowsum(do o) - dlse
#pragma once

#include "attention/cuda_scores.cuh"
#include "common/shared_tile.cuh"

namespace fl {

constexpr int kRowUnit = 64;   // rows of a sequence begin at a multiple of it in the scratch memory
constexpr int kRowBytes = 16;  // of row data
constexpr int kBitRow = 8;     // bytes of a query's decisions: a bit for each of 64 keys

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kOldGpu = true;  // 64 KB of shared memory
#else
constexpr bool kOldGpu = false;
#endif

// One warp takes kWarpKeys keys, the rows of its tiles, and kStepM queries at a time, the columns.
// kWide: 128 keys a block where 64 are the rule. Half as much of q, dout and dq moves, but 8 warps
// and 113 KB of shared memory are taken.
template <class T_, int kDim_, bool kGeneral_, bool kOld_, bool kWide = false>
struct BackwardShape {
  using T = T_;
  static constexpr int kDim = kDim_;           // head_dim and head_dim_v at most
  static constexpr bool kGeneral = kGeneral_;  // ScoreRules, dropout, dims that are not kDim
  static constexpr int kColumns = kDim < 128 ? kDim : 128;  // of dq, dk and dv, per block
  static constexpr int kTilesM = kDim <= 64 && !kGeneral && !kOld_ ? 2 : 1;  // of 16 keys, per warp
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr int kWarps = kWide ? 8 : int{kFloat} + int{kOld_} + int{kDim > 128} > 1 ? 2 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpKeys = 16 * kTilesM, kBlockN = kWarps * kWarpKeys;
  static constexpr int kBlockM = kDim > 128 || kFloat ? 16 : kOld_ ? 32 : 64;
  static constexpr int kStepM = kBlockM < 32 ? 16 : 32;
  static constexpr int kTilesN = kStepM / 8, kTilesD = kColumns / 8;

  // dq of a block: kStepM queries and kColumnsQ columns each warp at a time.
  static constexpr int kWarpsM = kBlockM / kStepM, kWarpsD = kWarps / kWarpsM;
  static constexpr int kColumnsQ = kColumns / kWarpsD < 32 ? kColumns / kWarpsD : 32;

  using TileQ = SharedTile<T, kBlockM, kDim>;
  using TileKv = SharedTile<T, kBlockN, kDim>;
  static constexpr int kPanelDs = 64 / sizeof(T);  // columns, at least
  using TileDs =
      SharedTile<T, kBlockN, (kBlockM > kPanelDs ? kBlockM : kPanelDs)>;  // keys x queries
  static constexpr int kPanel = TileQ::kPanel;
};

// The block's tiles in shared memory, as 32-bit addresses; in general no wider than needed.
template <class S>
struct BackwardShared {
  uint32_t k, v, q, dout, ds, rows, shown, kept, end;

  __host__ __device__ __forceinline__ BackwardShared(uint32_t memory, int head_dim,
                                                     int head_dim_v) {
    const int dim = S::kGeneral ? head_dim : S::kDim, dim_v = S::kGeneral ? head_dim_v : S::kDim;
    k = memory;
    v = k + panels(dim) * S::TileKv::kPanelBytes;
    q = v + panels(dim_v) * S::TileKv::kPanelBytes;
    dout = q + panels(dim) * S::TileQ::kPanelBytes;
    ds = dout + panels(dim_v) * S::TileQ::kPanelBytes;
    rows = ds + S::TileDs::kBytes;
    shown = rows + S::kBlockM * kRowBytes;
    kept = shown + (S::kGeneral ? S::kBlockM * kBitRow : 0);
    end = kept + (S::kGeneral ? S::kBlockM * kBitRow : 0);
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

// Where a row saw nothing, -inf makes all of its probabilities 0.
__device__ __forceinline__ float minus(float lse) { return lse == -INFINITY ? -INFINITY : -lse; }

// What is known of two rows beside each other, so that a lane reads what its two columns of
// accumulators begin with: minus_lse and the normalizer of both, and twice minus_delta of both. The
// even row's lane gets the first half, that of the odd row, kDistance lanes on, the second.
template <int kDistance>
__device__ __forceinline__ float4 half_of_pair(bool odd, float minus_lse, float normalizer,
                                               float minus_delta) {
  const float next_lse = __shfl_xor_sync(~0u, minus_lse, kDistance);
  const float next_normalizer = __shfl_xor_sync(~0u, normalizer, kDistance);
  const float last_delta = __shfl_xor_sync(~0u, minus_delta, kDistance);
  if (odd) return {last_delta, minus_delta, last_delta, minus_delta};
  return {minus_lse, next_lse, normalizer, next_normalizer};
}

// Memory between the passes. Each head has `rows` rows; those of a sequence begin at a multiple of
// kRowUnit, and rows behind its end are there up to the next.
struct BackwardScratch {
  float* dq;         // sums of ds k, (heads_q, rows, columns) in tiles of 16 x 8: see dq_tile
  float4* row_data;  // (heads_q, rows): see half_of_pair
  int* turns;        // (heads_q, rows / 16, 2): key blocks that have added to dq
  int* ticket;
  int64_t rows;
  int columns;        // of dq
  bool whole_chunks;  // rows of q and dout are kDim columns that 16-byte copies can take
  bool general;       // minus_lse is in natural units, and a normalizer is wanted

  __device__ __forceinline__ int64_t first_row(const AttentionForward& p, int b, int64_t h,
                                               const Sequence& sequence) const {
    const int64_t first = p.cu_seqlens_q ? (sequence.first_q + b * kRowUnit) / kRowUnit * kRowUnit
                                         : b * ((p.seqlen_q + kRowUnit - 1) / kRowUnit * kRowUnit);
    return h * rows + first;
  }
  // 16 rows x 8 columns of dq as a warp's accumulators hold them: element e of lane l is number
  // 32 e + l. cells: columns / 8.
  __device__ __forceinline__ float* dq_tile(int64_t row, int column, int cells) const {
    return dq + (static_cast<uint64_t>(row) / 16 * cells + static_cast<unsigned>(column) / 8) * 128;
  }
};

}  // namespace fl
