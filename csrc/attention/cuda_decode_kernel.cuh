// The kernel around DecodeWarp, and the one that adds up the parts of the keys. Included once for
// each dtype.
#pragma once

#include <algorithm>

#include "attention/cuda_decode.cuh"
#include "common/check.h"
#include "common/dispatch.h"

namespace fl {

// What one block works on.
struct DecodeBlock {
  int b, head, part, group, first_row, rows, tiles;
  Sequence sequence;

  __device__ __forceinline__ DecodeBlock(const AttentionForward& p, const DecodePlan& plan)
      : b(blockIdx.z),
        head(blockIdx.y / plan.row_blocks),
        part(blockIdx.x),
        group(static_cast<int>(p.heads_q / p.heads_k)),
        first_row(blockIdx.y % plan.row_blocks * plan.block_rows),
        rows(min(plan.rows - first_row, plan.block_rows)),
        tiles((rows + 15) / 16),
        sequence(p, b) {}

  // Token and query head of a row of the block; rows behind the last are the last.
  __device__ __forceinline__ int token(int row) const {
    return (first_row + min(row, rows - 1)) / group;
  }
  __device__ __forceinline__ int query_head(int row) const {
    return head * group + (first_row + min(row, rows - 1)) % group;
  }
  __device__ __forceinline__ bool sees(int token, int j) const {
    return j >= sequence.begin(token) && j < sequence.end(token);
  }
  __device__ __forceinline__ KeyPart keys(int parts) const {
    return {sequence, token(0), token(rows - 1) + 1, part, parts};
  }
};

// Which 16 rows of the block a warp has, and which of the `warps` that share them it is.
struct WarpPlace {
  int warps, tile, slice;
  bool works;

  __device__ __forceinline__ WarpPlace(int tiles, int key_warps, int warp)
      : warps(key_warps),
        tile(warp % (kDecodeWarps / warps)),
        slice(warp / (kDecodeWarps / warps)),
        works(slice < warps && tile < tiles) {}
};

template <class S>
__device__ __forceinline__ void copy_queries(const AttentionForward& p, const DecodeBlock& block,
                                             uint32_t to) {
  using T = typename S::T;
  constexpr int kChunk = 16 / sizeof(T), kChunks = S::kDim / kChunk;
  const T* q = static_cast<const T*>(p.q.data) + block.b * p.q.stride_b;
  const auto strides =
      (p.q.stride_b | p.q.stride_h | p.q.stride_s) * static_cast<int64_t>(sizeof(T));
  const bool aligned = (reinterpret_cast<uintptr_t>(p.q.data) | strides) % 16 == 0;
  for (int index = threadIdx.x; index < block.tiles * 16 * kChunks; index += kDecodeThreads) {
    const int row = index / kChunks, chunk = index % kChunks;
    const int left = row < block.rows ? static_cast<int>(p.head_dim) - kChunk * chunk : 0;
    const T* from = q + block.query_head(row) * p.q.stride_h + block.token(row) * p.q.stride_s;
    copy_chunk(to + row / 16 * S::TileQ::kBytes + S::TileQ::at(row % 16, chunk),
               from + kChunk * chunk, min(max(left, 0), kChunk), aligned);
  }
}

template <class S>
__device__ __forceinline__ void adjust_scores(DecodeWarp<S>& warp, const AttentionForward& p,
                                              const DecodePlan& plan, const DecodeBlock& block,
                                              const DecodeRow (&rows)[2], int j0, bool all,
                                              int lane) {
  if (plan.general) {
    warp.map(lane, [&](float x, int row, int column) {
      const DecodeRow& r = rows[row / 8];
      const int j = j0 + column, distance = r.token + block.sequence.diagonal - j;
      float slope;
      const float y = shaped_score(p, x, r.slope, distance, slope) * kLog2e;
      return block.sees(r.token, j) ? y : -INFINITY;
    });
  } else if (!all) {
    warp.map(lane, [&](float x, int row, int column) {
      return block.sees(rows[row / 8].token, j0 + column) ? x : -INFINITY;
    });
  }
}

// Divides by the sums of all warps that share the rows, or leaves that to the sum of all parts.
// `memory` has the statistics of all warps, part of the rows by part.
template <class S>
__device__ __forceinline__ void combine_warps(const DecodeWarp<S>& warp, const AttentionForward& p,
                                              const DecodePlan& plan, const DecodeBlock& block,
                                              const float2* memory, const WarpPlace& place,
                                              int lane, float (&factor)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = 16 * place.tile + 8 * r + lane / 4;
    const float2* of_row = memory + row;
    float top = -INFINITY, sum = 0.0f;
    const int warps = place.warps, step = 16 * block.tiles;
    for (int w = 0; w < warps; ++w) top = fmaxf(top, of_row[w * step].x);
    const float finite = top == -INFINITY ? 0.0f : top;
    for (int w = 0; w < warps; ++w) sum += of_row[w * step].y * exp2f(of_row[w * step].x - finite);
    factor[r] = exp2f(of_row[place.slice * step].x - finite);
    const bool writes = place.slice == 0 && lane % 4 == 0 && row < block.rows;
    if (plan.parts > 1) {
      const int64_t at = plan.row_at(p, block.part, block.b, block.head, block.first_row + row);
      if (writes) plan.statistics(p)[at] = make_float2(top, sum);
    } else {
      const int h = block.query_head(row);
      const RowEnd end(top, sum, p.sinks ? p.sinks[h] : -INFINITY);
      factor[r] *= end.factor;
      float* to = p.lse + block.b * p.lse_stride_b + h * p.lse_stride_h;
      if (writes) to[block.token(row)] = end.lse;
    }
  }
}

