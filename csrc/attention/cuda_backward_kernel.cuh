// The kernel around BackwardWarp, and its launcher.
#pragma once

#include "attention/cuda_backward.cuh"
#include "common/check.h"

namespace fl {

// q, dout and row data of one query head after the other, on their way into the same tiles: what
// one thread copies.
template <class S>
class QueryStream {
  using T = typename S::T;
  using Tile = typename S::TileQ;
  static constexpr int kStep = S::kThreads / Tile::kChunks;  // rows between those of a thread

 public:
  __device__ __forceinline__ QueryStream(const AttentionBackward& p, const BackwardScratch& scratch,
                                         const BackwardShared<S>& shared, const Sequence& sequence,
                                         int b)
      : p_(p), scratch_(scratch), shared_(shared), sequence_(sequence), b_(b) {
    const TensorView4 &q = p.forward.q, &dout = p.dout;
    const bool aligned =
        (reinterpret_cast<uintptr_t>(q.data) | reinterpret_cast<uintptr_t>(dout.data) |
         bytes(q.stride_b) | bytes(q.stride_h) | bytes(q.stride_s) | bytes(dout.stride_b) |
         bytes(dout.stride_h) | bytes(dout.stride_s)) %
            16 ==
        0;
    const bool full = p.forward.head_dim == S::kDim && p.forward.head_dim_v == S::kDim;
    whole_rows_ = aligned && full && !S::kGeneral ? sequence.seqlen_q : 0;
  }

  // Head h is the next.
  __device__ __forceinline__ void begin(int h) {
    q_ = thread_row(p_.forward.q, h);
    dout_ = thread_row(p_.dout, h);
  }

  // Starts the copies of its rows from m0 on. first_row: of the sequence and head in row data.
  __device__ __forceinline__ void start(int h, int m0, int64_t first_row) {
    if (m0 + S::kBlockM <= whole_rows_) {
      copy_whole(shared_.q, q_, p_.forward.q.stride_s, m0);
      copy_whole(shared_.dout, dout_, p_.dout.stride_s, m0);
    } else {
      copy_rows<Tile, S>(shared_.q, p_.forward.q, b_, h, sequence_.first_q, m0, sequence_.seqlen_q,
                         static_cast<int>(p_.forward.head_dim));
      copy_rows<Tile, S>(shared_.dout, p_.dout, b_, h, sequence_.first_q, m0, sequence_.seqlen_q,
                         static_cast<int>(p_.forward.head_dim_v));
    }
    copy_row_data<S>(scratch_.row_data + first_row + m0, scratch_.row_array, shared_.rows);
    commit_copies();
  }

 private:
  static __device__ __forceinline__ int64_t bytes(int64_t elements) { return elements * sizeof(T); }

  __device__ __forceinline__ const T* thread_row(const TensorView4& x, int h) const {
    const int row = threadIdx.x / Tile::kChunks, chunk = threadIdx.x % Tile::kChunks;
    return static_cast<const T*>(x.data) + b_ * x.stride_b + h * x.stride_h +
           (sequence_.first_q + row) * x.stride_s + 8 * chunk;
  }

  __device__ __forceinline__ void copy_whole(uint32_t tile, const T* from, int64_t stride,
                                             int m0) const {
    const int row = threadIdx.x / Tile::kChunks, chunk = threadIdx.x % Tile::kChunks;
    const uint32_t to = tile + Tile::at(row, chunk);
    from += m0 * stride;
#pragma unroll
    for (int r = 0; r < S::kBlockM; r += kStep) {
#pragma unroll
      for (int panel = 0; panel < S::kDim / Tile::kPanel; ++panel) {
        copy_async(to + panel * Tile::kPanelBytes + r * Tile::kRowBytes,
                   from + panel * Tile::kPanel, 16);
      }
      from += kStep * stride;
    }
  }

