// Attention forward on tensor cores: o[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j], float16 and
// bfloat16 with float32 sums.
//
// One block per (batch, query head, kBlockM rows of q); its four warps split the rows, so that the
// softmax of a row stays within four lanes, and probabilities go from the accumulators of q k'
// straight into the operands of p v. Keys and values pass through one shared tile each: while the
// one is used the other arrives. Reads q once, k and v ceil(seqlen_q / kBlockM) times; writes o and
// lse once.
#pragma once

#include "attention/cuda_scores.cuh"
#include "common/codegen.cuh"
#include "common/shared_tile.cuh"

namespace fl {

constexpr float kLargest = 1024.0f;  // sum of a lane's terms in a tile

template <class T_, int kDim_, int kBlockN_, int kTilesM_, bool kGeneral_, int kWarps_ = 4>
struct ForwardShape {
  using T = T_;
  static constexpr int kDim = kDim_, kBlockN = kBlockN_;  // head_dim and head_dim_v, filled up
  static constexpr int kTilesM = kTilesM_;                // of 16 rows, per warp
  static constexpr bool kGeneral = kGeneral_;             // ScoreRules or dropout
  static constexpr bool kNatural = kGeneral;  // shifts are in natural units, not in powers of 2
  static constexpr bool kKeepsQ = kDim <= 64 && sizeof(T) == 2;  // its fragments stay in registers
  static constexpr bool kExact = kDim <= 32;  // sums as short as that show what float32 leaves out
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kTilesM, kBlockM = kWarps * kWarpRows;
  static constexpr int kTilesN = kBlockN / 8, kTilesD = kDim / 8, kSteps = kDim / kDepth<T>;
  using TileQ = SharedTile<T, kBlockM, kDim>;
  using TileKv = SharedTile<T, kBlockN, kDim>;
  static constexpr int kSharedBytes = TileQ::kBytes + 2 * TileKv::kBytes;
};

// The rows of one warp: scores, their softmax so far, and the output before its division. Row
// 2 m + r of a lane is row 16 m + 8 r + lane / 4 of the warp.
template <class S>
class ForwardWarp {
  using T = typename S::T;

 public:
  // q: the warp's rows of the tile; nothing is visible yet.
  __device__ __forceinline__ void start(uint32_t q, uint32_t k, uint32_t v, int lane) {
    q_ = S::TileQ::lane_a(q, lane);
    k_ = S::TileKv::lane_b(k, lane);
    v_ = S::TileKv::template lane_b_transposed<Order::kPaired>(v, lane);
#pragma unroll
    for (int row = 0; row < 2 * S::kTilesM; ++row) {
      shift_[row] = -INFINITY;
      sum_[row] = 0.0f;
    }
    clear(output_);
  }

  __device__ __forceinline__ void load_q() {
    if constexpr (S::kKeepsQ) {
#pragma unroll
      for (int step = 0; step < S::kSteps; ++step) {
#pragma unroll
        for (int m = 0; m < S::kTilesM; ++m) read_q(kept_[step][m], step, m);
      }
    }
  }

  // scores = q k'
  __device__ __forceinline__ void multiply_k() {
    // float32: products of many steps at a time, which do not wait for each other, need more
    // registers than there are.
    constexpr bool kFloat = sizeof(T) == 4;
    constexpr int kStepsAtOnce = kFloat ? 2 : S::kSteps;
    const Accumulator zero = {{0.0f, 0.0f, 0.0f, 0.0f}};
    if (kFloat) clear(scores_);
#pragma unroll(kStepsAtOnce)
    for (int step = 0; step < S::kSteps; ++step) {
      FragmentA<T> q[S::kTilesM];
#pragma unroll
      for (int m = 0; m < S::kTilesM; ++m) {
        if constexpr (S::kKeepsQ) {
          q[m] = kept_[step][m];
        } else {
          read_q(q[m], step, m);
        }
      }
#pragma unroll
      for (int n = 0; n < S::kTilesN; n += 2) {
        FragmentB<T> b[2];
        S::TileKv::load_b(b, k_, step, 8 * n);
#pragma unroll
        for (int m = 0; m < S::kTilesM; ++m) {
          mma<T, S::kExact>(scores_[m][n], q[m], b[0], kFloat || step ? scores_[m][n] : zero);
          mma<T, S::kExact>(scores_[m][n + 1], q[m], b[1],
                            kFloat || step ? scores_[m][n + 1] : zero);
        }
      }
    }
  }

