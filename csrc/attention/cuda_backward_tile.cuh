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
__device__ __forceinline__ void copy_row_data(const float4* from, uint32_t to) {
  const unsigned thread = opaque(threadIdx.x);
  static_assert(S::kBlockM <= S::kThreads);
  if (thread < S::kBlockM) copy_async(to + thread * kRowBytes, from + thread, kRowBytes);
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

// What shown(row, key), 8 bits for as many keys, says of all of the block's queries and keys, to
// shared memory.
template <class S, class F>
__device__ __forceinline__ void store_shown(uint32_t to, F shown) {
  constexpr int kPieces = S::kBlockN / 8, kStep = S::kThreads / kPieces;
  static_assert(S::kBlockM % kStep == 0);
  const int thread = opaque(threadIdx.x);
  const int first = thread / kPieces, piece = thread % kPieces;
#pragma unroll
  for (int row = 0; row < S::kBlockM; row += kStep) {
    shared_at<uint8_t>(to + (first + row) * kBitRow + piece) = shown(first + row, 8 * piece);
  }
}

// A bit for each of the block's queries from i0 and keys from j0 on: which the bool mask shows,
// which dropout keeps. Byte key / 8 % 8 of a query, bit key % 8.
template <class S>
__device__ __forceinline__ void store_decisions(const BackwardShared<S>& shared,
                                                const AttentionForward& f, const Sequence& sequence,
                                                const ScoreRules& rules, const TilePlace& at) {
  if (f.mask.kind == MaskKind::kBool) {
    const uint32_t to = shared.shown + at.j0 % 64 / 8;
    if (rules.has_words(sequence, at.i0, S::kBlockM, at.j0, S::kBlockN)) {
      store_shown<S>(to, [&](int row, int key) { return rules.shown(at.i0 + row, at.j0 + key); });
    } else {
      store_shown<S>(
          to, [&](int row, int key) { return rules.shown(at.i0 + row, at.j0 + key, sequence); });
    }
  }
  if (!f.dropout.enabled()) return;
  const Dropout dropout = read_dropout(f);
  static_assert(S::kBlockM * kBitRow % S::kThreads == 0);  // whole warps come to the ballots
  const auto bh = static_cast<uint32_t>(at.b * f.heads_q + at.h);
  for (unsigned index = opaque(threadIdx.x); index < S::kBlockM * kBitRow; index += S::kThreads) {
    const unsigned row = index / kBitRow, key = index % kBitRow;
    const PhiloxWords random =
        philox4x32_10(at.j0 / 64 * 8 + key, at.i0 + row, bh, dropout.offset, dropout.seed);
    uint32_t own = 0;  // decisions on 8 keys beside each other for four queries
#pragma unroll
    for (unsigned slot = 0; slot < kBitRow; ++slot) {
      const uint32_t bits = random.word[slot / 2] >> slot % 2 * 16 & 0xffff;
      const uint32_t all = __ballot_sync(~0u, bits >= dropout.threshold);
      if (slot == key) own = all;
    }
    shared_at<uint8_t>(shared.kept + index) = own >> row % 4 * 8;
  }
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

  // s to dropout(p), with all rules; f(p, dropout(dp), minus_delta, m, n, e) takes what it wants,
  // and what it leaves in dp is multiplied by the softcap's slope. store_decisions has gone before.
  template <class F>
  __device__ __forceinline__ void differentiate(const AttentionForward& p, const Sequence& sequence,
                                                const ScoreRules& rules, const TilePlace& at,
                                                int first, F f) {
    const float factor = p.dropout.scale();
    const bool all =
        at.i0 + S::kStepM <= sequence.seqlen_q &&
        VisibleKeys(sequence, at.i0, at.i0 + S::kStepM).all(at.j0, at.j0 + S::kWarpKeys);
#pragma unroll
    for (int n = 0; n < S::kTilesN; ++n) {
      const uint32_t row = row_data(first + 8 * n);
      const float2 minus_lse = shared_at<float2>(row);
      const float2 normalizer = shared_at<float2>(row + 8);
      const float2 minus_delta = shared_at<float2>(row + 16);
      float slopes[S::kTilesM][4], probability[S::kTilesM][4];
      shape(n, p, sequence, rules, at, first, slopes);
      if (!all) hide(n, sequence, at);
      each([&](int m, int e) {
        const float x = s[m][n].r[e] + (e % 2 ? minus_lse.y : minus_lse.x);
        s[m][n].r[e] = exp_of<T>(x) * (e % 2 ? normalizer.y : normalizer.x);
        probability[m][e] = s[m][n].r[e];
      });
      if (p.dropout.enabled()) {
        const Decisions kept = decisions(shared_.kept, at, first, n);
        each([&](int m, int e) {
          const bool keeps = kept.yes(e);
          s[m][n].r[e] = keeps ? s[m][n].r[e] : 0.0f;
          dp[m][n].r[e] = keeps ? dp[m][n].r[e] * factor : 0.0f;
        });
      }
      each([&](int m, int e) {
        f(probability[m][e], dp[m][n].r[e], e % 2 ? minus_delta.y : minus_delta.x, m, n, e);
      });
      if (p.softcap > 0.0f) each([&](int m, int e) { dp[m][n].r[e] *= slopes[m][e]; });
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
    LanePlace<S, typename S::TileKv> keys(shared_, a_, a_tile, 0);
    LanePlace<S, typename S::TileQ> queries(shared_, b_, b_tile, first);
    const uint32_t row = row_data(first);
    multiply_columns<true, kMinusDelta>(x, keys, queries, row, dim);
    if constexpr (S::kGeneral) {
#pragma unroll 1
      for (dim -= S::kPanel; dim > 0; dim -= S::kPanel) {
        keys.address += S::TileKv::kPanelBytes;
        queries.address += S::TileQ::kPanelBytes;
        multiply_columns<false, kMinusDelta>(x, keys, queries, row, dim);
      }
    }
  }

  // The same for all columns, or in general for those of a panel, of which `columns` are there;
  // added to x unless kBegins.
  template <bool kBegins, bool kMinusDelta>
  __device__ __forceinline__ void multiply_columns(Accumulator (&x)[S::kTilesM][S::kTilesN],
                                                   const LanePlace<S, typename S::TileKv>& keys,
                                                   const LanePlace<S, typename S::TileQ>& queries,
                                                   uint32_t row, int columns) {
    constexpr int kColumns = S::kGeneral ? S::kPanel : S::kDim;
#pragma unroll
    for (int step = 0; step < kColumns / kDepth<T>; ++step) {
      if (S::kGeneral && step > 0 && step * kDepth<T> >= columns) break;
      FragmentA<T> a[S::kTilesM];
#pragma unroll
      for (int m = 0; m < S::kTilesM; ++m)
        S::TileKv::load_a(a[m], keys.address, step, keys.row + 16 * m);
#pragma unroll
      for (int n = 0; n < S::kTilesN; n += 2) {
        FragmentB<T> b[2];
        S::TileQ::load_b(b, queries.address, step, queries.row + 8 * n);
        const bool begins = kBegins && step == 0;
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

  // What is decided about the lane's two keys and its two queries in columns 8 n to 8 n + 7 from
  // row `first` of the block on.
  struct Decisions {
    uint32_t of_query[2];
    __device__ __forceinline__ bool yes(int e) const { return of_query[e % 2] >> e / 2 * 8 & 1; }
  };
  __device__ __forceinline__ Decisions decisions(uint32_t table, const TilePlace& at, int first,
                                                 int n) const {
    static_assert(S::kTilesM == 1);
    const uint32_t lane_place = table + lane_ % 4 * 2 * kBitRow + at.j0 % 64 / 8;
    const uint32_t place = lane_place + first * kBitRow + n * (8 * kBitRow);
    const uint32_t even = shared_at<uint16_t>(place), odd = shared_at<uint16_t>(place + kBitRow);
    return {even >> lane_ / 4, odd >> lane_ / 4};
  }

  // The scores of columns 8 n to 8 n + 7 from k q': softcap, where slopes are its own, ALiBi and
  // mask. The tile begins with row `first` of the block.
  __device__ __forceinline__ void shape(int n, const AttentionForward& p, const Sequence& sequence,
                                        const ScoreRules& rules, const TilePlace& at, int first,
                                        float (&slopes)[S::kTilesM][4]) {
    each([&](int m, int e) { s[m][n].r[e] *= p.softmax_scale; });
    if (p.softcap > 0.0f) {
      each([&](int m, int e) { s[m][n].r[e] = softcapped(s[m][n].r[e], p.softcap, slopes[m][e]); });
    }
    if (p.alibi_slopes) {
      each(
          [&](int m, int e) { s[m][n].r[e] -= rules.alibi(query_of(at, n, e), key_of(at, m, e)); });
    }
    if (p.mask.kind == MaskKind::kBool) {
      const Decisions shown = decisions(shared_.shown, at, first, n);
      each([&](int m, int e) { s[m][n].r[e] = shown.yes(e) ? s[m][n].r[e] : -INFINITY; });
    } else if (p.mask.kind == MaskKind::kAdditive) {
      add_mask(n, sequence, rules, at);
    }
  }
  __device__ __forceinline__ void add_mask(int n, const Sequence& sequence, const ScoreRules& rules,
                                           const TilePlace& at) {
    const bool whole = rules.has_words(sequence, at.i0 + 8 * n, 8, at.j0, S::kWarpKeys);
    // Products of float32 without tensor cores leave no register for the other way.
    constexpr bool kAlone = kOldGpu && S::kFloat;
    if (kAlone || !whole || !rules.has_halves()) {
      each([&](int m, int e) {
        s[m][n].r[e] += rules.added(opaque(query_of(at, n, e)), opaque(key_of(at, m, e)), sequence);
      });
      return;
    }
    // Lane 4 g + t reads keys 2 g and 2 g + 1, 32 bytes of a query together, and wants g and g + 8.
    const int from = lane_ / 8 * 4 + lane_ % 4, shift = lane_ / 4 % 2 * 16;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const auto* place = rules.mask_place<uint16_t>(query_of(at, n, e), at.j0 + lane_ / 4 * 2);
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(place);
      const uint32_t low = __shfl_sync(~0u, pair, from), high = __shfl_sync(~0u, pair, from + 16);
      s[0][n].r[e] += rules.of_half(low >> shift);
      s[0][n].r[e + 2] += rules.of_half(high >> shift);
    }
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

  const BackwardShared<S>& shared_;
  uint32_t a_, b_;  // this lane's places in a tile of keys and of queries
  int lane_;
};

}  // namespace fl
