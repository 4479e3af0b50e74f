// What comes before and after the main kernel of the attention backward: data of every query row,
// and dq from its sums.
#pragma once

#include "attention/cuda_backward_shape.cuh"

namespace fl {

constexpr int kRowThreads = 256;

// 16 bytes of a row, zero from number `count` on.
template <class T, int kCount>
__device__ __forceinline__ void load_chunk(const T* from, int count, bool aligned,
                                           float (&x)[kCount]) {
  static_assert(kCount * sizeof(T) == 16);
  if (aligned && count >= kCount) {
    alignas(16) T values[kCount];
    *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(from);
#pragma unroll
    for (int e = 0; e < kCount; ++e) x[e] = static_cast<float>(values[e]);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) x[e] = e < count ? static_cast<float>(from[e]) : 0.0f;
  }
}

// Eight lanes' part of a . b, summed up: each lane takes every eighth chunk of 16 bytes.
template <class T>
__device__ __forceinline__ float dot_rows(const T* a, const T* b, int columns, bool aligned,
                                          int lane) {
  float sum = 0.0f;
  constexpr int kChunk = 16 / sizeof(T);
  for (int chunk = lane; kChunk * chunk < columns; chunk += 8) {
    float x[kChunk], y[kChunk];
    load_chunk(a + kChunk * chunk, columns - kChunk * chunk, aligned, x);
    load_chunk(b + kChunk * chunk, columns - kChunk * chunk, aligned, y);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) sum = fmaf(x[e], y[e], sum);
  }
#pragma unroll
  for (int offset = 1; offset < 8; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  return sum;
}

// One block per (batch, query head, kRowUnit rows): row data, zeros for dq and the turns.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    attention_row_data_kernel(const __grid_constant__ AttentionBackward p,
                              const __grid_constant__ BackwardScratch scratch) {
  const AttentionForward& f = p.forward;
  const int b = blockIdx.z, h = blockIdx.y, thread = threadIdx.x;
  const Sequence sequence(f, b);
  const int i0 = blockIdx.x * kRowUnit;
  if (thread == 0 && blockIdx.x == 0 && h == 0 && b == 0) *scratch.ticket = 0;
  if (i0 >= sequence.seqlen_q) return;
  const int64_t first = scratch.first_row(f, b, h, sequence) + i0;
  auto* sums = reinterpret_cast<float4*>(scratch.dq_tile(first, 0, scratch.columns / 8));
  for (int index = thread; index < kRowUnit * scratch.columns / 4; index += kRowThreads) {
    sums[index] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
  if (thread < kRowUnit / 16 * 2) scratch.turns[first / 16 * 2 + thread] = 0;

  const T* o = static_cast<const T*>(f.o.data) + b * f.o.stride_b + h * f.o.stride_h;
  const T* dout = static_cast<const T*>(p.dout.data) + b * p.dout.stride_b + h * p.dout.stride_h;
  const int columns = static_cast<int>(f.head_dim_v);
  const bool aligned = (reinterpret_cast<uintptr_t>(o) | reinterpret_cast<uintptr_t>(dout) |
                        f.o.stride_s * sizeof(T) | p.dout.stride_s * sizeof(T)) %
                           16 ==
                       0;
  const int64_t statistics = b * f.lse_stride_b + h * f.lse_stride_h + sequence.first_q;
  for (int r = thread / 8; r < kRowUnit; r += kRowThreads / 8) {
    const int i = i0 + r;
    const bool inside = i < sequence.seqlen_q;
    const int64_t row = sequence.first_q + i;
    const float dot =
        dot_rows(o + (inside ? row : 0) * f.o.stride_s, dout + (inside ? row : 0) * p.dout.stride_s,
                 inside ? columns : 0, aligned, thread % 8);
    const float lse = inside ? f.lse[statistics + i] : -INFINITY;
    const float dlse = inside && p.dlse ? p.dlse[statistics + i] : 0.0f;
    const float minus_lse = minus(lse) * (scratch.general ? 1.0f : kLog2e);
    const float4 half = half_of_pair<8>(r % 2, minus_lse, 1.0f, dlse - dot);
    if (thread % 8 == 0) scratch.row_data[first + r] = half;
  }
}

// dq = factor times its sums. One block per (batch, query head, kRowUnit rows).
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    attention_dq_kernel(const __grid_constant__ AttentionBackward p,
                        const __grid_constant__ BackwardScratch scratch) {
  const AttentionForward& f = p.forward;
  const int b = blockIdx.z, h = blockIdx.y;
  const Sequence sequence(f, b);
  const int i0 = blockIdx.x * kRowUnit;
  if (i0 >= sequence.seqlen_q) return;
  const int64_t first = scratch.first_row(f, b, h, sequence) + i0;
  T* dq = static_cast<T*>(p.dq.data) + b * p.dq.stride_b + h * p.dq.stride_h +
          sequence.first_q * p.dq.stride_s;
  const bool aligned = (reinterpret_cast<uintptr_t>(dq) | p.dq.stride_s * sizeof(T)) % 16 == 0;
  constexpr int kChunk = 16 / sizeof(T), kInCell = 8 / kChunk;  // columns; chunks of 8 columns
  struct alignas(2 * kChunk) Half {
    float x[kChunk / 2];
  };
  const int cells = (static_cast<int>(f.head_dim) + 7) / 8;
  for (int index = threadIdx.x; index < kRowUnit * cells * kInCell; index += kRowThreads) {
    const int part = index % kInCell, of_rows = index / kInCell;  // 8 rows and one cell together
    const int r = of_rows / 8 / cells * 8 + of_rows % 8, cell = of_rows / 8 % cells;
    const int column = 8 * cell + kChunk * part;
    const int i = i0 + r, count = static_cast<int>(f.head_dim) - column;
    if (i >= sequence.seqlen_q) continue;
    // Lanes 4 r % 8 to 4 r % 8 + 3 held columns 2 t (first 32 numbers) and 2 t + 1 (next).
    const float* tile = scratch.dq_tile(first + r, 8 * cell, scratch.columns / 8) +
                        r % 16 / 8 * 64 + r % 8 * 4 + kChunk / 2 * part;
    const Half even = *reinterpret_cast<const Half*>(tile);
    const Half odd = *reinterpret_cast<const Half*>(tile + 32);
    T* to = dq + i * p.dq.stride_s + column;
    alignas(16) T rounded[kChunk];
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      rounded[e] = T((e % 2 ? odd : even).x[e / 2] * f.softmax_scale);
    }
    if (aligned && count >= kChunk) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(rounded);
    } else {
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        if (e < count) to[e] = rounded[e];
      }
    }
  }
}

}  // namespace fl