  const AttentionBackward& p_;
  const BackwardScratch& scratch_;
  const BackwardShared<S>& shared_;
  const Sequence& sequence_;
  const T *q_, *dout_;
  int b_, whole_rows_;
};

// The warp's rows of a staged tile, from column `column` of the tensor on, to global memory.
template <class S>
__device__ __forceinline__ void store_rows(const TensorView4& x, const Sequence& sequence,
                                           uint32_t tile, int b, int h, int j0, int column,
                                           int columns, int lane) {
  using T = typename S::T;
  T* to = static_cast<T*>(x.data) + b * x.stride_b + h * x.stride_h +
          (sequence.first_k + j0) * x.stride_s + column;
  const bool aligned = (reinterpret_cast<uintptr_t>(to) | (x.stride_s * sizeof(T))) % 16 == 0;
  constexpr int kChunks = S::kTilesD;
  for (int index = lane; index < S::kWarpKeys * kChunks; index += 32) {
    const int row = index / kChunks, chunk = index % kChunks;
    if (j0 + row >= sequence.seqlen_k || 8 * chunk >= columns) continue;
    uint4 bits;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "r"(tile + S::TileKv::at(row, chunk)));
    T* at = to + row * x.stride_s + 8 * chunk;
    if (aligned && 8 * chunk + 8 <= columns) {
      *reinterpret_cast<uint4*>(at) = bits;
    } else {
      const T* values = reinterpret_cast<const T*>(&bits);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (8 * chunk + e < columns) at[e] = values[e];
      }
    }
  }
}

// Waits until `turn` key blocks have added to dq. By one warp; a barrier follows.
__device__ __forceinline__ void wait_for_turn(const int* turns, int turn) {
  int done;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(done) : "l"(turns) : "memory");
  } while (!__all_sync(~0u, done == turn));
}

// Lets the next key block add. By one thread, after a barrier.
__device__ __forceinline__ void pass_turn(int* turns) {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turns) : "memory");
}