  // scores = f(score, row of the warp, column of the tile)
  template <class F>
  __device__ __forceinline__ void map(int lane, F f) {
#pragma unroll
    for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < S::kTilesN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = 16 * m + 8 * (e / 2) + lane / 4, column = 8 * n + 2 * (lane % 4) + e % 2;
          scores_[m][n].r[e] = f(scores_[m][n].r[e], row, column);
        }
      }
    }
  }

  // Hides what a bool mask does not show. The warp's first query is i0, the tile's first key j0;
  // whole: the mask has words there.
  __device__ __forceinline__ void hide(const ScoreRules& rules, const Sequence& sequence, int i0,
                                       int j0, bool whole, int lane) {
    if (whole) {
      hide(lane, [&](int row, int column) { return rules.shown(i0 + row, j0 + column); });
    } else {
      hide(lane, [&](int row, int column) { return rules.shown(i0 + row, j0 + column, sequence); });
    }
  }

  // Adds an additive mask, likewise.
  __device__ __forceinline__ void add_mask(const ScoreRules& rules, const Sequence& sequence,
                                           int i0, int j0, bool whole, int lane) {
    const int i = i0 + lane / 4, t = lane % 4;
    if (!whole) {
      add_pairs([&](int row, int column, float2& low, float2& high) {
        const int q = opaque(i) + row, k = opaque(j0) + column + 2 * t;
        low = {rules.added(q, k, sequence), rules.added(q, k + 1, sequence)};
        high = {rules.added(q, k + 8, sequence), rules.added(q, k + 9, sequence)};
      });
    } else if (rules.has_halves()) {
      // Lane t of four reads keys 4 t to 4 t + 3 and wants 2 t, 2 t + 1, 2 t + 8 and 2 t + 9: one
      // word comes from the lanes 0 and 1, which read the lower keys, one from 2 and 3.
      const bool upper = t / 2, odd = t % 2;
      add_pairs([&](int row, int column, float2& low, float2& high) {
        const auto* place = rules.mask_place<uint16_t>(i + row, j0 + column + 4 * t);
        const uint2 own = *reinterpret_cast<const uint2*>(place);
        const uint32_t x = __shfl_sync(~0u, upper ? own.y : own.x, t / 2 + 2 * odd, 4);
        const uint32_t y = __shfl_sync(~0u, upper ? own.x : own.y, t / 2 + 2 * !odd, 4);
        low = rules.of_halves(odd ? y : x);
        high = rules.of_halves(odd ? x : y);
      });
    } else {
      add_pairs([&](int row, int column, float2& low, float2& high) {
        const auto* place = rules.mask_place<float>(i + row, j0 + column + 2 * t);
        low = *reinterpret_cast<const float2*>(place);
        high = *reinterpret_cast<const float2*>(place + 8);
      });
    }
  }

  // scores = exp2(scale * scores - shift), where the shifts of earlier tiles serve. False, and
  // nothing but scores has changed, where some became too large or a row has no shift yet.
  //
  // A running maximum would keep every term below 1. Terms below kLargest do as well: they cost no
  // accuracy, and a maximum is looked for only where their sum says that one is needed.
  __device__ __forceinline__ bool exponentiate(float scale) {
    float sums[2 * S::kTilesM];
    float all = 0.0f;  // infinite or NaN where a row's sum is
#pragma unroll
    for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
      for (int row = 2 * m; row < 2 * m + 2; ++row) {
        all += sums[row] = exponentiate_row(row, scale);
      }
      pack_scores(m);
    }
    if (!__all_sync(~0u, all <= kLargest)) return false;
