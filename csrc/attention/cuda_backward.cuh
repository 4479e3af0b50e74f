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

// To a number in global memory, kBytes behind `address`.
template <int kBytes>
__device__ __forceinline__ void add_global(uint64_t address, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0 + %2], %1;" ::"l"(address), "f"(value),
               "n"(kBytes)
               : "memory");
}

// What a block adds up, and its products. Row 16 m + 8 r + lane / 4 of the warp is a key.
template <class S>
class BackwardWarp {
  using T = typename S::T;

 public:
  // column: of q, k and dout, where those of dq, dk and dv begin.
  __device__ __forceinline__ BackwardWarp(const BackwardShared<S>& shared, int warp, int lane,
                                          int column)
      : shared_(shared), lane_(lane) {
    q_ = S::TileQ::template lane_b_transposed<Order::kPaired>(shared.k, lane) +
         column / S::kPanel * S::TileQ::kPanelBytes;
    clear(dk);
    clear(dv);
  }

  // dv += p' do, dk += ds' q for queries from row `first` of the block on; ds' to shared memory.
  // columns, columns_v: how many of kColumns there are.
  __device__ __forceinline__ void add(const GradientTile<S>& tile, int first, int columns,
                                      int columns_v) {
    Operands p, ds;
    to_operands(p, tile.s);
    to_operands(ds, tile.dp);
    if constexpr (sizeof(T) == 2) {
      store_ds(ds, first);
    } else {
      store_ds(tile.dp, first);
    }
    add_product(dv, p, shared_.dout, first, columns_v);
    add_product(dk, ds, shared_.q, first, columns);
  }

  // dq += ds k of queries from row m0 of the sequence and `row` of the scratch memory on, to global
  // memory. j0: the block's first key; column: as above.
  __device__ __forceinline__ void add_dq(const BackwardScratch& scratch, const Sequence& sequence,
                                         int64_t row, int m0, int j0, int column,
                                         int head_dim) const {
    const int warp = opaque(threadIdx.x) / 32;
    const int first = warp / S::kWarpsD * S::kStepM, i0 = m0 + first;
    if (i0 >= sequence.seqlen_q) return;
    const VisibleKeys keys(sequence, i0, i0 + S::kStepM);
    // Whether the keys of warp w have stored ds of these queries.
    const auto stored = [&](int w) {
      return !keys.none(j0 + w * S::kWarpKeys, j0 + (w + 1) * S::kWarpKeys);
    };
    constexpr int kWidth = S::kWarpsD * S::kColumnsQ;
#pragma unroll 1
    for (int pass = 0; pass < S::kColumns / kWidth; ++pass) {
      const int to = column + pass * kWidth + warp % S::kWarpsD * S::kColumnsQ;
      if (S::kGeneral && to >= head_dim) break;
      add_columns(scratch, row + first, first, to, head_dim - to, stored);
    }
  }

