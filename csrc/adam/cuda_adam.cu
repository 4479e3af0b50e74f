// Adam on CUDA: one launch updates up to kTensorsPerLaunch tensors of any sizes. The table of
// tensors travels as the kernel's argument, so that a step needs no copy to the device and can be
// captured into a graph. A tensor whose operands are laid out differently takes a launch of its
// own.
#include "adam/adam_math.h"
#include "adam/cuda_operand.cuh"
#include "adam/kernels.h"
#include "adam/stochastic_rounding.h"
#include "common/check.h"

namespace fl {
namespace {

constexpr int kThreads = 256;
constexpr int kTurns = 4;  // of kWidth elements per thread
constexpr int64_t kChunk = kThreads * kWidth * kTurns;
constexpr int kTensorsPerLaunch = 256;  // 24 KB of arguments; the limit is 32 KB since CUDA 12.1

struct Scalar {
  float v;
  __device__ __forceinline__ explicit Scalar(float value) : v(value) {}
  Scalar() = default;
};
#define FL_SCALAR __device__ __forceinline__ Scalar
FL_SCALAR operator-(Scalar a, Scalar b) { return Scalar(__fsub_rn(a.v, b.v)); }
FL_SCALAR operator*(Scalar a, Scalar b) { return Scalar(__fmul_rn(a.v, b.v)); }
FL_SCALAR operator/(Scalar a, Scalar b) { return Scalar(__fdiv_rn(a.v, b.v)); }
FL_SCALAR fma(Scalar a, Scalar b, Scalar c) { return Scalar(__fmaf_rn(a.v, b.v, c.v)); }
FL_SCALAR sqrt(Scalar a) { return Scalar(__fsqrt_rn(a.v)); }
FL_SCALAR max(Scalar a, Scalar b) { return a.v > b.v ? a : b; }  // b where either is NaN
#undef FL_SCALAR

struct Common {
  AdamScalars scalars;
  const float *lr, *grad_scale, *found_inf, *grad_norm;
  const float2* coefficients;  // per tensor: step size, inverse root of the second correction
  float max_grad_norm, decoupled_weight_decay;
  bool store_grad, stochastic_rounding;
  uint64_t seed;
  uint32_t offset;
};

struct Entry {
  AdamTensor tensor;
  int32_t index;        // in the whole list: the counter of stochastic rounding
  int32_t first_chunk;  // of this tensor, among the blocks of the launch
};

struct Batch {
  Common common;
  int32_t count;
  Entry entries[kTensorsPerLaunch];
};

static_assert(sizeof(Batch) <= 32764);

struct Strided {
  Common common;
  Entry entry;
  AdamLayout layout;
};

// The options as this step has them, once what lies on the device is read.
__device__ __forceinline__ AdamScalars read_scalars(const Common& common) {
  AdamScalars s = common.scalars;
  if (common.lr) s.decay = 1.0f - *common.lr * common.decoupled_weight_decay;
  if (common.grad_scale) s.grad_scale = 1.0f / *common.grad_scale;
  if (common.grad_norm) {
    const float factor = common.max_grad_norm / (*common.grad_norm + 1e-6f);
    if (!(factor > 1.0f)) s.grad_factor *= factor;
  }
  return s;
}

__device__ __forceinline__ void round8(const Common& common, const Entry& entry, int operand,
                                       int64_t n, float* values) {
  const DType dtype = entry.tensor.dtype[operand];
  if (!common.stochastic_rounding || dtype == DType::kFloat32) return;
  const uint32_t role = operand == kParam ? 0u : operand == kExpAvg ? 1u : 2u;
  const uint64_t call = static_cast<uint64_t>(n) / kWidth;
  const PhiloxWords random =
      philox4x32_10(static_cast<uint32_t>(call), static_cast<uint32_t>(call >> 32),
                    4u * entry.index + role, common.offset, common.seed);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const uint32_t bits = random.word[i / 2] >> (16 * (i % 2)) & 0xffffu;
    values[i] = dtype == DType::kBFloat16 ? round_to_bfloat16(values[i], bits)
                                          : round_to_float16(values[i], bits);
  }
}

// Updates `count` elements from n on; n is a multiple of kWidth. load(operand, out) and
// store(operand, in) move them.
template <bool kAmsgrad, class Load, class Store>
__device__ __forceinline__ void update8(const Common& common, const AdamScalars& s,
                                        const Entry& entry, int64_t n, Load load, Store store) {
  const AdamTensor& tensor = entry.tensor;
  const bool master = tensor.data[kMaster] != nullptr;
  const float2 rates = common.coefficients
                           ? common.coefficients[entry.index]
                           : make_float2(tensor.step_size, tensor.inv_sqrt_correction2);
  float param[kWidth], grad[kWidth], exp_avg[kWidth], exp_avg_sq[kWidth], max_sq[kWidth];
  load(master ? kMaster : kParam, param);
  load(kGrad, grad);
  load(kExpAvg, exp_avg);
  load(kExpAvgSq, exp_avg_sq);
  if constexpr (kAmsgrad) load(kMaxExpAvgSq, max_sq);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    grad[i] *= s.grad_scale;
    AdamLanes<Scalar> x;
    x.param = Scalar(param[i]);
    x.grad = Scalar(grad[i] * s.grad_factor);
    x.exp_avg = Scalar(exp_avg[i]);
    x.exp_avg_sq = Scalar(exp_avg_sq[i]);
    if constexpr (kAmsgrad) x.max_exp_avg_sq = Scalar(max_sq[i]);
    adam_update<kAmsgrad>(s, rates.x, rates.y, x);
    param[i] = x.param.v;
    exp_avg[i] = x.exp_avg.v;
    exp_avg_sq[i] = x.exp_avg_sq.v;
    if constexpr (kAmsgrad) max_sq[i] = x.max_exp_avg_sq.v;
  }
  if (common.store_grad) store(kGrad, grad);
  if constexpr (kAmsgrad) store(kMaxExpAvgSq, max_sq);
  if (master) {
    store(kMaster, param);
  } else {
    round8(common, entry, kParam, n, param);
  }
  store(kParam, param);
  round8(common, entry, kExpAvg, n, exp_avg);
  store(kExpAvg, exp_avg);
  round8(common, entry, kExpAvgSq, n, exp_avg_sq);
  store(kExpAvgSq, exp_avg_sq);
}

