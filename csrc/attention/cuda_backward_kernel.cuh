// The kernel around BackwardWarp, and its launcher.
#pragma once

#include "attention/cuda_backward.cuh"
#include "common/check.h"

namespace fl {

// q, dout and row data of one query head after the other, on their way into the same tiles. It
// holds little: registers are scarce while they are used, and the rest is computed again.
template <class S>
class QueryStream {
  using T = typename S::T;
  using Tile = typename S::TileQ;

 public:
  // Begins with head h, whose rows begin with `first_row` in the scratch memory.
  __device__ __forceinline__ QueryStream(const AttentionBackward& p, const BackwardScratch& scratch,
                                         const BackwardShared<S>& shared, const Sequence& sequence,
                                         int b, int h)
      : p_(p), scratch_(scratch), shared_(shared), seqlen_(sequence.seqlen_q) {
    q_ = head_of<T>(p.forward.q, b, h, sequence.first_q);
    dout_ = head_of<T>(p.dout, b, h, sequence.first_q);
    first_row = scratch.first_row(p.forward, b, h, sequence);
  }

  __device__ __forceinline__ void next_head() {
    q_ += p_.forward.q.stride_h;
    dout_ += p_.dout.stride_h;
    first_row += scratch_.rows;
  }

  // Starts the copies of rows from m0 on.
  __device__ __forceinline__ void start(int m0) const {
    const TensorView4 &q = p_.forward.q, &dout = p_.dout;
    if (!S::kGeneral && scratch_.whole_chunks && m0 + S::kBlockM <= seqlen_) {
      const unsigned thread = opaque(threadIdx.x);
      const unsigned row = thread / Tile::kChunks, chunk = thread % Tile::kChunks;
      const uint32_t place = Tile::at(row, chunk);
      const uint64_t i = m0 + row;
      copy_whole(shared_.q + place, q_ + i * q.stride_s + kChunk * chunk, q.stride_s);
      copy_whole(shared_.dout + place, dout_ + i * dout.stride_s + kChunk * chunk, dout.stride_s);
    } else {
      const auto columns = static_cast<int>(p_.forward.head_dim);
      const auto columns_v = static_cast<int>(p_.forward.head_dim_v);
      copy_rows<Tile, S>(shared_.q, q_, q.stride_s, m0, seqlen_, columns);
      copy_rows<Tile, S>(shared_.dout, dout_, dout.stride_s, m0, seqlen_, columns_v);
    }
    copy_row_data<S>(scratch_.row_data + first_row + m0, shared_.rows);
    commit_copies();
  }

  int64_t first_row;  // of the sequence and head, in the scratch memory

 private:
  static constexpr int kChunk = 16 / sizeof(T);  // columns

  // The thread's part of a tile: a chunk of every panel of every kStep-th row.
  static __device__ __forceinline__ void copy_whole(uint32_t to, const T* from, int64_t stride) {
    constexpr int kStep = S::kThreads / Tile::kChunks;
    unrolled<S::kBlockM / kStep>([&](auto r) {
      unrolled<S::kDim / Tile::kPanel>([&](auto panel) {
        copy_async<panel * Tile::kPanelBytes + r * kStep * Tile::kRowBytes,
                   panel * Tile::kRowBytes>(to, from);
      });
      from += kStep * stride;
    });
  }

