// The norm of all gradients on CUDA, in two stages of fixed order, so that it is bitwise
// reproducible: one partial sum per kAdamTask elements, then the sum of those.
#include "adam/cuda_operand.cuh"
#include "adam/kernels.h"
#include "common/check.h"

namespace fl {
namespace {

constexpr int kThreads = 256;
constexpr int kTensorsPerLaunch = 256;

struct NormEntry {
  const void* data;
  int64_t numel;
  DType dtype;
  int32_t first_task;  // of this tensor, among the blocks of the launch
};

struct NormBatch {
  double* partial_sums;
  int32_t count;
  NormEntry entries[kTensorsPerLaunch];
};

struct NormStrided {
  double* partial_sums;
  NormEntry entry;
  AdamLayout layout;
};

// A sum of squares that neither overflows nor vanishes, without double precision for each element:
// next to the plain sum, two of scaled elements for where that one leaves float32's range.
class SumOfSquares {
 public:
  __device__ __forceinline__ void add(float x) {
    const float lower = x * 0x1p-70f, higher = x * 0x1p80f;
    plain_ += x * x;
    lower_ += lower * lower;
    higher_ += higher * higher;
  }
  __device__ __forceinline__ double total() const {
    if (plain_ < 0x1p-60f) return higher_ * 0x1p-160;
    return plain_ < 0x1p127f ? plain_ : lower_ * 0x1p140;
  }

 private:
  float plain_ = 0, lower_ = 0, higher_ = 0;
};

// The sum over the block, in thread 0.
__device__ double block_sum(double value) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];
}

// Adds the thread's share of the elements [begin, end).
template <DType kDType>
__device__ __forceinline__ void sum_dense(const void* data, int64_t begin, int64_t end,
                                          SumOfSquares& sum) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t n = begin + warp * kWarpElements; n < end; n += kThreads * kWidth) {
    if (aligned && n + kWarpElements <= end) {
      float x[kWidth];
      load8(data, kDType, Eight(n, lane, kDType == DType::kFloat32), x);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum.add(x[i]);
    } else {
#pragma unroll 1
      for (int64_t i = n + lane; i < min(n + kWarpElements, end); i += 32) {
        sum.add(load1(data, kDType, i));
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    norm_dense_kernel(const __grid_constant__ NormBatch batch) {
  int low = 0, high = batch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (batch.entries[middle].first_task <= static_cast<int>(blockIdx.x)) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const NormEntry& entry = batch.entries[low];
  const int64_t begin = (blockIdx.x - entry.first_task) * kAdamTask;
  const int64_t end = begin + kAdamTask < entry.numel ? begin + kAdamTask : entry.numel;
  SumOfSquares sum;
  if (entry.dtype == DType::kFloat32) {
    sum_dense<DType::kFloat32>(entry.data, begin, end, sum);
  } else if (entry.dtype == DType::kFloat16) {
    sum_dense<DType::kFloat16>(entry.data, begin, end, sum);
  } else {
    sum_dense<DType::kBFloat16>(entry.data, begin, end, sum);
  }
  const double total = block_sum(sum.total());
  if (threadIdx.x == 0) batch.partial_sums[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads)
    norm_strided_kernel(const __grid_constant__ NormStrided strided) {
  const NormEntry& entry = strided.entry;
  const int64_t begin = blockIdx.x * kAdamTask;
  const int64_t end = begin + kAdamTask < entry.numel ? begin + kAdamTask : entry.numel;
  SumOfSquares sum;
  for (int64_t n = begin + threadIdx.x; n < end; n += kThreads) {
    sum.add(load1(entry.data, entry.dtype, offset_of(strided.layout, kGrad, n)));
  }
  const double total = block_sum(sum.total());
  if (threadIdx.x == 0) strided.partial_sums[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads)
    norm_total_kernel(const double* partial_sums, int64_t count, const float* grad_scale,
                      float* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial_sums[i];
  const double total = block_sum(sum);
  if (threadIdx.x == 0) *out = static_cast<float>(sqrt(total) / (grad_scale ? *grad_scale : 1.0f));
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  FL_CHECK(error == cudaSuccess, "grad_norm: ", cudaGetErrorString(error));
}

int64_t tasks_of(const AdamTensor& tensor) { return (tensor.numel + kAdamTask - 1) / kAdamTask; }

}  // namespace

void cuda_grad_norm(const GradNorm& norm, const float* grad_scale, float* out,
                    void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  int64_t done = 0;  // partial sums asked for
  NormBatch batch;
  batch.count = 0;
  int64_t tasks = 0;  // of the batch
  const auto flush = [&] {
    if (tasks == 0) return;
    batch.partial_sums = norm.partial_sums + done;
    norm_dense_kernel<<<static_cast<unsigned>(tasks), kThreads, 0, stream>>>(batch);
    check_launch();
    done += tasks;
    tasks = batch.count = 0;
  };
  for (int64_t i = 0; i < norm.count; ++i) {
    const AdamTensor& tensor = norm.tensors[i];
    if (tensor.numel == 0) continue;
    const NormEntry entry{tensor.data[kGrad], tensor.numel, tensor.dtype[kGrad],
                          static_cast<int32_t>(tasks)};
    if (tensor.layout) {
      flush();
      const NormStrided strided{norm.partial_sums + done, entry, *tensor.layout};
      norm_strided_kernel<<<static_cast<unsigned>(tasks_of(tensor)), kThreads, 0, stream>>>(
          strided);
      check_launch();
      done += tasks_of(tensor);
      continue;
    }
    batch.entries[batch.count++] = entry;
    tasks += tasks_of(tensor);
    if (batch.count == kTensorsPerLaunch) flush();
  }
  flush();
  norm_total_kernel<<<1, kThreads, 0, stream>>>(norm.partial_sums, done, grad_scale, out);
  check_launch();
}

}  // namespace fl
