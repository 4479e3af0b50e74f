// Attention forward on CUDA: the kernel around ForwardWarp, and its launcher.
#pragma once

#include <algorithm>

#include "attention/cuda_forward.cuh"
#include "common/check.h"
#include "common/dispatch.h"

namespace fl {
// The block's tiles in shared memory, as 32-bit addresses.
template <class S>
struct ForwardShared {
  uint32_t q, k, v;
  __device__ __forceinline__ explicit ForwardShared(const void* memory) {
    q = shared_address(memory);
    k = q + S::TileQ::kBytes;
    v = k + S::TileKv::kBytes;
  }
};

__device__ __forceinline__ Dropout dropout_of(const AttentionForward& p) {
  Dropout dropout = p.dropout;
  if (p.dropout_rng) {
    dropout.seed = static_cast<uint64_t>(p.dropout_rng[0]);
    dropout.offset = static_cast<uint32_t>(p.dropout_rng[1]);
  }
  return dropout;
}

template <class S>
__device__ __forceinline__ void adjust_scores(ForwardWarp<S>& warp, const AttentionForward& p,
                                              const Sequence& sequence, const VisibleKeys& keys,
                                              const ScoreRules& rules, int i0, int j0, int lane) {
  if constexpr (S::kGeneral) {
    warp.map(lane, [&](float x, int row, int column) {
      const int i = i0 + row, j = j0 + column;
      const bool visible = i < sequence.seqlen_q && j >= sequence.begin(i) && j < sequence.end(i);
      return visible ? rules(x, i, j) * kLog2e : -INFINITY;
    });
  } else if (!keys.all(j0, j0 + S::kBlockN)) {
    if (p.window_left < 0) {
      warp.map(lane, [&](float x, int row, int column) {
        return column < sequence.end(i0 + row) - j0 ? x : -INFINITY;
      });
    } else {
      warp.map(lane, [&](float x, int row, int column) {
        const int i = i0 + row, j = j0 + column;
        return j >= sequence.begin(i) && j < sequence.end(i) ? x : -INFINITY;
      });
    }
  }
}

template <class S>
__device__ __forceinline__ void store_output(const AttentionForward& p, const Sequence& sequence,
                                             uint32_t tile, int64_t b, int64_t h, int first_row,
                                             int i0, int lane) {
  using T = typename S::T;
  T* o = static_cast<T*>(p.o.data) + b * p.o.stride_b + h * p.o.stride_h +
         sequence.first_q * p.o.stride_s;
  const int columns = static_cast<int>(p.head_dim_v);
  const bool aligned = (reinterpret_cast<uintptr_t>(o) | (p.o.stride_s * sizeof(T))) % 16 == 0;
  constexpr int kChunk = 16 / sizeof(T), kChunks = S::kDim / kChunk;
#pragma unroll 1
  for (int index = lane; index < S::kWarpRows * kChunks; index += 32) {
    const int row = index / kChunks, chunk = index % kChunks, i = i0 + row;
    if (i >= sequence.seqlen_q || kChunk * chunk >= columns) continue;
    uint4 bits;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "r"(tile + S::TileQ::at(first_row + row, chunk)));
    T* to = o + i * p.o.stride_s + kChunk * chunk;
    if (aligned && kChunk * (chunk + 1) <= columns) {
      *reinterpret_cast<uint4*>(to) = bits;
    } else {
      const T* values = reinterpret_cast<const T*>(&bits);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        if (kChunk * chunk + e < columns) to[e] = values[e];
      }
    }
  }
}

