// Probabilities and score gradients of one warp's keys and a step of queries, in registers: the
// products k q' and v do', turned so that p' and ds' are operands of dv += p' do and dk += ds' q.
#pragma once

#include "attention/cuda_backward_shape.cuh"
#include "common/codegen.cuh"

namespace fl {

// Row 0 of a sequence in head h of batch b of x; `first` rows lie before it.
template <class T>
__device__ __forceinline__ T* head_of(const TensorView4& x, int64_t b, int64_t h, int64_t first) {
  return static_cast<T*>(x.data) + b * x.stride_b + h * x.stride_h + first * x.stride_s;
}

// Rows from `row` on to a shared tile; in general by panels, as many as there are columns.
template <class Tile, class S>
__device__ __forceinline__ void copy_rows(uint32_t tile, const typename S::T* x, int64_t stride,
                                          int row, int rows, int columns) {
  using T = typename S::T;
  const unsigned thread = opaque(threadIdx.x);
  if constexpr (S::kGeneral) {
    using Panel = SharedTile<T, Tile::kRows, Tile::kPanel>;
    for (int column = 0; column < columns; column += Tile::kPanel) {
      TileCopy<Panel, S::kThreads, T>(tile, x + column, stride, row, rows,
                                      min(columns - column, Tile::kPanel), static_cast<int>(thread))
          .next();
      tile += Panel::kBytes;
    }
  } else {
    TileCopy<Tile, S::kThreads, T>(tile, x, stride, row, rows, columns, static_cast<int>(thread))
        .next();
  }
}

// Data of kBlockM rows to shared memory.
template <class S>
__device__ __forceinline__ void copy_row_data(const float* from, uint32_t to) {
  const unsigned thread = opaque(threadIdx.x);
  static_assert(S::kBlockM <= S::kThreads);
  if (thread < S::kBlockM) copy_async(to + thread * kRowBytes, from + thread * 4, kRowBytes);
}

__device__ __forceinline__ Dropout read_dropout(const AttentionForward& f) {
  Dropout dropout = f.dropout;
  if (f.dropout_rng) {
    dropout.seed = static_cast<uint64_t>(f.dropout_rng[0]);
    dropout.offset = static_cast<uint32_t>(f.dropout_rng[1]);
  }
  return dropout;
}

// Where the warp is: its first key and the step's first query, and what decides about a pair.
struct TilePlace {
  int b, h, i0, j0;
};

// Where a lane reads in a tile of queries or keys: an address that is not kept over the loop, and a
// number of rows from there, which is known when compiled, but in general. lane_address: in the
// block's first tile.
template <class S, class Tile>
struct LanePlace {
  uint32_t address;
  int row;

  __device__ __forceinline__ LanePlace(const BackwardShared<S>& shared, uint32_t lane_address,
                                       uint32_t tile, int first) {
    address = opaque(lane_address);
    row = static_cast<int>(tile - shared.k) / Tile::kRowBytes + first;
    if constexpr (S::kGeneral) {
      address += row * Tile::kRowBytes;
      row = 0;
    }
  }
};

// exp(x) for an x below 1 or NaN. x log2(e) is rounded, and its power loses as much as the product:
// too much for float32, so that there its whole and broken parts go separate ways.
template <class T>
__device__ __forceinline__ float exp_of(float x) {
  if constexpr (sizeof(T) == 2) return exp2_approx(x * kLog2e);
  x = x < -128.0f ? -128.0f : x;  // exp gives 0
  const float whole = rintf(x * kLog2e);
  return exp2_approx(whole) * exp2_approx(fmaf(x, kLog2e, -whole));
}

template <class S>
class GradientTile {
  using T = typename S::T;

 public:
  __device__ __forceinline__ GradientTile(const BackwardShared<S>& shared, int warp, int lane)
      : shared_(shared),
        a_(S::TileKv::lane_a(shared.k + warp * S::kWarpKeys * S::TileKv::kRowBytes, lane)),
        b_(opaque(S::TileQ::lane_b(shared.k, lane))),
        lane_(lane) {}

  // s = k q', dp = v do' (less delta, unless general) for queries from row `first` of the block on.
  __device__ __forceinline__ void multiply(int first, int head_dim, int head_dim_v) {
    product<false>(s, shared_.k, shared_.q, first, head_dim);
    product<!S::kGeneral>(dp, shared_.v, shared_.dout, first, head_dim_v);
  }