#pragma unroll
    for (int row = 0; row < 2 * S::kTilesM; ++row) sum_[row] += sums[row];
    return true;
  }

  // The same with each row's maximum so far as its shift; output and sums follow.
  __device__ __forceinline__ void renew(float scale) {
    float shrink[2 * S::kTilesM];
    bool moved = false;
#pragma unroll
    for (int row = 0; row < 2 * S::kTilesM; ++row) {
      const float before = shift_[row], now = fmaxf(before, row_max(row) * scale);
      // Nothing has been summed up yet where there is no shift.
      shrink[row] = before == -INFINITY
                        ? 1.0f
                        : exp2_approx(S::kNatural ? (before - now) * kLog2e : before - now);
      moved |= shrink[row] != 1.0f;
      shift_[row] = now == -INFINITY ? 0.0f : now;
      sum_[row] = fmaf(sum_[row], shrink[row], exponentiate_row(row, scale));
      shift_[row] = now;
    }
    if (!__any_sync(~0u, moved)) return;
#pragma unroll
    for (int row = 0; row < 2 * S::kTilesM; ++row) {
#pragma unroll
      for (int d = 0; d < S::kTilesD; ++d) {
        output_[row / 2][d].r[2 * (row % 2)] *= shrink[row];
        output_[row / 2][d].r[2 * (row % 2) + 1] *= shrink[row];
      }
    }
  }

  // Zeroes dropped scores; key j of the decisions is j0 plus the column. csrc/common/philox.h.
  __device__ __forceinline__ void drop(const Dropout& dropout, uint32_t bh, int first_row, int j0,
                                       int lane) {
    const int first = S::kBlockN < 64 ? j0 % 64 / 16 : 0;  // of the 64 keys that share a counter
#pragma unroll
    for (int row = 0; row < 2 * S::kTilesM; ++row) {
      const auto i = static_cast<uint32_t>(first_row + 8 * row + lane / 4);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const auto c0 = static_cast<uint32_t>(j0 / 64 * 8 + lane % 4 * 2 + e);
        const PhiloxWords random = philox4x32_10(c0, i, bh, dropout.offset, dropout.seed);
#pragma unroll
        for (int n = 0; n < S::kTilesN; ++n) {
          const int at = first + n / 2;
          const uint32_t word = at == 0   ? random.word[0]
                                : at == 1 ? random.word[1]
                                : at == 2 ? random.word[2]
                                          : random.word[3];
          float& x = scores_[row / 2][n].r[2 * (row % 2) + e];
          x = (word >> 16 * (n % 2) & 0xffff) >= dropout.threshold ? x : 0.0f;
        }
      }
    }
  }

  // The scores of 16 rows as operands of multiply_v: 16-bit ones take half of the registers.
  __device__ __forceinline__ void pack_scores(int m) {
    if constexpr (kPacks) {
#pragma unroll
      for (int step = 0; step < kStepsV; ++step) read_scores(packed_[step][m], step, m);
    }
  }

  // output += packed scores v
  __device__ __forceinline__ void multiply_v() {
#pragma unroll
    for (int step = 0; step < kStepsV; ++step) {
      FragmentA<T> p[S::kTilesM];
#pragma unroll
      for (int m = 0; m < S::kTilesM; ++m) {
        if constexpr (kPacks) {
          p[m] = packed_[step][m];
        } else {
          read_scores(p[m], step, m);
        }
      }
#pragma unroll
      for (int d = 0; d < S::kTilesD; d += 2) {
        FragmentB<T> b[2];
        S::TileKv::template load_b_transposed<Order::kPaired>(b, v_, d / 2, kDepth<T> * step);
#pragma unroll
        for (int m = 0; m < S::kTilesM; ++m) {
          mma<T, S::kExact>(output_[m][d], p[m], b[0], output_[m][d]);
          mma<T, S::kExact>(output_[m][d + 1], p[m], b[1], output_[m][d + 1]);
        }
      }
    }
  }

  // Divides by the sums, `sink` (natural units, -inf: none) being one more term of each, and
  // returns the lse of every row.
  __device__ __forceinline__ void finish(float sink, float factor, float (&lse)[2 * S::kTilesM]) {
#pragma unroll
    for (int row = 0; row < 2 * S::kTilesM; ++row) {
      float sum = sum_[row];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const float own = S::kNatural ? shift_[row] : shift_[row] * kLn2, top = fmaxf(own, sink);
      const float shrink = own == -INFINITY ? 0.0f : exp2f((own - top) * kLog2e);
      if (sink != -INFINITY) sum = sum * shrink + exp2f((sink - top) * kLog2e);
      const float share = sum > 0.0f ? factor * shrink / sum : sum == 0.0f ? 0.0f : sum;
      lse[row] = sum == 0.0f ? -INFINITY : fmaf(log2f(sum), kLn2, top);
#pragma unroll
      for (int d = 0; d < S::kTilesD; ++d) {
        output_[row / 2][d].r[2 * (row % 2)] *= share;
        output_[row / 2][d].r[2 * (row % 2) + 1] *= share;
      }
    }
  }

  // The output to the warp's rows of a tile, which begin at q.
  __device__ __forceinline__ void stage_output(uint32_t q, int lane) const {
    const uint32_t to = S::TileQ::lane_accumulator(q, lane);
#pragma unroll
    for (int m = 0; m < S::kTilesM; ++m) {
#pragma unroll
      for (int d = 0; d < S::kTilesD; ++d) S::TileQ::store(to, 16 * m, d, output_[m][d]);
    }
  }

 protected:
  static constexpr bool kPacks = sizeof(T) == 2;
  static constexpr int kStepsV = S::kBlockN / kDepth<T>;

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

  // Hides what shown(row, column), 8 bits for as many columns, does not show.
  template <class F>
  __device__ __forceinline__ void hide(int lane, F shown) {
    constexpr int kTiles = S::kTilesN < 4 ? S::kTilesN : 4;  // a lane's 8 columns, four lanes' 32
    const int t = lane % 4;
#pragma unroll
    for (int row = 0; row < 2 * S::kTilesM; ++row) {
#pragma unroll
      for (int first = 0; first < S::kTilesN; first += kTiles) {
        uint32_t bits = 0;
        if (t < kTiles) bits = shown(8 * row + lane / 4, 8 * (first + t)) << 8 * t;
        bits |= __shfl_xor_sync(~0u, bits, 1);
        bits |= __shfl_xor_sync(~0u, bits, 2);
        bits >>= 2 * t;  // 8 n and 8 n + 1 are the lane's
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = scores_[row / 2][first + n].r[2 * (row % 2) + e];
            x = bits >> (8 * n + e) & 1 ? x : -INFINITY;
          }
        }
      }
    }
  }

  // Adds what f(row, column, low, high) says to the lane's scores in `row` of those that it begins
  // with, and in columns 0 and 1 (low), 8 and 9 (high) from `column` on.
  template <class F>
  __device__ __forceinline__ void add_pairs(F f) {
#pragma unroll
    for (int row = 0; row < 2 * S::kTilesM; ++row) {
#pragma unroll
      for (int n = 0; n < S::kTilesN; n += 2) {
        float2 x[2];
        f(8 * row, 8 * n, x[0], x[1]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          scores_[row / 2][n + half].r[2 * (row % 2)] += x[half].x;
          scores_[row / 2][n + half].r[2 * (row % 2) + 1] += x[half].y;
        }
      }
    }
  }

  __device__ __forceinline__ void read_q(FragmentA<T>& q, int step, int m) const {
    S::TileQ::load_a(q, q_, step, 16 * m);
  }

  __device__ __forceinline__ void read_scores(FragmentA<T>& p, int step, int m) const {
    to_fragment_a<T>(p, &scores_[m][step * kDepth<T> / 8]);
  }

  __device__ __forceinline__ float exponentiate_row(int row, float scale) {
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < S::kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = scores_[row / 2][n].r[2 * (row % 2) + e];
        // A mask of the most negative numbers has no product with log2 e, but differences from it.
        x = exp2_approx(S::kNatural ? (x - shift_[row]) * kLog2e : fmaf(x, scale, -shift_[row]));
        sum += x;
      }
    }
    return sum;
  }

  __device__ __forceinline__ float row_max(int row) const {
    float top = -INFINITY;
#pragma unroll
    for (int n = 0; n < S::kTilesN; ++n) {
      const Accumulator& x = scores_[row / 2][n];
      top = fmaxf(top, fmaxf(x.r[2 * (row % 2)], x.r[2 * (row % 2) + 1]));
    }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    return fmaxf(top, __shfl_xor_sync(~0u, top, 2));
  }

  uint32_t q_, k_, v_;  // this lane's addresses in the tiles
  FragmentA<T> packed_[kPacks ? kStepsV : 1][S::kTilesM];
  FragmentA<T> kept_[S::kKeepsQ ? S::kSteps : 1][S::kTilesM];
  Accumulator scores_[S::kTilesM][S::kTilesN], output_[S::kTilesM][S::kTilesD];
  float shift_[2 * S::kTilesM];  // in powers of 2; where general, in natural units
  float sum_[2 * S::kTilesM];    // of the lane's own columns
};

}  // namespace fl