// Adds up what the warps have staged, in order, and writes it.
template <class S>
__device__ __forceinline__ void write_outputs(const AttentionForward& p, const DecodePlan& plan,
                                              const DecodeBlock& block, uint32_t staged) {
  using T = typename S::T;
  constexpr int kChunks = S::kDim / 4;
  const int columns = static_cast<int>(p.head_dim_v), warps = S::key_warps(block.tiles);
  T* o = static_cast<T*>(p.o.data) + block.b * p.o.stride_b;
  const auto strides =
      (p.o.stride_b | p.o.stride_h | p.o.stride_s) * static_cast<int64_t>(sizeof(T));
  const bool aligned = (reinterpret_cast<uintptr_t>(p.o.data) | strides) % (4 * sizeof(T)) == 0;
  for (int index = threadIdx.x; index < block.rows * kChunks; index += kDecodeThreads) {
    const int row = index / kChunks, chunk = index % kChunks;
    if (4 * chunk >= columns) continue;
    float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int w = 0; w < warps; ++w) {
      float y[4];
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(y[0]), "=f"(y[1]), "=f"(y[2]), "=f"(y[3])
                   : "r"(staged + (w * block.tiles + row / 16) * S::TileO::kBytes +
                         S::TileO::at(row % 16, chunk)));
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] += y[e];
    }
    if (plan.parts > 1) {
      const int64_t at = plan.row_at(p, block.part, block.b, block.head, block.first_row + row);
      *reinterpret_cast<float4*>(plan.scratch + at * plan.padded_v + 4 * chunk) =
          make_float4(x[0], x[1], x[2], x[3]);
    } else {
      T* to = o + block.query_head(row) * p.o.stride_h + block.token(row) * p.o.stride_s;
      store_four(to + 4 * chunk, x, columns - 4 * chunk, aligned);
    }
  }
}

// What all warps have found becomes what the block writes.
template <class S>
__device__ __forceinline__ void finish(const DecodeWarp<S>& warp, const AttentionForward& p,
                                       const DecodePlan& plan, const DecodeBlock& block,
                                       const WarpPlace& place, uint8_t* memory, int lane) {
  wait_for_copies<0>();
  __syncthreads();  // nobody reads tiles any more
  const int own = place.slice * block.tiles + place.tile;
  auto* of_warps = reinterpret_cast<float2*>(memory);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float2 x = warp.statistics(r);
    if (place.works && lane % 4 == 0) of_warps[16 * own + 8 * r + lane / 4] = x;
  }
  __syncthreads();
  float factor[2] = {0.0f, 0.0f};
  if (place.works) combine_warps(warp, p, plan, block, of_warps, place, lane, factor);
  __syncthreads();
  const uint32_t staged = shared_address(memory);
  if (place.works) warp.stage(staged + own * S::TileO::kBytes, factor, lane);
  __syncthreads();
  write_outputs<S>(p, plan, block, staged);
}