  // s to p, dp to ds. Hidden scores are -inf.
  __device__ __forceinline__ void differentiate(int first, float scale) {
    const uint32_t row = row_data(first);
#pragma unroll
    for (int n = 0; n < S::kTilesN; ++n) {
      const float2 minus_lse = shared_at<float2>(row + 8 * n * kRowBytes);
#pragma unroll
      for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& p = s[m][n].r[e];
          p = exp2_approx(fmaf(p, scale, e % 2 ? minus_lse.y : minus_lse.x));
          dp[m][n].r[e] *= p;
        }
      }
    }
  }

  // Hides the scores of pairs that do not see each other.
  __device__ __forceinline__ void hide(const Sequence& sequence, const TilePlace& at) {
    const int lane = opaque(threadIdx.x) % 32;
    const int key = at.j0 + lane / 4, query = at.i0 + lane % 4 * 2;
    const int behind_end = key - query - sequence.end_offset;
    const int behind_begin = key - query - sequence.begin_offset;
    const int behind_last = key - sequence.seqlen_k;
    map([&](int m, int n, int e) {
      const int rows = 16 * m + e / 2 * 8, columns = 8 * n + e % 2;
      const bool visible = behind_end + rows - columns < 0 && behind_last + rows < 0 &&
                           behind_begin + rows - columns >= 0;
      s[m][n].r[e] = visible ? s[m][n].r[e] : -INFINITY;
    });
  }

  // s to p, dp to dropout(dp), with all rules; f(p, dropped p, dropped dp, minus_delta, slope of
  // the softcap, m, n, e) leaves there what it wants.
  template <class F>
  __device__ __forceinline__ void differentiate(const AttentionForward& p, const Sequence& sequence,
                                                const ScoreRules& rules, const Dropout& dropout,
                                                const TilePlace& at, int first, F f) {
    const float factor = dropout.enabled() ? dropout.scale() : 1.0f;
    const bool all =
        at.i0 + S::kStepM <= sequence.seqlen_q &&
        VisibleKeys(sequence, at.i0, at.i0 + S::kStepM).all(at.j0, at.j0 + S::kWarpKeys);
#pragma unroll
    for (int n = 0; n < S::kTilesN; ++n) {
      const uint32_t row = row_data(first + 8 * n);
      const float2 minus_lse = shared_at<float2>(row);
      const float2 normalizer = shared_at<float2>(row + 8);
      const float2 minus_delta = shared_at<float2>(row + 16);
      float slopes[S::kTilesM][4];
      shape(n, p, sequence, rules, at, slopes);
      if (!all) hide(n, sequence, at);
#pragma unroll
      for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const uint32_t random =
              dropout.enabled() ? random_of(p, dropout, at, query_of(at, n, c), m) : 0;
#pragma unroll
          for (int e = c; e < 4; e += 2) {
            const float x = s[m][n].r[e] + (c ? minus_lse.y : minus_lse.x);
            const float probability = exp_of<T>(x) * (c ? normalizer.y : normalizer.x);
            const bool kept = (random >> 16 * (e / 2) & 0xffff) >= dropout.threshold;
            f(probability, kept ? probability : 0.0f, kept ? dp[m][n].r[e] * factor : 0.0f,
              c ? minus_delta.y : minus_delta.x, slopes[m][e], m, n, e);
          }
        }
      }
    }
  }

  // Data of the lane's two columns, from row `first` of the block on.
  __device__ __forceinline__ uint32_t row_data(int first) const {
    return shared_.rows + first * kRowBytes + opaque(threadIdx.x) % 4 * (2 * kRowBytes);
  }
  __device__ __forceinline__ int query_of(const TilePlace& at, int n, int e) const {
    return at.i0 + 8 * n + lane_ % 4 * 2 + e % 2;
  }
  __device__ __forceinline__ int key_of(const TilePlace& at, int m, int e) const {
    return at.j0 + 16 * m + e / 2 * 8 + lane_ / 4;
  }
  template <class F>
  __device__ __forceinline__ void map(F f) const {
#pragma unroll
    for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < S::kTilesN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) f(m, n, e);
      }
    }
  }

  Accumulator s[S::kTilesM][S::kTilesN], dp[S::kTilesM][S::kTilesN];

 private:
  // x = a b' (+ minus_delta of the column), a: the warp's keys, b: the step's queries.
  template <bool kMinusDelta>
  __device__ __forceinline__ void product(Accumulator (&x)[S::kTilesM][S::kTilesN], uint32_t a_tile,
                                          uint32_t b_tile, int first, int dim) {
    const int steps = S::kGeneral ? (dim + kDepth<T> - 1) / kDepth<T> : S::kDim / kDepth<T>;
    const LanePlace<S, typename S::TileKv> keys(shared_, a_, a_tile, 0);
    const LanePlace<S, typename S::TileQ> queries(shared_, b_, b_tile, first);
    const uint32_t row = row_data(first);
    if constexpr (S::kGeneral) map([&](int m, int n, int e) { x[m][n].r[e] = 0.0f; });
#pragma unroll(S::kGeneral ? 1 : S::kDim / kDepth<T>)
    for (int step = 0; step < steps; ++step) {
      FragmentA<T> a[S::kTilesM];
#pragma unroll
      for (int m = 0; m < S::kTilesM; ++m)
        S::TileKv::load_a(a[m], keys.address, step, keys.row + 16 * m);
#pragma unroll
      for (int n = 0; n < S::kTilesN; n += 2) {
        FragmentB<T> b[2];
        S::TileQ::load_b(b, queries.address, step, queries.row + 8 * n);
        const bool begins = !S::kGeneral && step == 0;
#pragma unroll
        for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            Accumulator& to = x[m][n + half];
            if (begins) to = start_of<kMinusDelta>(row + 8 * (n + half) * kRowBytes);
            mma<T>(to, a[m], b[half], to);
          }
        }
      }
    }
  }

  // f(m, e) for the tiles m and elements e of 8 columns.
  template <class F>
  static __device__ __forceinline__ void each(F f) {
#pragma unroll
    for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f(m, e);
    }
  }

  // The scores of 8 columns, number n, from k q': softcap, ALiBi and mask. slopes: of the softcap.
  __device__ __forceinline__ void shape(int n, const AttentionForward& p, const Sequence& sequence,
                                        const ScoreRules& rules, const TilePlace& at,
                                        float (&slopes)[S::kTilesM][4]) {
    each([&](int m, int e) {
      s[m][n].r[e] *= p.softmax_scale;
      slopes[m][e] = 1.0f;
    });
    if (p.softcap > 0.0f) {
      each([&](int m, int e) { s[m][n].r[e] = softcapped(s[m][n].r[e], p.softcap, slopes[m][e]); });
    }
    if (p.alibi_slopes) {
      each(
          [&](int m, int e) { s[m][n].r[e] -= rules.alibi(query_of(at, n, e), key_of(at, m, e)); });
    }
    if (p.mask.kind == MaskKind::kNone) return;
    const int last_i = sequence.seqlen_q - 1, last_j = sequence.seqlen_k - 1;
    each([&](int m, int e) {  // inside of the mask, where hide has yet to come
      const int i = min(query_of(at, n, e), last_i), j = min(key_of(at, m, e), last_j);
      s[m][n].r[e] += rules.mask_at(i, j);
    });
  }
  // Hides those of pairs that do not see each other.
  __device__ __forceinline__ void hide(int n, const Sequence& sequence, const TilePlace& at) {
    each([&](int m, int e) {
      const int i = query_of(at, n, e), j = key_of(at, m, e);
      const bool visible = i < sequence.seqlen_q && j >= sequence.begin(i) && j < sequence.end(i);
      s[m][n].r[e] = visible ? s[m][n].r[e] : -INFINITY;
    });
  }

  // What sums of columns begin with whose row data is at `row`.
  template <bool kMinusDelta>
  static __device__ __forceinline__ Accumulator start_of(uint32_t row) {
    if constexpr (!kMinusDelta) return {};
    const float4 start = shared_at<float4>(row + 16);
    return {start.x, start.y, start.z, start.w};
  }

  // The 16 random bits of keys lane / 4 (lower half) and lane / 4 + 8 of tile m. philox.h.
  __device__ __forceinline__ uint32_t random_of(const AttentionForward& p, const Dropout& dropout,
                                                const TilePlace& at, int i, int m) const {
    const int j = at.j0 + 16 * m;
    const auto counter = static_cast<uint32_t>(j / 64 * 8 + lane_ / 4);
    const auto bh = static_cast<uint32_t>(at.b * p.heads_q + at.h);
    const PhiloxWords random =
        philox4x32_10(counter, static_cast<uint32_t>(i), bh, dropout.offset, dropout.seed);
    const uint32_t low = j & 16 ? random.word[1] : random.word[0];
    const uint32_t high = j & 16 ? random.word[3] : random.word[2];
    return j & 32 ? high : low;
  }

  const BackwardShared<S>& shared_;
  uint32_t a_, b_;  // this lane's places in a tile of keys and of queries
  int lane_;
};

}  // namespace fl
