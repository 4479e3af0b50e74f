// The launches of the attention backward for one dtype.
#pragma once

#include <algorithm>

#include "attention/cuda_backward_kernel.cuh"
#include "attention/cuda_backward_rows.cuh"
#include "attention/cuda_backward_sums.cuh"
#include "common/check.h"
#include "common/cuda_arch.h"
#include "common/dispatch.h"

namespace fl {

inline void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  FL_CHECK(error == cudaSuccess, "attention_backward, ", what, ": ", cudaGetErrorString(error));
}

inline unsigned tiles(int64_t size, int64_t tile) {
  return static_cast<unsigned>((size + tile - 1) / tile);
}

// At least one block, where there are heads and sequences: it prepares the main kernel's ticket.
inline dim3 row_grid(const AttentionForward& f) {
  return {std::max(tiles(f.seqlen_q, kRowUnit), 1u), static_cast<unsigned>(f.heads_q),
          static_cast<unsigned>(f.batch)};
}

inline bool is_empty(const dim3& grid) { return grid.x == 0 || grid.y == 0 || grid.z == 0; }

// Launches a kernel of shape S, with shared memory for its tiles.
template <class S, class Kernel>
void launch(Kernel* kernel, dim3 grid, const AttentionBackward& p, const BackwardScratch& scratch,
            cudaStream_t stream) {
  if (is_empty(grid)) return;
  const auto head_dim = static_cast<int>(p.forward.head_dim);
  const auto head_dim_v = static_cast<int>(p.forward.head_dim_v);
  const auto bytes = static_cast<int>(BackwardShared<S>(0, head_dim, head_dim_v).end);
  if (bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    FL_CHECK(error == cudaSuccess, "attention_backward: ", cudaGetErrorString(error));
  }
  kernel<<<grid, S::kThreads, bytes, stream>>>(p, scratch);
  check_launch("tiles");
}

// Whether every row of x begins at a multiple of 16 bytes.
template <class T>
bool is_aligned(const TensorView4& x) {
  const int64_t strides = x.stride_b | x.stride_h | x.stride_s;
  return (reinterpret_cast<uintptr_t>(x.data) | strides * sizeof(T)) % 16 == 0;
}

template <class T, int kDim, bool kGeneral, bool kOld, bool kWide = false>
void launch_main(const AttentionBackward& p, BackwardScratch scratch, cudaStream_t stream) {
  using S = BackwardShape<T, kDim, kGeneral, kOld, kWide>;
  const AttentionForward& f = p.forward;
  scratch.whole_chunks =
      f.head_dim == kDim && f.head_dim_v == kDim && is_aligned<T>(f.q) && is_aligned<T>(p.dout);
  const dim3 grid(tiles(f.seqlen_k, S::kBlockN) * (kDim / S::kColumns),
                  static_cast<unsigned>(f.heads_k), static_cast<unsigned>(f.batch));
  launch<S>(attention_backward_kernel<T, kDim, kGeneral, kWide>, grid, p, scratch, stream);
}

// Whether there are keys and, on this GPU, shared memory for blocks of 128 keys.
template <class S>
bool takes_wide(int64_t seqlen_k) {
  const int most = device_attribute("attention", cudaDevAttrMaxSharedMemoryPerBlockOptin);
  constexpr int kStatic = 1024;  // more than the static shared memory and what the GPU reserves
  return seqlen_k > 64 && BackwardShared<S>(0, S::kDim, S::kDim).end + kStatic <= most;
}

template <class T, bool kOld>
void launch_128(const AttentionBackward& p, const BackwardScratch& scratch, cudaStream_t stream) {
  if constexpr (!kOld) {
    if (takes_wide<BackwardShape<T, 128, false, false, true>>(p.forward.seqlen_k)) {
      return launch_main<T, 128, false, false, true>(p, scratch, stream);
    }
  }
  launch_main<T, 128, false, kOld>(p, scratch, stream);
}

// What the general kernel needs besides.
template <class T, int kDim, bool kOld>
void launch_sums(const AttentionBackward& p, const BackwardScratch& scratch, cudaStream_t stream) {
  using S = BackwardShape<T, kDim, true, kOld>;
  const AttentionForward& f = p.forward;
  const dim3 rows(tiles(f.seqlen_q, S::kBlockM), static_cast<unsigned>(f.heads_q),
                  static_cast<unsigned>(f.batch));
  launch<S>(attention_row_sums_kernel<T, kDim>, rows, p, scratch, stream);
  if (p.dmask == nullptr || f.seqlen_k == 0) return;
  const unsigned tiles_q = p.dmask_stride_q ? tiles(f.seqlen_q, S::kBlockM) : 1;
  const unsigned tiles_k = p.dmask_stride_k ? tiles(f.seqlen_k, S::kBlockN) : 1;
  const dim3 mask(tiles_q * tiles_k, p.dmask_stride_h ? static_cast<unsigned>(f.heads_q) : 1,
                  p.dmask_stride_b ? static_cast<unsigned>(f.batch) : 1);
  launch<S>(attention_mask_gradient_kernel<T, kDim>, mask, p, scratch, stream);
}

template <class T>
void launch_backward(const AttentionBackward& p, const BackwardScratch& scratch, bool old_gpu,
                     cudaStream_t stream) {
  const AttentionForward& f = p.forward;
  const auto dim = static_cast<int>(std::max(f.head_dim, f.head_dim_v));
  const dim3 rows = row_grid(f);
  if (!is_empty(rows)) attention_row_data_kernel<T><<<rows, kRowThreads, 0, stream>>>(p, scratch);
  check_launch("row data");
  with_bool(old_gpu, [&](auto old) {
    constexpr bool kOld = decltype(old)::value;
    if (scratch.general) {
      dim > 128 ? launch_sums<T, 256, kOld>(p, scratch, stream)
                : launch_sums<T, 128, kOld>(p, scratch, stream);
    }
    if (f.seqlen_k == 0) return;
    if (dim > 128) return launch_main<T, 256, true, kOld>(p, scratch, stream);
    if (scratch.general) {
      return dim > 64 ? launch_main<T, 128, true, kOld>(p, scratch, stream)
                      : launch_main<T, 64, true, kOld>(p, scratch, stream);
    }
    if constexpr (sizeof(T) == 2) {
      if (dim > 64) return launch_128<T, kOld>(p, scratch, stream);
      launch_main<T, 64, false, kOld>(p, scratch, stream);
    }
  });
  if (p.dsinks) {
    attention_sinks_gradient_kernel<kRowThreads>
        <<<static_cast<unsigned>(f.heads_q), kRowThreads, 0, stream>>>(p, scratch);
    check_launch("sinks");
  }
  if (!is_empty(rows)) attention_dq_kernel<T><<<rows, kRowThreads, 0, stream>>>(p, scratch);
  check_launch("dq");
}

}  // namespace fl
