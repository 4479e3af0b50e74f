// Attention backward on tensor cores: dk, dv and the sums of dq, float32 sums throughout.
//
// One block per (batch, key head, kBlockN keys); its warps split the keys. It goes through the
// queries that see its keys, of all query heads of the group, kBlockM at a time: dk and dv stay in
// registers until the end, dq is added up in global memory. Of the scores only ds ever lies in
// shared memory, as the operand of dq = ds k. q and dout of the next queries arrive while dq of
// these is computed. Reads k and v once, q and dout once per block that sees them.
#pragma once

#include "attention/cuda_backward_tile.cuh"

namespace fl {

// What a block adds up, and its products. Row 16 m + 8 r + lane / 4 of the warp is a key.
template <class S>
class BackwardWarp {
  using T = typename S::T;

 public:
  // column: of q, k and dout, where those of dq, dk and dv begin.
  __device__ __forceinline__ BackwardWarp(const BackwardShared<S>& shared, int warp, int lane,
                                          int column)
      : shared_(shared), lane_(lane) {
    q_ = S::TileQ::step_of(S::TileQ::lane_transposed(0, lane), column / 16, 0);
    clear(dk);
    clear(dv);
  }

  // dv += p' do, dk += ds' q for queries from row `first` of the block on; ds' to shared memory.
  // columns, columns_v: how many of kColumns there are.
  __device__ __forceinline__ void add(const GradientTile<S>& tile, int first, int columns,
                                      int columns_v) {
    store_ds(tile.dp, first);
    add_product(dv, tile.s, shared_.dout, first, columns_v);
    add_product(dk, tile.dp, shared_.q, first, columns);
  }

  // dq += ds k of queries from row m0 of the sequence and `row` of the scratch memory on, to global
  // memory: kStepM queries and kColumnsQ columns each warp. j0: the block's first key.
  __device__ __forceinline__ void add_dq(const BackwardScratch& scratch, const Sequence& sequence,
                                         int64_t row, int m0, int j0, int column,
                                         int head_dim) const {
    const int thread = afresh(static_cast<int>(threadIdx.x)), warp = thread / 32;
    const int first = warp / S::kWarpsD * S::kStepM, i0 = m0 + first;
    if (i0 >= sequence.seqlen_q) return;
    column += warp % S::kWarpsD * S::kColumnsQ;
    const int columns = head_dim - column;
    const VisibleKeys keys(sequence, i0, i0 + S::kStepM);
    // Whether the keys of warp w have stored ds of these queries.
    const auto stored = [&](int w) {
      return !keys.none(j0 + w * S::kWarpKeys, j0 + (w + 1) * S::kWarpKeys);
    };
    const uint32_t ds_lane = S::TileDs::step_of(S::TileDs::lane_b(0, thread % 32), first / 16, 0);
    const uint32_t k_lane =
        S::TileKv::step_of(S::TileKv::lane_transposed(0, thread % 32), column / 16, 0);
    Accumulator dq[S::kStepM / 16][S::kColumnsQ / 8];
    clear(dq);
    if (!S::kGeneral && stored(0) && stored(S::kWarps - 1)) {  // and all between
      multiply_ds(dq, ds_lane, k_lane, columns, [](int) { return true; });
    } else {
      multiply_ds(dq, ds_lane, k_lane, columns, stored);
    }
    const int cells = (S::kGeneral ? scratch.columns : S::kDim) / 8;  // in 16 rows
    float* to = scratch.dq + ((row + first) / 16 * cells + column / 8) * 128 + thread % 32;
#pragma unroll
    for (int m = 0; m < S::kStepM / 16; ++m) {
#pragma unroll
      for (int d = 0; d < S::kColumnsQ / 8; ++d) {
        if (S::kGeneral && 8 * d >= columns) break;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          atomicAdd(to + (m * cells + d) * 128 + e * 32, dq[m][d].r[e]);
        }
      }
    }
  }