__device__ __forceinline__ int left_in(const AdamTensor& tensor, int64_t n) {
  const int64_t left = tensor.numel - n;
  return left < kWidth ? static_cast<int>(left) : kWidth;
}

template <bool kAmsgrad>
__global__ void __launch_bounds__(kThreads) adam_dense_kernel(const __grid_constant__ Batch batch) {
  if (batch.common.found_inf && *batch.common.found_inf > 0.0f) return;
  int low = 0, high = batch.count;  // the last entry with first_chunk <= blockIdx.x
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (batch.entries[middle].first_chunk <= static_cast<int>(blockIdx.x)) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const Entry& entry = batch.entries[low];
  const AdamTensor& tensor = entry.tensor;
  const AdamScalars s = read_scalars(batch.common);
  int64_t n = (blockIdx.x - entry.first_chunk) * kChunk + threadIdx.x * kWidth;
  for (int turn = 0; turn < kTurns && n < tensor.numel; ++turn, n += kThreads * kWidth) {
    const int count = left_in(tensor, n);
    update8<kAmsgrad>(
        batch.common, s, entry, n,
        [&](int o, float* out) { load8(tensor.data[o], tensor.dtype[o], n, count, out); },
        [&](int o, const float* in) { store8(tensor.data[o], tensor.dtype[o], n, count, in); });
  }
}

template <bool kAmsgrad>
__global__ void __launch_bounds__(kThreads)
    adam_strided_kernel(const __grid_constant__ Strided strided) {
  if (strided.common.found_inf && *strided.common.found_inf > 0.0f) return;
  const AdamTensor& tensor = strided.entry.tensor;
  const AdamScalars s = read_scalars(strided.common);
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if (n >= tensor.numel) return;
  const int count = left_in(tensor, n);
  update8<kAmsgrad>(
      strided.common, s, strided.entry, n,
      [&](int o, float* out) {
#pragma unroll 1
        for (int i = 0; i < kWidth; ++i) {
          const int64_t at = i < count ? offset_of(strided.layout, o, n + i) : 0;
          out[i] = i < count ? load1(tensor.data[o], tensor.dtype[o], at) : 0.0f;
        }
      },
      [&](int o, const float* in) {
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          const int64_t at = offset_of(strided.layout, o, n + i);
          store1(tensor.data[o], tensor.dtype[o], at, in[i]);
        }
      });
}

