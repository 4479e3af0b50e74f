// Passes over all scores that the attention backward needs in general: exact sums of rows, and the
// mask's own gradient. Both run in a fixed order without atomics.
#pragma once

#include "attention/cuda_backward_tile.cuh"

namespace fl {

constexpr float kCoarse = 1024.0f;  // from here on neighbouring float32 numbers lie 1e-4 apart

// A sum that keeps what its additions round off (Kahan 1965): one chain of hundreds of equal terms
// would drift further than the rule for float32 allows.
struct ExactSum {
  float sum = 0.0f, lost = 0.0f;

  __device__ __forceinline__ void add(float x) {
    const float missing = x - lost, next = sum + missing;
    lost = (next - sum) - missing;
    sum = next;
  }
};

// normalizer = 1 / (sum_j exp(s - lse) + exp(sink - lse)): 1 but for the rounding of lse.
// minus_delta = dlse - normalizer sum_j exp(s - lse) dp: dlse - do . o but for the rounding of o.
// One block per (batch, query head, kBlockM rows). Only for float32, whose ds would show the
// rounding of lse and o, where dmask is wanted, whose sums over whole rows would, and where lse is
// coarse: of a row that a mask of the most negative numbers hides it keeps nothing of the scores.
template <class S>
__device__ __forceinline__ void sum_rows(const AttentionBackward& p,
                                         const BackwardScratch& scratch) {
  using T = typename S::T;
  extern __shared__ __align__(128) uint8_t memory[];
  const AttentionForward& f = p.forward;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int b = blockIdx.z, h = blockIdx.y, m0 = blockIdx.x * S::kBlockM;
  const Sequence sequence(f, b);
  if (m0 >= sequence.seqlen_q) return;
  const int i_end = min(m0 + S::kBlockM, sequence.seqlen_q), i = m0 + thread;
  const int64_t row = scratch.first_row(f, b, h, sequence) + m0;
  const bool mine = thread < S::kBlockM && i < i_end;
  const int64_t at = b * f.lse_stride_b + h * f.lse_stride_h + sequence.first_q + i;
  const float lse = mine ? f.lse[at] : -INFINITY;
  const bool coarse = fabsf(lse) > kCoarse && lse != -INFINITY;
  if (!__syncthreads_or(coarse || p.dmask || sizeof(T) == 4)) return;

  const int head_dim = static_cast<int>(f.head_dim), head_dim_v = static_cast<int>(f.head_dim_v);
  const int head_k = h / (static_cast<int>(f.heads_q) / static_cast<int>(f.heads_k));
  const BackwardShared<S> shared(shared_address(memory), head_dim, head_dim_v);
  copy_rows<typename S::TileQ, S>(shared.q, head_of<T>(f.q, b, h, sequence.first_q), f.q.stride_s,
                                  m0, sequence.seqlen_q, head_dim);
  copy_rows<typename S::TileQ, S>(shared.dout, head_of<T>(p.dout, b, h, sequence.first_q),
                                  p.dout.stride_s, m0, sequence.seqlen_q, head_dim_v);
  copy_row_data<S>(scratch.row_data + row, shared.rows);
  GradientTile<S> tile(shared, warp, lane);
  const ScoreRules rules(f, b, h, sequence.diagonal);

  constexpr int kSteps = S::kBlockM / S::kStepM;
  ExactSum sums[kSteps][S::kTilesN][2], dots[kSteps][S::kTilesN][2];
  const int j_begin = sequence.begin(m0) / S::kBlockN * S::kBlockN, j_end = sequence.end(i_end - 1);
  for (int j0 = j_begin; j0 < j_end; j0 += S::kBlockN) {
    copy_rows<typename S::TileKv, S>(shared.k, head_of<T>(f.k, b, head_k, sequence.first_k),
                                     f.k.stride_s, j0, sequence.seqlen_k, head_dim);
    copy_rows<typename S::TileKv, S>(shared.v, head_of<T>(f.v, b, head_k, sequence.first_k),
                                     f.v.stride_s, j0, sequence.seqlen_k, head_dim_v);
    store_decisions<S>(shared, f, sequence, rules, {b, h, m0, j0});
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();  // k and v are here
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int first = step * S::kStepM;
      tile.multiply(first, head_dim, head_dim_v);
      tile.differentiate(f, sequence, rules, {b, h, m0 + first, j0 + warp * S::kWarpKeys}, first,
                         [&](float probability, float dp, float, int, int n, int e) {
                           sums[step][n][e % 2].add(probability);
                           dots[step][n][e % 2].add(probability * dp);
                         });
    }
    __syncthreads();  // k and v have been used by all
  }