  // x times factor to the warp's rows of a tile of T.
  __device__ __forceinline__ void stage(const Accumulator (&x)[S::kTilesM][S::kTilesD],
                                        uint32_t tile, float factor) const {
    const uint32_t place = lane_pair<typename S::TileKv>(lane_);
#pragma unroll
    for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
      for (int d = 0; d < S::kTilesD; ++d) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t pair = pack<T>(x[m][d].r[2 * r] * factor, x[m][d].r[2 * r + 1] * factor);
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(
                           pair_of<typename S::TileKv>(place, d, 16 * m + 8 * r) + tile),
                       "r"(pair));
        }
      }
    }
  }

  Accumulator dk[S::kTilesM][S::kTilesD], dv[S::kTilesM][S::kTilesD];

 private:
  template <int kM, int kN>
  static __device__ __forceinline__ void clear(Accumulator (&x)[kM][kN]) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[m][n].r[e] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void store_ds(const Accumulator (&ds)[S::kTilesM][S::kTilesN],
                                           int first) const {
    const int thread = afresh(static_cast<int>(threadIdx.x));
    const uint32_t lane_row = lane_pair<typename S::TileDs>(thread % 32) +
                              thread / 32 * S::kWarpKeys * S::TileDs::kRowBytes;
#pragma unroll
    for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < S::kTilesN; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(
                           pair_of<typename S::TileDs>(lane_row, first / 8 + n, 16 * m + 8 * r) +
                           shared_.ds),
                       "r"(pack<T>(ds[m][n].r[2 * r], ds[m][n].r[2 * r + 1])));
        }
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void multiply_ds(Accumulator (&dq)[S::kStepM / 16][S::kColumnsQ / 8],
                                              uint32_t ds_lane, uint32_t k_lane, int columns,
                                              F stored) const {
#pragma unroll
    for (int step = 0; step < S::kBlockN / 16; ++step) {
      if (!stored(step / S::kTilesM)) continue;
      FragmentA a[S::kStepM / 16];
#pragma unroll
      for (int m = 0; m < S::kStepM / 16; ++m) {
        ldmatrix_transposed(a[m].r, S::TileDs::step_of(ds_lane, m, 16 * step) + shared_.ds);
      }
#pragma unroll
      for (int d = 0; d < S::kColumnsQ / 8; d += 2) {
        if (S::kGeneral && 8 * d >= columns) break;
        uint32_t b[4];
        ldmatrix_transposed(b, S::TileKv::step_of(k_lane, d / 2, 16 * step) + shared_.k);
#pragma unroll
        for (int m = 0; m < S::kStepM / 16; ++m) {
          mma<T>(dq[m][d], a[m], b[0], b[1], dq[m][d]);
          mma<T>(dq[m][d + 1], a[m], b[2], b[3], dq[m][d + 1]);
        }
      }
    }
  }

  // x += a b, a: keys x queries in accumulators, b: queries x columns in a shared tile.
  __device__ __forceinline__ void add_product(Accumulator (&x)[S::kTilesM][S::kTilesD],
                                              const Accumulator (&a)[S::kTilesM][S::kTilesN],
                                              uint32_t b_tile, int first, int columns) {
    const uint32_t b_lane = afresh(q_);
#pragma unroll
    for (int step = 0; step < S::kStepM / 16; ++step) {
      FragmentA operand[S::kTilesM];
#pragma unroll
      for (int m = 0; m < S::kTilesM; ++m) {
        operand[m] = operand_of<T>(a[m][2 * step], a[m][2 * step + 1]);
      }
#pragma unroll
      for (int d = 0; d < S::kTilesD; d += 2) {
        if (S::kGeneral && 8 * d >= columns) break;
        uint32_t b[4];
        ldmatrix_transposed(b, S::TileQ::step_of(b_lane, d / 2, first + 16 * step) + b_tile);
#pragma unroll
        for (int m = 0; m < S::kTilesM; ++m) {
          mma<T>(x[m][d], operand[m], b[0], b[1], x[m][d]);
          mma<T>(x[m][d + 1], operand[m], b[2], b[3], x[m][d + 1]);
        }
      }
    }
  }

  const BackwardShared<S>& shared_;
  uint32_t q_;  // this lane's place in a tile of queries
  int lane_;
};

}  // namespace fl
