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
    const int wd = warp % S::kWarpsD, wm = warp / S::kWarpsD;
    q_ = S::TileQ::step_of(S::TileQ::lane_transposed(0, lane), column / 16, 0);
    k_ = S::TileKv::step_of(S::TileKv::lane_transposed(0, lane), (column + wd * S::kColumnsQ) / 16,
                            0);
    ds_ = S::TileDs::step_of(S::TileDs::lane_b(0, lane), wm * (S::kStepM / 16), 0);
    ds_rows_ = lane_pair<typename S::TileDs>(lane) + warp * S::kWarpKeys * S::TileDs::kRowBytes;
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

  // dq += ds k, of the warp's kStepM queries and kColumnsQ columns, to global memory. stored(w):
  // whether the keys of warp w have stored ds of these queries.
  template <class F>
  __device__ __forceinline__ void add_dq(float* to, int row_stride, int columns, F stored) const {
    Accumulator dq[S::kStepM / 16][S::kColumnsQ / 8];
    clear(dq);
    if (!S::kGeneral && stored(0) && stored(S::kWarps - 1)) {  // and all between
      multiply_ds(dq, columns, [](int) { return true; });
    } else {
      multiply_ds(dq, columns, stored);
    }
#pragma unroll
    for (int m = 0; m < S::kStepM / 16; ++m) {
#pragma unroll
      for (int d = 0; d < S::kColumnsQ / 8; ++d) {
        if (S::kGeneral && 8 * d >= columns) break;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          atomicAdd(to + m * row_stride + d * 128 + e * 32, dq[m][d].r[e]);
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
    const uint32_t lane_row = afresh(ds_rows_);
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
                                              int columns, F stored) const {
    const uint32_t ds_lane = afresh(ds_), k_lane = afresh(k_);
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
  uint32_t q_, k_, ds_, ds_rows_;  // this lane's places in the tiles, and the warp's rows of ds
  int lane_;
};

}  // namespace fl