// Grid: (key blocks times column blocks, key heads, batch).
template <class T, int kDim, bool kGeneral>
__global__ void __launch_bounds__(BackwardShape<T, kDim, kGeneral, kOldGpu>::kThreads)
    attention_backward_kernel(const __grid_constant__ AttentionBackward p,
                              const __grid_constant__ BackwardScratch scratch) {
  using S = BackwardShape<T, kDim, kGeneral, kOldGpu>;
  if constexpr (!kServed<T>) return;
  extern __shared__ __align__(128) uint8_t memory[];
  const AttentionForward& f = p.forward;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  int key_block = blockIdx.x, head_k = blockIdx.y, b = blockIdx.z;
  if (f.deterministic) {  // in the order in which blocks start: each waits for earlier ones only
    if (thread == 0) *reinterpret_cast<int*>(memory) = atomicAdd(scratch.ticket, 1);
    __syncthreads();
    const int ticket = *reinterpret_cast<int*>(memory);
    __syncthreads();
    key_block = ticket % gridDim.x;
    head_k = ticket / gridDim.x % gridDim.y;
    b = ticket / gridDim.x / gridDim.y;
  }
  constexpr int kSplits = kDim / S::kColumns;
  const int split = key_block % kSplits, column = split * S::kColumns;
  const Sequence sequence(f, b);
  const int j0 = key_block / kSplits * S::kBlockN, warp_j0 = j0 + warp * S::kWarpKeys;
  if (j0 >= sequence.seqlen_k) return;
  const int head_dim = static_cast<int>(f.head_dim), head_dim_v = static_cast<int>(f.head_dim_v);
  const int columns = head_dim - column, columns_v = head_dim_v - column;  // that are left

  const BackwardShared<S> shared(shared_address(memory), head_dim, head_dim_v);
  copy_rows<typename S::TileKv, S>(shared.k, f.k, b, head_k, sequence.first_k, j0,
                                   sequence.seqlen_k, head_dim);
  copy_rows<typename S::TileKv, S>(shared.v, f.v, b, head_k, sequence.first_k, j0,
                                   sequence.seqlen_k, head_dim_v);
  commit_copies();
  QueryStream<S> stream(p, scratch, shared, sequence, b);

  const uint32_t warp_row = warp * S::kWarpKeys * S::TileKv::kRowBytes;
  GradientTile<S> tile(shared, warp, lane);
  BackwardWarp<S> sums(shared, warp, lane, column);
  const VisibleQueries of_block(sequence, j0, j0 + S::kBlockN);
  const int m_begin = of_block.some_begin / S::kBlockM * S::kBlockM, m_end = of_block.some_end;
  const int group = static_cast<int>(f.heads_q / f.heads_k);
  const int wd = warp % S::kWarpsD, first_q = warp / S::kWarpsD * S::kStepM;
  const Dropout dropout = read_dropout(f);

  int h = head_k * group, m0 = m_begin;
  constexpr uint32_t kNone = ~0u;
  uint32_t turn = kNone;  // to be passed on
  const int h_end = m_begin < m_end ? h + group : h;
  int64_t first_row = scratch.first_row(f, b, h, sequence);
  const int to_column = column + wd * S::kColumnsQ;
  const int cells = (kGeneral ? scratch.columns : S::kDim) / 8;  // of 128 numbers, in 16 rows of dq
  if (h < h_end) {
    stream.begin(h);
    stream.start(h, m0, first_row);
  }
  while (h < h_end) {
    wait_for_copies<0>();
    __syncthreads();  // q, dout and row data are here; ds has been used by all
    if (turn != kNone && thread == 0) pass_turn(scratch.turns + turn);
#pragma unroll(kGeneral ? 1 : S::kWarpsM)
    for (int first = 0; first < S::kBlockM; first += S::kStepM) {
      const TilePlace at{b, h, m0 + first, warp_j0};
      const VisibleKeys keys(sequence, at.i0, at.i0 + S::kStepM);
      if (at.i0 >= sequence.seqlen_q || keys.none(warp_j0, warp_j0 + S::kWarpKeys)) continue;
      tile.multiply(first, head_dim, head_dim_v);
      if constexpr (kGeneral) {
        const ScoreRules rules(f, b, h, sequence.diagonal);
        tile.differentiate(f, sequence, rules, dropout, at, first,
                           [&](float probability, float kept, float dp, float minus_delta,
                               float slope, int m, int n, int e) {
                             tile.s[m][n].r[e] = kept;
                             tile.dp[m][n].r[e] = probability * (dp + minus_delta) * slope;
                           });
      } else {
        if (!keys.all(warp_j0, warp_j0 + S::kWarpKeys)) tile.hide(sequence, at);
        tile.differentiate(first, f.softmax_scale * kLog2e);
      }
      sums.add(tile, first, columns, columns_v);
    }

    float* dq = scratch.dq_tile(first_row, to_column) + (m0 + first_q) / 16 * cells * 128 + lane;
    if (f.deterministic) {
      turn = static_cast<uint32_t>((first_row + m0) / 16 * 2 + split);
      if (warp == 0) {
        wait_for_turn(scratch.turns + turn, j0 / S::kBlockN - sequence.begin(m0) / S::kBlockN);
      }
    }
    const int i0 = m0 + first_q;
    m0 += S::kBlockM;
    const VisibleQueries of_block(sequence, afresh(j0), afresh(j0) + S::kBlockN);
    if (m0 >= of_block.some_end) {
      m0 = of_block.some_begin / S::kBlockM * S::kBlockM;
      ++h;
      first_row += scratch.rows;
      stream.begin(h);
    }
    __syncthreads();  // ds is here; q and dout have been used by all
    if (h < h_end) stream.start(h, m0, first_row);
    if (i0 >= sequence.seqlen_q) continue;
    const VisibleKeys keys(sequence, i0, i0 + S::kStepM);
    sums.add_dq(dq, cells * 128, head_dim - to_column, [&](int w) {
      const int first = j0 + w * S::kWarpKeys;
      return !keys.none(first, first + S::kWarpKeys);
    });
  }
  wait_for_copies<0>();
  __syncthreads();  // k and v have been used by all
  if (turn != kNone && thread == 0) pass_turn(scratch.turns + turn);
  sums.stage(sums.dk, shared.k + warp_row, f.softmax_scale);
  sums.stage(sums.dv, shared.v + warp_row, dropout.enabled() ? dropout.scale() : 1.0f);
  __syncwarp();
  store_rows<S>(p.dk, sequence, shared.k + warp_row, b, head_k, warp_j0, column, columns, lane);
  store_rows<S>(p.dv, sequence, shared.v + warp_row, b, head_k, warp_j0, column, columns_v, lane);
}

}  // namespace fl