  // Over the lanes with the same column, then over the warps, through shared memory.
  auto* parts = reinterpret_cast<float2*>(memory);
  __syncthreads();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int n = 0; n < S::kTilesN; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float2 part = make_float2(sums[step][n][c].sum, dots[step][n][c].sum);
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) {
          part.x += __shfl_xor_sync(~0u, part.x, offset);
          part.y += __shfl_xor_sync(~0u, part.y, offset);
        }
        const int column = step * S::kStepM + 8 * n + lane % 4 * 2 + c;
        if (lane < 4) parts[warp * S::kBlockM + column] = part;
      }
    }
  }
  __syncthreads();
  if (warp * 32 >= S::kBlockM) return;
  float sum = f.sinks && lse != -INFINITY ? exp2f((f.sinks[h] - lse) * kLog2e) : 0.0f, dot = 0.0f;
  for (int w = 0; w < S::kWarps; ++w) {
    const float2 part = parts[w * S::kBlockM + thread % S::kBlockM];
    sum += part.x;
    dot += part.y;
  }
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  const float minus_delta = mine ? (p.dlse ? p.dlse[at] : 0.0f) - dot * inverse : 0.0f;
  const float4 half = half_of_pair<1>(thread % 2, minus(lse), inverse, minus_delta);
  if (thread < S::kBlockM) scratch.row_data[row + thread] = half;
}

// The block's sums, (queries, keys), to dmask: added up where the mask is broadcast along one.
template <class S>
__device__ __forceinline__ void store_mask_gradient(
    const AttentionBackward& p, float* cells,
    const Accumulator (&sums)[S::kBlockM / S::kStepM][S::kTilesN], int m0, int j0) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  constexpr int kStride = S::kBlockN + 4;  // the lanes' cells lie in 32 different banks
  static_assert(kStride * S::kBlockM * 4 <= 2 * (S::TileQ::kPanelBytes + S::TileKv::kPanelBytes));
#pragma unroll
  for (int step = 0; step < S::kBlockM / S::kStepM; ++step) {
#pragma unroll
    for (int n = 0; n < S::kTilesN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = step * S::kStepM + 8 * n + lane % 4 * 2 + e % 2;
        const int j = warp * S::kWarpKeys + e / 2 * 8 + lane / 4;
        cells[i * kStride + j] = sums[step][n].r[e];
      }
    }
  }
  __syncthreads();
  const bool all_q = p.dmask_stride_q == 0, all_k = p.dmask_stride_k == 0;
  const int rows = all_q ? 1 : S::kBlockM, columns = all_k ? 1 : S::kBlockN;
  float* to = p.dmask + blockIdx.z * p.dmask_stride_b + blockIdx.y * p.dmask_stride_h;
  for (int index = thread; index < rows * columns; index += S::kThreads) {
    const int i = index / columns, j = index % columns;
    if (m0 + i >= p.forward.seqlen_q || j0 + j >= p.forward.seqlen_k) continue;
    float sum = 0.0f;
    for (int q = i; q < (all_q ? S::kBlockM : i + 1); ++q) {
      for (int k = j; k < (all_k ? S::kBlockN : j + 1); ++k) sum += cells[q * kStride + k];
    }
    to[(m0 + i) * p.dmask_stride_q + (j0 + j) * p.dmask_stride_k] = sum;
  }
}