  // x times factor to the warp's rows of a tile of T, which has `columns`.
  __device__ __forceinline__ void stage(const Accumulator (&x)[S::kTilesM][S::kTilesD],
                                        uint32_t tile, int columns, float factor) const {
    const uint32_t place = S::TileKv::lane_accumulator(tile, lane_);
#pragma unroll
    for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
      for (int d = 0; d < S::kTilesD; ++d) {
        if (S::kGeneral && 8 * d >= columns) break;
        Accumulator scaled = x[m][d];
#pragma unroll
        for (int e = 0; e < 4; ++e) scaled.r[e] *= factor;
        S::TileKv::store(place, 16 * m, d, scaled);
      }
    }
  }

  Accumulator dk[S::kTilesM][S::kTilesD], dv[S::kTilesM][S::kTilesD];

 private:
  static constexpr int kSize = sizeof(T);

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

  // Accumulators, keys x queries, as operands of products over the queries.
  using Operands = FragmentA<T>[S::kStepM / kDepth<T>][S::kTilesM];
  static __device__ __forceinline__ void to_operands(
      Operands& to, const Accumulator (&x)[S::kTilesM][S::kTilesN]) {
#pragma unroll
    for (int step = 0; step < S::kStepM / kDepth<T>; ++step) {
#pragma unroll
      for (int m = 0; m < S::kTilesM; ++m) {
        to_fragment_a<T>(to[step][m], &x[m][step * kDepth<T> / 8]);
      }
    }
  }

  // This lane's place in the warp's rows of ds, for queries from row `first` of the block on.
  __device__ __forceinline__ uint32_t place_of_ds(int first) const {
    const unsigned thread = opaque(threadIdx.x);
    const uint32_t rows = shared_.ds + thread / 32 * S::kWarpKeys * S::TileDs::kRowBytes;
    return S::TileDs::moved(S::TileDs::lane_accumulator(rows, thread % 32), 0, first * kSize / 16);
  }
  __device__ __forceinline__ void store_ds(const Accumulator (&ds)[S::kTilesM][S::kTilesN],
                                           int first) const {
    const uint32_t place = place_of_ds(first);
#pragma unroll
    for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < S::kTilesN; ++n) {
        S::TileDs::store(place, 16 * m, n, ds[m][n]);
      }
    }
  }
  // 16-bit numbers: the words of the operands, which are rounded already.
  __device__ __forceinline__ void store_ds(const Operands& ds, int first) const {
    const uint32_t place = place_of_ds(first);
#pragma unroll
    for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
      for (int step = 0; step < S::kStepM / 16; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t to = S::TileDs::moved(place, 16 * m + i % 2 * 8, 2 * step + i / 2);
          shared_at<uint32_t>(to) = ds[step][m].r[i];
        }
      }
    }
  }

  // The same for the warp's kStepM queries from row `first` of the block on and kColumnsQ columns.
  template <class F>
  __device__ __forceinline__ void add_columns(const BackwardScratch& scratch, int64_t row,
                                              int first, int column, int columns, F stored) const {
    const int lane = opaque(threadIdx.x) % 32;
    const uint32_t ds_lane =
        S::TileDs::moved(S::TileDs::lane_a_transposed(shared_.ds, lane), 0, first * kSize / 16);
    const uint32_t k_lane =
        S::TileKv::moved(S::TileKv::lane_b_transposed(shared_.k, lane), 0, column * kSize / 16);
    Accumulator dq[S::kStepM / 16][S::kColumnsQ / 8];
    clear(dq);
    if (stored(0) && stored(S::kWarps - 1)) {  // and all between
      multiply_ds(dq, ds_lane, k_lane, columns, [](int) { return true; });
    } else {
      multiply_ds(dq, ds_lane, k_lane, columns, stored);
    }
    const int cells = S::kGeneral ? scratch.columns / 8 : S::kDim / 8;  // in 16 rows
    const uint64_t to =
        opaque(__cvta_generic_to_global(scratch.dq_tile(row, column, cells) + lane));
#pragma unroll
    for (int m = 0; m < S::kStepM / 16; ++m) {
      unrolled<S::kColumnsQ / 8>([&](auto d) {
        if (S::kGeneral && 8 * d >= columns) return;
        unrolled<4>([&](auto e) {
          add_global<(d * 128 + e * 32) * sizeof(float)>(to + m * cells * 128 * sizeof(float),
                                                         dq[m][d].r[e]);
        });
      });
    }
  }

  template <class F>
  __device__ __forceinline__ void multiply_ds(Accumulator (&dq)[S::kStepM / 16][S::kColumnsQ / 8],
                                              uint32_t ds_lane, uint32_t k_lane, int columns,
                                              F stored) const {
#pragma unroll
    for (int step = 0; step < S::kBlockN / kDepth<T>; ++step) {
      if (!stored(step * kDepth<T> / S::kWarpKeys)) continue;
      FragmentA<T> a[S::kStepM / 16];
#pragma unroll
      for (int m = 0; m < S::kStepM / 16; ++m) {
        S::TileDs::load_a_transposed(a[m], ds_lane, m, kDepth<T> * step);
      }
#pragma unroll
      for (int d = 0; d < S::kColumnsQ / 8; d += 2) {
        if (S::kGeneral && 8 * d >= columns) break;
        FragmentB<T> b[2];
        S::TileKv::load_b_transposed(b, k_lane, d / 2, kDepth<T> * step);
#pragma unroll
        for (int m = 0; m < S::kStepM / 16; ++m) {
          mma<T>(dq[m][d], a[m], b[0], dq[m][d]);
          mma<T>(dq[m][d + 1], a[m], b[1], dq[m][d + 1]);
        }
      }
    }
  }

  // x += a b, a: keys x queries, b: queries x columns in a shared tile.
  __device__ __forceinline__ void add_product(Accumulator (&x)[S::kTilesM][S::kTilesD],
                                              const Operands& a, uint32_t b_tile, int first,
                                              int columns) {
    const LanePlace<S, typename S::TileQ> queries(shared_, q_, b_tile, first);
#pragma unroll
    for (int step = 0; step < S::kStepM / kDepth<T>; ++step) {
#pragma unroll
      for (int d = 0; d < S::kTilesD; d += 2) {
        if (S::kGeneral && 8 * d >= columns) break;
        FragmentB<T> b[2];
        S::TileQ::template load_b_transposed<Order::kPaired>(b, queries.address, d / 2,
                                                             queries.row + kDepth<T> * step);
#pragma unroll
        for (int m = 0; m < S::kTilesM; ++m) {
          mma<T>(x[m][d], a[step][m], b[0], x[m][d]);
          mma<T>(x[m][d + 1], a[step][m], b[1], x[m][d + 1]);
        }
      }
    }
  }

  const BackwardShared<S>& shared_;
  uint32_t q_;  // this lane's place in a tile of queries
  int lane_;
};

}  // namespace fl