template <class S>
__device__ __forceinline__ void forward_block(const AttentionForward& p) {
  using T = typename S::T;
  extern __shared__ __align__(128) uint8_t memory[];
  const int thread = threadIdx.x, lane = thread % 32, first_row = thread / 32 * S::kWarpRows;
  const int b = blockIdx.z, h = blockIdx.y, group = static_cast<int>(p.heads_q / p.heads_k);
  const Sequence sequence(p, b);
  // The last rows come first: under a causal mask they are the longest.
  const int m0 = static_cast<int>(gridDim.x - 1 - blockIdx.x) * S::kBlockM;
  if (m0 >= sequence.seqlen_q) return;
  const int m1 = min(m0 + S::kBlockM, sequence.seqlen_q), i0 = m0 + first_row;
  const int j_begin = sequence.begin(m0) / S::kBlockN * S::kBlockN, j_end = sequence.end(m1 - 1);
  // The last keys come first, too: what a causal mask hides in part is also the first tile.
  int j0 = (j_end - 1) / S::kBlockN * S::kBlockN;

  const ForwardShared<S> shared(memory);
  auto copy_q = copy_of<typename S::TileQ, T>(shared.q, p.q, b, h, sequence.first_q, m0,
                                              sequence.seqlen_q, p.head_dim);
  auto copy_k = copy_of<typename S::TileKv, T, -1>(shared.k, p.k, b, h / group, sequence.first_k,
                                                   j0, sequence.seqlen_k, p.head_dim);
  auto copy_v = copy_of<typename S::TileKv, T, -1>(shared.v, p.v, b, h / group, sequence.first_k,
                                                   j0, sequence.seqlen_k, p.head_dim_v);
  ForwardWarp<S> warp(shared.q + first_row * S::TileQ::kRowBytes, shared.k, shared.v, lane);
  const VisibleKeys keys(sequence, i0, i0 + S::kWarpRows);
  const ScoreRules rules(p, b, h, sequence.diagonal);
  const float scale = S::kGeneral ? 1.0f : p.softmax_scale * kLog2e;
  // Tiles in which every row of the warp sees every key, copied by whole rows.
  const int plain_begin = keys.all_begin;
  const int plain_last = min(keys.all_end, min(copy_k.whole_rows(), copy_v.whole_rows())) - S::kBlockN;

  if (j_begin < j_end) {
    copy_q.next();
    copy_k.next();
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    warp.load_q();
    copy_v.next();
    commit_copies();
  }
  bool arrived = true;  // k is here, v is on its way
  while (j0 >= j_begin && j_begin < j_end) {
    if (!arrived) {
      wait_for_copies<0>();
      __syncthreads();  // k is here; v has been used by all
      copy_v.next();
      commit_copies();
    }
    arrived = false;
    const bool visible = !keys.none(j0, j0 + S::kBlockN);
    if (visible) {
      warp.multiply_k();
      adjust_scores(warp, p, sequence, keys, rules, i0, j0, lane);
      warp.renew(scale);
    }
    wait_for_copies<0>();
    __syncthreads();  // v is here; k has been used by all
    if (j0 > j_begin) {
      copy_k.next();
      commit_copies();
    }
    if (visible) {
      if constexpr (S::kGeneral) {
        const auto bh = static_cast<uint32_t>(b * p.heads_q + h);
        if (p.dropout.enabled()) warp.drop(dropout_of(p), bh, i0, j0, lane);
      }
      warp.multiply_v();
    }
    j0 -= S::kBlockN;
    if constexpr (!S::kGeneral) {
      if (j0 > plain_last) continue;
      for (; j0 >= plain_begin; j0 -= S::kBlockN) {
        wait_for_copies<0>();
        __syncthreads();
        copy_v.next_whole();
        commit_copies();
        warp.multiply_k();
        arrived = !warp.exponentiate(scale);
        if (arrived) break;
        wait_for_copies<0>();
        __syncthreads();
        if (j0 > j_begin) {
          copy_k.next_whole();
          commit_copies();
        }
        warp.multiply_v();
      }
    }
  }

  __syncthreads();
  float lse[2 * S::kTilesM];
  const float factor = p.dropout.enabled() ? p.dropout.scale() : 1.0f;
  warp.finish(p.sinks ? p.sinks[h] : -INFINITY, factor, lse);
  float* to = p.lse + b * p.lse_stride_b + h * p.lse_stride_h + sequence.first_q;
#pragma unroll
  for (int row = 0; row < 2 * S::kTilesM; ++row) {
    const int i = i0 + 8 * row + lane / 4;
    if (lane % 4 == 0 && i < sequence.seqlen_q) to[i] = lse[row];
  }
  warp.stage_output();
  __syncwarp();
  store_output<S>(p, sequence, shared.q, b, h, first_row, i0, lane);
}

template <class S>
__global__ void __launch_bounds__(kForwardThreads)
    attention_forward_kernel(const __grid_constant__ AttentionForward p) {
  if constexpr (kHasMma<typename S::T>) forward_block<S>(p);
}

template <class S>
void launch_forward(const AttentionForward& p, cudaStream_t stream) {
  auto* kernel = attention_forward_kernel<S>;
  FL_CHECK(p.batch <= 65535 && p.heads_q <= 65535, "attention: more than 65535 heads or batches");
  FL_CHECK(p.seqlen_q < kFar && p.seqlen_k < kFar, "attention: a sequence of 2^30 rows or more");
  if constexpr (S::kSharedBytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
    FL_CHECK(error == cudaSuccess, "attention: ", cudaGetErrorString(error));
  }
  const dim3 grid(static_cast<unsigned>((p.seqlen_q + S::kBlockM - 1) / S::kBlockM),
                  static_cast<unsigned>(p.heads_q), static_cast<unsigned>(p.batch));
  kernel<<<grid, kForwardThreads, S::kSharedBytes, stream>>>(p);
  const cudaError_t error = cudaGetLastError();
  FL_CHECK(error == cudaSuccess, "attention_forward: ", cudaGetErrorString(error));
}

// softcap, ALiBi, masks and dropout need the general kernel; so do scales that turn the order of
// scores around.
inline bool is_general(const AttentionForward& p) {
  return p.softcap > 0 || p.alibi_slopes || p.mask.kind != MaskKind::kNone || p.dropout.enabled() ||
         !(p.softmax_scale > 0);
}

// The kernel for the head_dim's bucket. Each T is compiled in a file of its own.
template <class T>
void forward_of(const AttentionForward& p, cudaStream_t stream) {
  const auto dim = static_cast<int>(std::max(p.head_dim, p.head_dim_v));
  const int bucket = dim <= 32    ? 32
                     : dim <= 64  ? 64
                     : dim <= 96  ? 96
                     : dim <= 128 ? 128
                     : dim <= 192 ? 192
                                  : 256;
  with_bool(is_general(p), [&](auto general) {
    with_int(Ints<32, 64, 96, 128, 192, 256>{}, bucket, "head_dim", [&](auto constant) {
      constexpr int kDim = decltype(constant)::value, kBlockN = kDim > 128 ? 32 : 64;
      constexpr int kTilesM = kDim > 128 ? 1 : 2;
      launch_forward<ForwardShape<T, kDim, kBlockN, kTilesM, decltype(general)::value>>(p, stream);
    });
  });
}

}  // namespace fl