template <class S>
__device__ __forceinline__ void decode(const AttentionForward& p, const DecodePlan& plan) {
#if __CUDA_ARCH__ >= 800
  constexpr int kStages = S::stages(true);
#else
  constexpr int kStages = S::stages(false);
#endif
  using T = typename S::T;
  using Copy = CacheCopy<typename S::TileKv, T>;
  extern __shared__ __align__(128) uint8_t memory[];
  const int thread = threadIdx.x, lane = thread & 31;
  const DecodeBlock block(p, plan);
  const KeyPart part = block.keys(plan.parts);
  if (plan.parts > 1 && part.empty()) return;

  const WarpPlace place(block.tiles, S::key_warps(block.tiles), thread / 32);
  const uint32_t first = shared_address(memory), q = first + kStages * S::kStageBytes;
  copy_queries<S>(p, block, q);
  const Copy copy_k(p.k, block.head, p.head_dim, thread);
  const Copy copy_v(p.v, block.head, p.head_dim_v, thread);
  const int own_row = thread / S::TileKv::kChunks;
  typename Copy::Pages pages;
  Copy::look_up(p, plan, block.b, part.begin + own_row, part.end, pages);
  const auto copy_tile = [&](int j0, int stage) {
    if (j0 < part.end) {
      const int key = j0 + own_row;
      copy_k(first + stage, plan, pages, key, part.end);
      copy_v(first + stage + S::TileKv::kBytes, plan, pages, key, part.end);
      Copy::look_up(p, plan, block.b, key + S::kKeys, part.end, pages);
    }
    commit_copies();
  };

  DecodeRow rows[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = 16 * place.tile + 8 * r + lane / 4, h = block.query_head(row);
    rows[r].token = block.token(row);
    rows[r].slope = p.alibi_slopes ? p.alibi_slopes[block.b * p.alibi_stride_b + h] : 0.0f;
  }
  const VisibleKeys keys(block.sequence, block.token(16 * place.tile),
                         block.token(16 * place.tile + 15) + 1);
  DecodeWarp<S> warp(q + place.tile % block.tiles * S::TileQ::kBytes, first, lane);
  const float scale = plan.general ? 1.0f : p.softmax_scale * kLog2e;
  bool fresh = true;
  // Tile j0 is used while that kAhead keys further on arrives; the first rounds only copy.
  constexpr int kLastStage = (kStages - 1) * S::kStageBytes, kAhead = (kStages - 1) * S::kKeys;
  int stage = kStages > 1 ? S::kStageBytes : 0;
  for (int j0 = part.begin - kAhead; j0 < part.end; j0 += S::kKeys) {
    if (j0 >= part.begin) {
      if constexpr (kStages > 1) wait_for_copies<kStages - 2>();
      __syncthreads();  // this tile is here; the one before it has been used by all
    }
    copy_tile(j0 + kAhead, stage ? stage - S::kStageBytes : kLastStage);
    const int here = stage;
    stage = stage == kLastStage ? 0 : stage + S::kStageBytes;
    if (j0 < part.begin) continue;
    if constexpr (kStages == 1) {
      wait_for_copies<0>();
      __syncthreads();
    }
    if (fresh) warp.load_q();
#pragma unroll 1
    for (int s = place.slice; place.works && s < S::kSlices; s += place.warps) {
      const int j = j0 + 16 * s;
      if (j >= part.end) break;
      warp.aim(here, s);
      while (true) {
        warp.multiply_k();
        adjust_scores(warp, p, plan, block, rows, j, keys.all(j, j + 16), lane);
        if (fresh) break;
        if (warp.exponentiate(scale)) break;
        fresh = true;  // a new maximum is needed, and the scores once more
      }
      if (fresh) {
        warp.renew(scale);
        warp.pack_scores(0);
      }
      fresh = false;
      warp.multiply_v();
    }
  }

  finish(warp, p, plan, block, place, memory, lane);
}

template <class S>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    attention_decode_kernel(const __grid_constant__ AttentionForward p,
                            const __grid_constant__ DecodePlan plan) {
  if constexpr (kHasMma<typename S::T>) decode<S>(p, plan);
}