// One block per tile of the mask's own shape; it goes through all that the mask is broadcast over.
// Grid: (query tiles times key tiles, heads, batch), each 1 along broadcast dimensions.
template <class S>
__device__ __forceinline__ void differentiate_mask(const AttentionBackward& p,
                                                   const BackwardScratch& scratch) {
  using T = typename S::T;
  extern __shared__ __align__(128) uint8_t memory[];
  const AttentionForward& f = p.forward;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const bool all_q = p.dmask_stride_q == 0, all_k = p.dmask_stride_k == 0;
  const bool all_h = p.dmask_stride_h == 0, all_b = p.dmask_stride_b == 0;
  const int seqlen_q = static_cast<int>(f.seqlen_q), seqlen_k = static_cast<int>(f.seqlen_k);
  const int tiles_k = all_k ? 1 : (seqlen_k + S::kBlockN - 1) / S::kBlockN;
  const int m_begin = blockIdx.x / tiles_k * S::kBlockM, m_step = all_q ? seqlen_q : S::kBlockM;
  const int j_begin = blockIdx.x % tiles_k * S::kBlockN, j_step = all_k ? seqlen_k : S::kBlockN;
  const int m_end = min(m_begin + m_step, seqlen_q), j_end = min(j_begin + j_step, seqlen_k);
  const int b_begin = blockIdx.z, b_end = all_b ? static_cast<int>(f.batch) : b_begin + 1;
  const int h_begin = blockIdx.y, h_end = all_h ? static_cast<int>(f.heads_q) : h_begin + 1;
  const int head_dim = static_cast<int>(f.head_dim), head_dim_v = static_cast<int>(f.head_dim_v);
  const int group = static_cast<int>(f.heads_q) / static_cast<int>(f.heads_k);

  const BackwardShared<S> shared(shared_address(memory), head_dim, head_dim_v);
  GradientTile<S> tile(shared, warp, lane);
  constexpr int kSteps = S::kBlockM / S::kStepM;
  Accumulator sums[kSteps][S::kTilesN] = {};
  for (int b = b_begin; b < b_end; ++b) {
    const Sequence sequence(f, b);
    for (int h = h_begin; h < h_end; ++h) {
      const ScoreRules rules(f, b, h, sequence.diagonal);
      for (int m0 = m_begin; m0 < m_end; m0 += S::kBlockM) {
        for (int j0 = j_begin; j0 < j_end; j0 += S::kBlockN) {
          if (VisibleQueries(sequence, j0, j0 + S::kBlockN).none(m0, m0 + S::kBlockM)) continue;
          copy_rows<typename S::TileQ, S>(shared.q, head_of<T>(f.q, b, h, 0), f.q.stride_s, m0,
                                          seqlen_q, head_dim);
          copy_rows<typename S::TileQ, S>(shared.dout, head_of<T>(p.dout, b, h, 0), p.dout.stride_s,
                                          m0, seqlen_q, head_dim_v);
          copy_rows<typename S::TileKv, S>(shared.k, head_of<T>(f.k, b, h / group, 0), f.k.stride_s,
                                           j0, seqlen_k, head_dim);
          copy_rows<typename S::TileKv, S>(shared.v, head_of<T>(f.v, b, h / group, 0), f.v.stride_s,
                                           j0, seqlen_k, head_dim_v);
          copy_row_data<S>(scratch.row_data + scratch.first_row(f, b, h, sequence) + m0,
                           shared.rows);
          store_decisions<S>(shared, f, sequence, rules, {b, h, m0, j0});
          commit_copies();
          wait_for_copies<0>();
          __syncthreads();  // the tiles are here
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            const int first = step * S::kStepM;
            tile.multiply(first, head_dim, head_dim_v);
            tile.differentiate(
                f, sequence, rules, {b, h, m0 + first, j0 + warp * S::kWarpKeys}, first,
                [&](float probability, float dp, float minus_delta, int, int n, int e) {
                  sums[step][n].r[e] += probability * (dp + minus_delta);
                });
          }
          __syncthreads();  // the tiles have been used by all
        }
      }
    }
  }
  wait_for_copies<0>();
  __syncthreads();
  store_mask_gradient<S>(p, reinterpret_cast<float*>(memory), sums, m_begin, j_begin);
}

template <class T, int kDim>
__global__ void __launch_bounds__(BackwardShape<T, kDim, true, kOldGpu>::kThreads, 1)
    attention_row_sums_kernel(const __grid_constant__ AttentionBackward p,
                              const __grid_constant__ BackwardScratch scratch) {
  using S = BackwardShape<T, kDim, true, kOldGpu>;
  if constexpr (kHasMma<T>) sum_rows<S>(p, scratch);
}

template <class T, int kDim>
__global__ void __launch_bounds__(BackwardShape<T, kDim, true, kOldGpu>::kThreads, 1)
    attention_mask_gradient_kernel(const __grid_constant__ AttentionBackward p,
                                   const __grid_constant__ BackwardScratch scratch) {
  using S = BackwardShape<T, kDim, true, kOldGpu>;
  if constexpr (kHasMma<T>) differentiate_mask<S>(p, scratch);
}

// dsink = sum_i p_sink[i] (dlse[i] - do[i] . o[i]), p_sink = exp(sink - lse). One block per head.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    attention_sinks_gradient_kernel(const __grid_constant__ AttentionBackward p,
                                    const __grid_constant__ BackwardScratch scratch) {
  __shared__ float parts[kThreads];
  const AttentionForward& f = p.forward;
  const int h = blockIdx.x, thread = threadIdx.x;
  float sum = 0.0f;
  for (int b = 0; b < f.batch; ++b) {
    const Sequence sequence(f, b);
    const int64_t first_row = scratch.first_row(f, b, h, sequence);
    const float* lse_of = f.lse + b * f.lse_stride_b + h * f.lse_stride_h + sequence.first_q;
    for (int i0 = 0; i0 < sequence.seqlen_q; i0 += kThreads) {
      const int i = i0 + thread;
      float4 half = {};
      if (i / 2 * 2 < sequence.seqlen_q) half = scratch.row_data[first_row + i];
      const float next = __shfl_xor_sync(~0u, i % 2 ? half.x : half.w, 1);
      const float normalizer = i % 2 ? next : half.z, minus_delta = i % 2 ? half.y : next;
      const float lse = i < sequence.seqlen_q ? lse_of[i] : -INFINITY;
      const float probability = lse == -INFINITY ? 0.0f : exp2f((f.sinks[h] - lse) * kLog2e);
      sum = fmaf(probability * normalizer, minus_delta, sum);
    }
  }
  parts[thread] = sum;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) parts[thread] += parts[thread + half];
    __syncthreads();
  }
  if (thread == 0) p.dsinks[h] = parts[0];
}

}  // namespace fl
