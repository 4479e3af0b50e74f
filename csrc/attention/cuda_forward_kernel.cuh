// Attention forward on CUDA: the kernel around ForwardWarp, and its launcher.
#pragma once

#include <algorithm>

#include "attention/cuda_forward.cuh"
#include "common/check.h"
#include "common/dispatch.h"

namespace fl {
// A register that the compiler reads again instead of keeping what follows from it.
#define FL_SPECIAL_REGISTER(name)                          \
  [] {                                                     \
    uint32_t value;                                        \
    asm volatile("mov.u32 %0, %%" name ";" : "=r"(value)); \
    return static_cast<int>(value);                        \
  }()

// The block's tiles in shared memory, as 32-bit addresses.
template <class S>
struct ForwardTiles {
  uint32_t q, k, v;
  __device__ __forceinline__ explicit ForwardTiles(const void* memory) {
    q = shared_address(memory);
    k = q + S::TileQ::kBytes;
    v = k + S::TileKv::kBytes;
  }
};

// What a block has to do, worked out anew wherever it is needed: the loop over plain tiles needs
// every register for its fragments.
template <class S>
struct ForwardTask {
  using T = typename S::T;
  template <class Tile, int kDirection>
  using Copy = TileCopy<Tile, S::kThreads, T, kDirection>;

  const AttentionForward* p;
  int thread, lane, first_row, b, h, m0, i0;  // first_row, i0: of the warp, in the block and in q
  Sequence sequence;

  __device__ __forceinline__ explicit ForwardTask(const AttentionForward& parameters)
      : p(&parameters),
        thread(FL_SPECIAL_REGISTER("tid.x")),
        lane(thread % 32),
        first_row(thread / 32 * S::kWarpRows),
        b(FL_SPECIAL_REGISTER("ctaid.z")),
        h(FL_SPECIAL_REGISTER("ctaid.y")),
        // The last rows come first: under a causal mask they are the longest.
        m0(static_cast<int>(gridDim.x - 1 - blockIdx.x) * S::kBlockM),
        i0(m0 + first_row),
        sequence(parameters, b) {}

  // The keys that some row of the block sees, filled up to whole tiles: [first_tile, end).
  __device__ __forceinline__ int first_tile() const {
    return sequence.begin(m0) / S::kBlockN * S::kBlockN;
  }
  __device__ __forceinline__ int end() const {
    return sequence.end(min(m0 + S::kBlockM, sequence.seqlen_q) - 1);
  }
  __device__ __forceinline__ VisibleKeys warp_keys() const {
    return {sequence, i0, i0 + S::kWarpRows};
  }

  // Tiles from row m0 of q, and from row j0 of k and v on, backwards.
  __device__ __forceinline__ auto copy_q(uint32_t tile) const {
    return copy<typename S::TileQ, 1>(tile, p->q, h, sequence.first_q, m0, sequence.seqlen_q,
                                      p->head_dim);
  }
  __device__ __forceinline__ auto copy_k(uint32_t tile, int j0) const {
    return copy<typename S::TileKv, -1>(tile, p->k, head_k(), sequence.first_k, j0,
                                        sequence.seqlen_k, p->head_dim);
  }
  __device__ __forceinline__ auto copy_v(uint32_t tile, int j0) const {
    return copy<typename S::TileKv, -1>(tile, p->v, head_k(), sequence.first_k, j0,
                                        sequence.seqlen_k, p->head_dim_v);
  }