constexpr int kStepsPerLaunch = 2048;

struct StepCounts {
  float* counts[kStepsPerLaunch];
  int32_t count;
  float2* coefficients;
  const float *lr, *found_inf;
  double lr_value, beta1, beta2;
};

// Counts the steps that live on the device and works out what depends on them.
__global__ void adam_advance_kernel(const __grid_constant__ StepCounts steps) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= steps.count || (steps.found_inf && *steps.found_inf > 0.0f)) return;
  const float step = *steps.counts[i] += 1.0f;
  const double lr = steps.lr ? *steps.lr : steps.lr_value;
  steps.coefficients[i] =
      make_float2(static_cast<float>(lr / (1.0 - pow(steps.beta1, step))),
                  static_cast<float>(1.0 / ::sqrt(1.0 - pow(steps.beta2, step))));
}

void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  FL_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

void advance(const AdamStepCuda& call, cudaStream_t stream) {
  for (int64_t first = 0; first < call.step.count; first += kStepsPerLaunch) {
    const int64_t left = call.step.count - first;
    StepCounts steps;
    steps.count = static_cast<int32_t>(left < kStepsPerLaunch ? left : kStepsPerLaunch);
    for (int i = 0; i < steps.count; ++i) steps.counts[i] = call.step_counts[first + i];
    steps.coefficients = reinterpret_cast<float2*>(call.coefficients) + first;
    steps.lr = call.lr;
    steps.found_inf = call.found_inf;
    steps.lr_value = call.lr_value;
    steps.beta1 = call.beta1;
    steps.beta2 = call.beta2;
    adam_advance_kernel<<<(steps.count + 127) / 128, 128, 0, stream>>>(steps);
    check_launch("adam_advance");
  }
}

Common common_of(const AdamStepCuda& call) {
  Common common;
  common.scalars = call.step.scalars;
  common.lr = call.lr;
  common.grad_scale = call.grad_scale;
  common.found_inf = call.found_inf;
  common.grad_norm = call.grad_norm;
  common.coefficients = reinterpret_cast<const float2*>(call.coefficients);
  common.max_grad_norm = call.max_grad_norm;
  common.decoupled_weight_decay = call.decoupled_weight_decay;
  common.store_grad = call.step.store_grad;
  common.stochastic_rounding = call.step.stochastic_rounding;
  common.seed = call.step.seed;
  common.offset = call.step.offset;
  return common;
}

void launch_dense(const Batch& batch, int64_t blocks, bool amsgrad, cudaStream_t stream) {
  if (blocks == 0) return;
  const auto kernel = amsgrad ? adam_dense_kernel<true> : adam_dense_kernel<false>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(batch);
  check_launch("adam_step");
}

void launch_strided(const Common& common, const Entry& entry, cudaStream_t stream) {
  const Strided strided{common, entry, *entry.tensor.layout};
  const int64_t per_block = kThreads * kWidth;
  const unsigned blocks = static_cast<unsigned>((entry.tensor.numel + per_block - 1) / per_block);
  const bool amsgrad = entry.tensor.data[kMaxExpAvgSq] != nullptr;
  const auto kernel = amsgrad ? adam_strided_kernel<true> : adam_strided_kernel<false>;
  kernel<<<blocks, kThreads, 0, stream>>>(strided);
  check_launch("adam_step");
}

}  // namespace

void cuda_adam_step(const AdamStepCuda& call, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  if (call.step_counts) advance(call, stream);
  Batch batch;
  batch.common = common_of(call);
  batch.count = 0;
  const bool amsgrad = call.step.tensors[0].data[kMaxExpAvgSq] != nullptr;
  int64_t blocks = 0;
  for (int64_t i = 0; i < call.step.count; ++i) {
    const AdamTensor& tensor = call.step.tensors[i];
    if (tensor.numel == 0) continue;
    const Entry entry{tensor, static_cast<int32_t>(i), static_cast<int32_t>(blocks)};
    if (tensor.layout) {
      launch_strided(batch.common, entry, stream);
      continue;
    }
    batch.entries[batch.count++] = entry;
    blocks += (tensor.numel + kChunk - 1) / kChunk;
    if (batch.count == kTensorsPerLaunch) {
      launch_dense(batch, blocks, amsgrad, stream);
      batch.count = 0;
      blocks = 0;
    }
  }
  launch_dense(batch, blocks, amsgrad, stream);
}

}  // namespace fl