// Adds up the parts of the keys, in order: a warp per row, lanes along its columns.
template <class T>
__global__ void __launch_bounds__(kDecodeThreads)
    attention_decode_combine_kernel(const __grid_constant__ AttentionForward p,
                                    const __grid_constant__ DecodePlan plan) {
  const int lane = threadIdx.x % 32, b = blockIdx.z, head = blockIdx.y;
  const int row = blockIdx.x * kDecodeWarps + threadIdx.x / 32;
  if (row >= plan.rows) return;
  const int group = static_cast<int>(p.heads_q / p.heads_k),
            block_row = row / plan.block_rows * plan.block_rows;
  const int i0 = block_row / group,
            i1 = (min(block_row + plan.block_rows, plan.rows) - 1) / group + 1;
  const Sequence sequence(p, b);
  const int64_t first = plan.row_at(p, 0, b, head, row), step = p.batch * p.heads_k * plan.rows;
  const float2* statistics = plan.statistics(p) + first;
  int parts = 0;
  float top = -INFINITY;
  while (parts < plan.parts && !KeyPart(sequence, i0, i1, parts, plan.parts).empty()) {
    top = fmaxf(top, statistics[parts++ * step].x);
  }
  const float finite = top == -INFINITY ? 0.0f : top;
  float sum = 0.0f;
  for (int part = 0; part < parts; ++part) {
    sum += statistics[part * step].y * exp2f(statistics[part * step].x - finite);
  }
  const int h = head * group + row % group, i = row / group;
  const RowEnd end(top, sum, p.sinks ? p.sinks[h] : -INFINITY);
  if (lane == 0) p.lse[b * p.lse_stride_b + h * p.lse_stride_h + i] = end.lse;

  T* o = static_cast<T*>(p.o.data) + b * p.o.stride_b + h * p.o.stride_h + i * p.o.stride_s;
  const auto strides =
      (p.o.stride_b | p.o.stride_h | p.o.stride_s) * static_cast<int64_t>(sizeof(T));
  const bool aligned = (reinterpret_cast<uintptr_t>(p.o.data) | strides) % (4 * sizeof(T)) == 0;
  const float* from = plan.scratch + first * plan.padded_v;
  for (int column = 4 * lane; column < p.head_dim_v; column += 128) {
    float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int part = 0; part < parts; ++part) {
      const float weight = exp2f(statistics[part * step].x - finite) * end.factor;
      const float4 y =
          *reinterpret_cast<const float4*>(from + part * step * plan.padded_v + column);
      x[0] = fmaf(y.x, weight, x[0]);
      x[1] = fmaf(y.y, weight, x[1]);
      x[2] = fmaf(y.z, weight, x[2]);
      x[3] = fmaf(y.w, weight, x[3]);
    }
    store_four(o + column, x, static_cast<int>(p.head_dim_v) - column, aligned);
  }
}

inline void check_decode_launch() {
  const cudaError_t error = cudaGetLastError();
  FL_CHECK(error == cudaSuccess, "attention_decode: ", cudaGetErrorString(error));
}

template <class S>
void launch_shape(const AttentionForward& p, const DecodePlan& plan, bool asynchronous,
                  cudaStream_t stream) {
  auto* kernel = attention_decode_kernel<S>;
  const int bytes = S::shared_bytes(plan.tiles, asynchronous);
  if (bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    FL_CHECK(error == cudaSuccess, "attention_decode: ", cudaGetErrorString(error));
  }
  const auto heads = static_cast<unsigned>(p.heads_k), batch = static_cast<unsigned>(p.batch);
  kernel<<<dim3(plan.parts, heads * plan.row_blocks, batch), kDecodeThreads, bytes, stream>>>(p,
                                                                                              plan);
  check_decode_launch();
  if (plan.parts == 1) return;
  const auto blocks = static_cast<unsigned>((plan.rows + kDecodeWarps - 1) / kDecodeWarps);
  attention_decode_combine_kernel<typename S::T>
      <<<dim3(blocks, heads, batch), kDecodeThreads, 0, stream>>>(p, plan);
  check_decode_launch();
}

template <class T>
void launch_decode(const AttentionForward& p, const DecodePlan& plan, bool asynchronous,
                   cudaStream_t stream) {
  const int64_t dim = std::max(p.head_dim, p.head_dim_v);
  const int bucket = dim <= 64 ? 64 : dim <= 128 ? 128 : 256;
  with_int(Ints<64, 128, 256>{}, bucket, "head_dim", [&](auto constant) {
    launch_shape<DecodeShape<T, decltype(constant)::value>>(p, plan, asynchronous, stream);
  });
}

}  // namespace fl