 private:
  __device__ __forceinline__ int head_k() const {
    return static_cast<unsigned>(h) * static_cast<unsigned>(p->heads_k) /
           static_cast<unsigned>(p->heads_q);
  }
  template <class Tile, int kDirection>
  __device__ __forceinline__ Copy<Tile, kDirection> copy(uint32_t tile, const TensorView4& x,
                                                         int head, int64_t first, int row, int rows,
                                                         int64_t columns) const {
    const T* data = static_cast<const T*>(x.data) + b * x.stride_b + head * x.stride_h;
    return {tile, data + first * x.stride_s, x.stride_s, row,
            rows, static_cast<int>(columns), thread};
  }
};
#undef FL_SPECIAL_REGISTER

__device__ __forceinline__ Dropout dropout_of(const AttentionForward& p) {
  Dropout dropout = p.dropout;
  if (p.dropout_rng) {
    dropout.seed = static_cast<uint64_t>(p.dropout_rng[0]);
    dropout.offset = static_cast<uint32_t>(p.dropout_rng[1]);
  }
  return dropout;
}

template <class S>
__device__ __forceinline__ void adjust_scores(ForwardWarp<S>& warp, const ForwardTask<S>& task,
                                              const VisibleKeys& keys, int j0) {
  const AttentionForward& p = *task.p;
  const Sequence& sequence = task.sequence;
  const int i0 = task.i0;
  if constexpr (S::kGeneral) {
    const ScoreRules rules(p, task.b, task.h, sequence.diagonal);
    warp.map(task.lane, [&](float x, int, int) { return x * p.softmax_scale; });
    if (p.softcap > 0.0f) {
      warp.map(task.lane, [&](float x, int, int) {
        float slope;
        return softcapped(x, p.softcap, slope);
      });
    }
    if (p.alibi_slopes) {
      warp.map(task.lane, [&](float x, int row, int column) {
        return x - rules.alibi(i0 + row, j0 + column);
      });
    }
    const bool whole = rules.has_words(sequence, i0, S::kWarpRows, j0, S::kBlockN);
    if (p.mask.kind == MaskKind::kBool) {
      warp.hide(rules, sequence, i0, j0, whole, task.lane);
    } else if (p.mask.kind == MaskKind::kAdditive) {
      warp.add_mask(rules, sequence, i0, j0, whole, task.lane);
    }
  }
  if (keys.all(j0, j0 + S::kBlockN)) return;
  if (p.window_left < 0) {
    warp.map(task.lane, [&](float x, int row, int column) {
      return column < sequence.end(i0 + row) - j0 ? x : -INFINITY;
    });
  } else {
    warp.map(task.lane, [&](float x, int row, int column) {
      const int i = i0 + row, j = j0 + column;
      return j >= sequence.begin(i) && j < sequence.end(i) ? x : -INFINITY;
    });
  }
}

template <class S>
__device__ __forceinline__ void store_results(ForwardWarp<S>& warp, const ForwardTask<S>& task,
                                              uint32_t tile) {
  using T = typename S::T;
  const AttentionForward& p = *task.p;
  const Sequence& sequence = task.sequence;
  float lse[2 * S::kTilesM];
  const float factor = p.dropout.enabled() ? p.dropout.scale() : 1.0f;
  warp.finish(p.sinks ? p.sinks[task.h] : -INFINITY, factor, lse);
  float* to_lse = p.lse + task.b * p.lse_stride_b + task.h * p.lse_stride_h + sequence.first_q;
#pragma unroll
  for (int row = 0; row < 2 * S::kTilesM; ++row) {
    const int i = task.i0 + 8 * row + task.lane / 4;
    if (task.lane % 4 == 0 && i < sequence.seqlen_q) to_lse[i] = lse[row];
  }
  warp.stage_output(tile + task.first_row * S::TileQ::kRowBytes, task.lane);
  __syncwarp();

  T* o = static_cast<T*>(p.o.data) + task.b * p.o.stride_b + task.h * p.o.stride_h +
         sequence.first_q * p.o.stride_s;
  const int columns = static_cast<int>(p.head_dim_v);
  const bool aligned = (reinterpret_cast<uintptr_t>(o) | (p.o.stride_s * sizeof(T))) % 16 == 0;
  constexpr int kChunk = 16 / sizeof(T), kChunks = S::kDim / kChunk;
#pragma unroll 1
  for (int index = task.lane; index < S::kWarpRows * kChunks; index += 32) {
    const int row = index / kChunks, chunk = index % kChunks, i = task.i0 + row;
    if (i >= sequence.seqlen_q || kChunk * chunk >= columns) continue;
    uint4 bits;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "r"(tile + S::TileQ::at(task.first_row + row, chunk)));
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

// The keys of tile j0 are here or, unless `arrived`, on their way; its values are on their way if
// `arrived`. Works on the tile and asks for the keys before it.
template <class S>
__device__ __forceinline__ void any_tile(ForwardWarp<S>& warp, const ForwardTask<S>& task,
                                         const ForwardTiles<S>& tiles, int j0, bool arrived) {
  const AttentionForward& p = *task.p;
  if (!arrived) {
    wait_for_copies<0>();
    __syncthreads();  // k is here; v has been used by all
    task.copy_v(tiles.v, j0).next();
    commit_copies();
  }
  const VisibleKeys keys = task.warp_keys();
  const bool visible = !keys.none(j0, j0 + S::kBlockN);
  if (visible) {
    warp.multiply_k();
    adjust_scores(warp, task, keys, j0);
    warp.renew(S::kGeneral ? 1.0f : p.softmax_scale * kLog2e);
    if constexpr (S::kGeneral) {
      const auto bh = static_cast<uint32_t>(task.b * p.heads_q + task.h);
      if (p.dropout.enabled()) warp.drop(dropout_of(p), bh, task.i0, j0, task.lane);
    }
#pragma unroll
    for (int m = 0; m < S::kTilesM; ++m) warp.pack_scores(m);
  }
  wait_for_copies<0>();
  __syncthreads();  // v is here; k has been used by all
  if (j0 > task.first_tile()) {
    task.copy_k(tiles.k, j0 - S::kBlockN).next();
    commit_copies();
  }
  if (visible) warp.multiply_v();
}

// Tiles from j0 down in which every row of the warp sees every key, whole rows of k and v: no
// masks, no tails. Returns the first tile that is none of them, or, with true, the one whose scores
// need a new shift and are lost.
template <class S>
__device__ __forceinline__ bool plain_tiles(ForwardWarp<S>& warp, ForwardTask<S>& task,
                                            const ForwardTiles<S>& tiles, int& j0) {
  const VisibleKeys keys = task.warp_keys();
  const int first_tile = task.first_tile(), begin = max(first_tile, keys.all_begin);
  auto copy_k = task.copy_k(tiles.k, j0 - S::kBlockN);
  auto copy_v = task.copy_v(tiles.v, j0);
  const int end = min(keys.all_end, min(copy_k.whole_rows(), copy_v.whole_rows()));
  if (j0 + S::kBlockN > end || j0 < begin) return false;
  const AttentionForward& p = *task.p;
  const float scale = p.softmax_scale * kLog2e;
  bool renew = false;
  for (; j0 >= begin; j0 -= S::kBlockN) {
    wait_for_copies<0>();
    __syncthreads();  // k is here; v has been used by all
    copy_v.next_whole();
    commit_copies();
    warp.multiply_k();
    renew = !warp.exponentiate(scale);
    if (renew) break;
    wait_for_copies<0>();
    __syncthreads();  // v is here; k has been used by all
    if (j0 > first_tile) {
      copy_k.next_whole();
      commit_copies();
    }
    warp.multiply_v();
  }
  task = ForwardTask<S>(p);
  return renew;
}

template <class S>
__device__ __forceinline__ void forward_block(const AttentionForward& p) {
  extern __shared__ __align__(128) uint8_t memory[];
  const ForwardTiles<S> tiles(memory);
  ForwardWarp<S> warp;
  ForwardTask<S> task(p);
  if (task.m0 >= task.sequence.seqlen_q) return;
  warp.start(tiles.q + task.first_row * S::TileQ::kRowBytes, tiles.k, tiles.v, task.lane);
  // The last keys come first, too: what a causal mask hides in part is also the first tile.
  int j0 = (task.end() + S::kBlockN - 1) / S::kBlockN * S::kBlockN - S::kBlockN;
  if (j0 >= task.first_tile()) {
    task.copy_q(tiles.q).next();
    task.copy_k(tiles.k, j0).next();
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    warp.load_q();
    task.copy_v(tiles.v, j0).next();
    commit_copies();
  }
  bool arrived = true;
  while (j0 >= task.first_tile()) {
    any_tile(warp, task, tiles, j0, arrived);
    j0 -= S::kBlockN;
    arrived = false;
    if constexpr (!S::kGeneral) arrived = plain_tiles(warp, task, tiles, j0);
  }
  __syncthreads();  // q is no longer read by any warp: its tile takes the output
  store_results(warp, task, tiles.q);
}

// Rows of 32 per warp spill registers at head_dim 96 and 128 where mma is m16n8k8: sm_75 takes 16.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class S>
constexpr bool kFitsHere = kHasMma<typename S::T> && (S::kTilesM == 1 || S::kDim <= 64);
#else
template <class S>
constexpr bool kFitsHere = S::kGeneral || S::kDim > 128 || S::kTilesM == 2;
#endif

// For float the compiler would spill to have more blocks per multiprocessor than one; 0 leaves it
// alone.
template <class S>
__global__ void __launch_bounds__(S::kThreads, sizeof(typename S::T) == 4 ? 1 : 0)
    attention_forward_kernel(const __grid_constant__ AttentionForward p) {
  if constexpr (kFitsHere<S>) forward_block<S>(p);
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
  kernel<<<grid, S::kThreads, S::kSharedBytes, stream>>>(p);
  const cudaError_t error = cudaGetLastError();
  FL_CHECK(error == cudaSuccess, "attention_forward: ", cudaGetErrorString(error));
}

// softcap, ALiBi, masks and dropout need the general kernel; so do scales that turn the order of
// scores around.
inline bool is_general(const AttentionForward& p) {
  return p.softcap > 0 || p.alibi_slopes || p.mask.kind != MaskKind::kNone || p.dropout.enabled() ||
         !(p.softmax_scale > 0);
}

// The kernel for the head_dim's bucket; `arch` is that of the kernels (cuda_arch.h). Each T is
// compiled in a file of its own. Tiles are as large as registers and, on sm_75, 64 KB of shared
// memory allow. The general kernel comes in fewer buckets, and is the only one for float: each
// takes seconds to compile.
template <class T>
void forward_of(const AttentionForward& p, int arch, cudaStream_t stream) {
  constexpr bool kFloat = sizeof(T) == 4;
  const auto dim = static_cast<int>(std::max(p.head_dim, p.head_dim_v));
  if (kFloat || is_general(p)) {
    const int bucket = dim <= 32 ? 32 : dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
    return with_int(Ints<32, 64, 128, 256>{}, bucket, "head_dim", [&](auto constant) {
      constexpr int kDim = decltype(constant)::value;
      constexpr int kBlockN = kDim <= 64 ? 64 : (kDim <= 128 ? 64 : 32) / (kFloat ? 2 : 1);
      constexpr int kWarps = kFloat && kDim > 128 ? 2 : 4;
      launch_forward<ForwardShape<T, kDim, kBlockN, 1, true, kWarps>>(p, stream);
    });
  }
  if constexpr (!kFloat) {
    const int bucket = dim <= 128 ? (dim + 31) / 32 * 32 : (dim + 63) / 64 * 64;
    with_int(Ints<32, 64, 96, 128, 192, 256>{}, bucket, "head_dim", [&](auto constant) {
      constexpr int kDim = decltype(constant)::value, kBlockN = kDim > 128 ? 32 : 64;
      if constexpr (kDim > 64) {
        if (kDim > 128 || arch < 80) {
          return launch_forward<ForwardShape<T, kDim, kBlockN, 1, false>>(p, stream);
        }
      }
      if constexpr (kDim <= 128) {
        launch_forward<ForwardShape<T, kDim, kBlockN, 2, false>>(p, stream);
      }
    });
  }
}

}  // namespace fl