  const AttentionBackward& p_;
  const BackwardScratch& scratch_;
  const BackwardShared<S>& shared_;
  const T *q_, *dout_;  // row 0 of the head
  int seqlen_;
};

// The warp's rows of a staged tile, j0 to j0 + kWarpKeys of x, to global memory.
template <class S>
__device__ __forceinline__ void store_rows(typename S::T* x, int64_t stride, int j0, int rows,
                                           int columns, uint32_t tile, int lane) {
  using T = typename S::T;
  const bool aligned = (reinterpret_cast<uintptr_t>(x) | stride * sizeof(T)) % 16 == 0;
  constexpr int kSize = sizeof(T), kChunk = 16 / kSize, kChunks = S::kColumns / kChunk;
  if (!S::kGeneral && aligned && j0 + S::kWarpKeys <= rows && columns >= S::kColumns) {
    constexpr int kRows = 32 / kChunks;  // that the warp stores at once
    const uint32_t from = tile + S::TileKv::at(lane / kChunks, lane % kChunks);
    T* at = x + (j0 + lane / kChunks) * stride + kChunk * (lane % kChunks);
#pragma unroll
    for (int row = 0; row < S::kWarpKeys; row += kRows, at += kRows * stride) {
      *reinterpret_cast<uint4*>(at) = shared_at<uint4>(S::TileKv::moved(from, row, 0));
    }
    return;
  }
  for (int index = lane; index < S::kWarpKeys * kChunks; index += 32) {
    const int row = index / kChunks, chunk = index % kChunks;
    if (j0 + row >= rows || kChunk * chunk >= columns) continue;
    const uint4 bits = shared_at<uint4>(tile + S::TileKv::at(row, chunk));
    T* at = x + (j0 + row) * stride + kChunk * chunk;
    if (aligned && kChunk * chunk + kChunk <= columns) {
      *reinterpret_cast<uint4*>(at) = bits;
    } else {
      const T* values = reinterpret_cast<const T*>(&bits);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        if (kChunk * chunk + e < columns) at[e] = values[e];
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

// Lets the next key block add where it is this one's turn (not -1). By one thread, after a barrier.
__device__ __forceinline__ void pass_turn(int* turns, int turn) {
  if (turn < 0) return;
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turns + turn) : "memory");
}

// Which block of the grid this one is, (key block, key head, batch): in deterministic mode in the
// order in which blocks start, so that each waits only for blocks that have started.
__device__ __forceinline__ void take_place(const BackwardScratch& scratch, bool deterministic,
                                           int (&place)[3]) {
  int x = blockIdx.x, y = blockIdx.y, z = blockIdx.z;
  if (deterministic) {
    const int ticket = atomicAdd(scratch.ticket, 1);
    x = ticket % gridDim.x;
    y = ticket / gridDim.x % gridDim.y;
    z = ticket / gridDim.x / gridDim.y;
  }
  place[0] = x;
  place[1] = y;
  place[2] = z;
}

template <class S>
__device__ __forceinline__ void differentiate_block(const AttentionBackward& p,
                                                    const BackwardScratch& scratch) {
  using T = typename S::T;
  extern __shared__ __align__(128) uint8_t memory[];
  __shared__ int place[3];               // read again at the end
  __shared__ volatile int turn_to_pass;  // of the thread 0, or -1
  const AttentionForward& f = p.forward;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  if (thread == 0) {
    take_place(scratch, f.deterministic, place);
    turn_to_pass = -1;
  }
  __syncthreads();
  constexpr int kSplits = S::kDim / S::kColumns;
  const int split = place[0] % kSplits, column = split * S::kColumns, b = place[2];
  const Sequence sequence(f, b);
  const int j0 = place[0] / kSplits * S::kBlockN, warp_j0 = j0 + warp * S::kWarpKeys;
  if (j0 >= sequence.seqlen_k) return;
  const int head_dim = static_cast<int>(f.head_dim), head_dim_v = static_cast<int>(f.head_dim_v);
  const BackwardShared<S> shared(shared_address(memory), head_dim, head_dim_v);
  copy_rows<typename S::TileKv, S>(shared.k, head_of<T>(f.k, b, place[1], sequence.first_k),
                                   f.k.stride_s, j0, sequence.seqlen_k, head_dim);
  copy_rows<typename S::TileKv, S>(shared.v, head_of<T>(f.v, b, place[1], sequence.first_k),
                                   f.v.stride_s, j0, sequence.seqlen_k, head_dim_v);
  commit_copies();

  GradientTile<S> tile(shared, warp, lane);
  BackwardWarp<S> sums(shared, warp, lane, column);
  const int group = static_cast<int>(f.heads_q) / static_cast<int>(f.heads_k);
  int h = place[1] * group, heads = group;  // that are left
  QueryStream<S> stream(p, scratch, shared, sequence, b, h);
  const VisibleQueries queries(sequence, j0, j0 + S::kBlockN);
  int m0 = queries.some_begin / S::kBlockM * S::kBlockM;
  if (m0 >= queries.some_end) heads = 0;
  const auto start = [&] {
    stream.start(m0);
    if constexpr (S::kGeneral) {
      store_decisions<S>(shared, f, sequence, ScoreRules(f, b, h, sequence.diagonal),
                         {opaque(b), opaque(h), opaque(m0), opaque(j0)});
    }
  };
  if (heads > 0) start();
  while (heads > 0) {
    wait_for_copies<0>();
    __syncthreads();  // q, dout and row data are here; ds has been used by all
    if (f.deterministic && thread == 0) pass_turn(scratch.turns, turn_to_pass);
#pragma unroll(S::kGeneral ? 1 : S::kWarpsM)
    for (int first = 0; first < S::kBlockM; first += S::kStepM) {
      const TilePlace at{b, h, m0 + first, warp_j0};
      const VisibleKeys keys(sequence, at.i0, at.i0 + S::kStepM);
      if (at.i0 >= sequence.seqlen_q || keys.none(warp_j0, warp_j0 + S::kWarpKeys)) continue;
      tile.multiply(first, head_dim, head_dim_v);
      if constexpr (S::kGeneral) {
        const ScoreRules rules(f, b, h, sequence.diagonal);
        tile.differentiate(f, sequence, rules, at, first,
                           [&](float probability, float dp, float minus_delta, int m, int n,
                               int e) { tile.dp[m][n].r[e] = probability * (dp + minus_delta); });
      } else {
        if (!keys.all(warp_j0, warp_j0 + S::kWarpKeys)) tile.hide(sequence, at);
        tile.differentiate(first, f.softmax_scale * kLog2e);
      }
      sums.add(tile, first, head_dim - column, head_dim_v - column);
    }

    const int64_t row = stream.first_row + m0;
    if (f.deterministic) {
      const int turn = static_cast<int>(row / 16 * 2 + split);
      if (thread == 0) turn_to_pass = turn;
      if (warp == 0) {
        wait_for_turn(scratch.turns + turn, j0 / S::kBlockN - sequence.begin(m0) / S::kBlockN);
      }
    }
    const int i0 = m0;
    const VisibleQueries again(sequence, opaque(j0), opaque(j0) + S::kBlockN);
    m0 += S::kBlockM;
    if (m0 >= again.some_end) {
      m0 = again.some_begin / S::kBlockM * S::kBlockM;
      --heads;
      ++h;
      stream.next_head();
    }
    __syncthreads();  // ds is here; q and dout have been used by all
    if (heads > 0) start();
    sums.add_dq(scratch, sequence, row, i0, j0, column, head_dim);
  }
  wait_for_copies<0>();
  __syncthreads();  // k and v have been used by all
  if (f.deterministic && thread == 0) pass_turn(scratch.turns, turn_to_pass);
  const uint32_t warp_row = warp * S::kWarpKeys * S::TileKv::kRowBytes;
  sums.stage(sums.dk, shared.k + warp_row, head_dim - column, f.softmax_scale);
  sums.stage(sums.dv, shared.v + warp_row, head_dim_v - column,
             f.dropout.enabled() ? f.dropout.scale() : 1.0f);
  __syncwarp();
  const Sequence there(f, place[2]);
  store_rows<S>(head_of<T>(p.dk, place[2], place[1], there.first_k) + column, p.dk.stride_s,
                warp_j0, there.seqlen_k, head_dim - column, shared.k + warp_row, lane);
  store_rows<S>(head_of<T>(p.dv, place[2], place[1], there.first_k) + column, p.dv.stride_s,
                warp_j0, there.seqlen_k, head_dim_v - column, shared.v + warp_row, lane);
}

// Grid: (key blocks times column blocks, key heads, batch).
template <class T, int kDim, bool kGeneral, bool kWide>
__global__ void __launch_bounds__(BackwardShape<T, kDim, kGeneral, kOldGpu, kWide>::kThreads, 1)
    attention_backward_kernel(const __grid_constant__ AttentionBackward p,
                              const __grid_constant__ BackwardScratch scratch) {
  using S = BackwardShape<T, kDim, kGeneral, kOldGpu, kWide>;
  // Old GPUs have too little memory for wide blocks and for float32 heads above 128.
  constexpr bool kTooLarge = kOldGpu && (kWide || (S::kFloat && kDim > 128));
  if constexpr (kHasMma<T> && !kTooLarge) differentiate_block<S>(p, scratch);
}

}  // namespace fl
