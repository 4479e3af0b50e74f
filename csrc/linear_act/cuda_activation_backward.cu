// activation_backward on CUDA: one pass over z and dout gives dz and the sums of its columns.
//
// Rows go in parts of kPassRows, whatever the GPU; each part leaves its sums in a row of its own,
// and these are added in order, so that dbias is reproducible.
#include <climits>

#include "common/check.h"
#include "linear_act/cuda_passes.h"
#include "linear_act/cuda_rows.cuh"
#include "linear_act/kernels.h"

namespace fl {
namespace {

// (part, 2, strips * Strip::kColumns)
template <class T>
__device__ __forceinline__ float* sums_of(float* partial, int64_t part, int which, int64_t strips,
                                          int64_t strip) {
  return partial + ((part * 2 + which) * strips + strip) * Strip<T>::kColumns;
}

// Adds the warps' sums in order.
template <class T>
__device__ __forceinline__ void store_sums(const Chunk<Strip<T>::kChunk>& sums, int lane, int warp,
                                           float* to) {
  constexpr int kColumns = Strip<T>::kColumns, kChunk = Strip<T>::kChunk;
  // First by a column's place in its chunk, so far apart that both sides find 32 different banks.
  constexpr int kStride = 32 + 32 / kChunk;
  __shared__ float of_warps[kPassWarps][kChunk * kStride];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) of_warps[warp][i * kStride + lane] = sums.v[i];
  __syncthreads();
  const int own = static_cast<int>(threadIdx.x);
  if (own < kColumns) {
    const int place = own % kChunk * kStride + own / kChunk;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kPassWarps; ++w) sum += of_warps[w][place];
    to[own] = sum;
  }
  __syncthreads();  // before the next sums
}

template <class T>
__global__ void __launch_bounds__(kPassThreads)
    activation_backward_kernel(const __grid_constant__ ActivationBackward p, float* partial) {
  using Values = Chunk<Strip<T>::kChunk>;
  const Strip<T> strip(p.rows, p.cols);
  const auto read = [&](const void* from, int64_t index) {
    Values values;
    values.load(static_cast<const T*>(from) + index, strip.count);
    return values;
  };
  Values sums = Values::of(0.0f), sums_up = sums;
  for (int64_t row = strip.first_row; row < strip.end_row; row += kPassWarps) {
    const int64_t index = row * p.cols + strip.column;
    const auto write = [&](void* to, const Values& values) {
      if (to) values.store(static_cast<T*>(to) + index, strip.count);
    };
    Values dz = read(p.dout, row * p.dout_stride + strip.column);
    if (p.z[0]) {
      const Values z = read(p.z[0], index), dout = dz;
      if (p.gated) {
        dz = dz * read(p.z[1], index);
        const Values dup = dout * activate(p.activation, z);
        write(p.dz[1], dup);
        sums_up = sums_up + dup;
      }
      dz = dz * slope(p.activation, z);
    }
    write(p.dz[0], dz);
    sums = sums + dz;
  }
  if (p.dbias[0]) {
    store_sums<T>(sums, strip.lane, strip.warp,
                  sums_of<T>(partial, strip.part, 0, strip.strips, strip.number));
  }
  if (p.dbias[1]) {
    store_sums<T>(sums_up, strip.lane, strip.warp,
                  sums_of<T>(partial, strip.part, 1, strip.strips, strip.number));
  }
}

// One block per strip, one thread per column.
template <class T>
__global__ void __launch_bounds__(Strip<T>::kColumns)
    bias_gradient_kernel(const __grid_constant__ ActivationBackward p, float* partial,
                         int64_t parts) {
  const int own = static_cast<int>(threadIdx.x);
  const int64_t column = blockIdx.x * int64_t{Strip<T>::kColumns} + own;
  if (column >= p.cols) return;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    if (p.dbias[which] == nullptr) continue;
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t part = 0; part < parts; ++part) {
      sum += sums_of<T>(partial, part, which, gridDim.x, blockIdx.x)[own];
    }
    assign(static_cast<T*>(p.dbias[which])[column], sum);
  }
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  FL_CHECK(error == cudaSuccess, "activation_backward: ", cudaGetErrorString(error));
}

}  // namespace

int64_t cuda_activation_backward_workspace(const ActivationBackward& p) {
  if (p.dbias[0] == nullptr && p.dbias[1] == nullptr) return 0;
  int64_t floats = 0;
  with_cuda_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    floats = pass_parts(p.rows) * 2 * pass_strips<T>(p.cols) * Strip<T>::kColumns;
  });
  return floats;
}

void cuda_activation_backward(const ActivationBackward& p, float* workspace, void* stream) {
  if (p.cols == 0) return;
  const int64_t parts = pass_parts(p.rows);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  with_cuda_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t strips = pass_strips<T>(p.cols), blocks = strips * parts;
    FL_CHECK(blocks <= INT_MAX, "linear_act: a gradient of ", p.rows, " rows is too large");
    if (blocks > 0) {
      activation_backward_kernel<T>
          <<<static_cast<unsigned>(blocks), kPassThreads, 0, cuda_stream>>>(p, workspace);
      check_launch();
    }
    if (p.dbias[0] || p.dbias[1]) {
      bias_gradient_kernel<T>
          <<<static_cast<unsigned>(strips), Strip<T>::kColumns, 0, cuda_stream>>>(p, workspace,
                                                                                  parts);
      check_launch();
    }
  });
}

}  // namespace fl
