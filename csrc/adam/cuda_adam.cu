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
constexpr int kTensorsPerLaunch = 256;  // 28 KB of arguments; the limit is 32 KB since CUDA 12.1

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
  bool aligned;         // every operand, to 16 bytes
  bool wide;            // some operand is float32
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

// The random bits of the elements 8 call to 8 call + 7, 16 each.
__device__ __forceinline__ PhiloxWords random8(const Common& common, const Entry& entry,
                                               int operand, int64_t call) {
  const uint32_t role = operand == kParam ? 0u : operand == kExpAvg ? 1u : 2u;
  return philox4x32_10(static_cast<uint32_t>(call), static_cast<uint32_t>(call >> 32),
                       4u * entry.index + role, common.offset, common.seed);
}

// What a thread updates at a time, in float32, and how it gets there: eight elements of dense
// operands, or one element of any.
struct EightElements {
  static constexpr int kCount = kWidth;
  const Common& common;
  const Entry& entry;
  Eight at;

  __device__ __forceinline__ void load(int operand, float* out) const {
    load8(entry.tensor.data[operand], entry.tensor.dtype[operand], at, out);
  }
  __device__ __forceinline__ void store(int operand, const float* in) const {
    store8(entry.tensor.data[operand], entry.tensor.dtype[operand], at, in);
  }
  __device__ __forceinline__ void random(int operand, uint32_t (&bits)[kCount]) const {
    PhiloxWords words = random8(common, entry, operand, at.first / 8);
    if (at.apart != kRun) {  // two halves of two calls
      const PhiloxWords others = random8(common, entry, operand, (at.first + at.apart) / 8);
      const bool upper = at.first % 8 != 0;
      words = {{upper ? words.word[2] : words.word[0], upper ? words.word[3] : words.word[1],
                upper ? others.word[2] : others.word[0], upper ? others.word[3] : others.word[1]}};
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) bits[i] = words.word[i / 2] >> 16 * (i % 2) & 0xffffu;
  }
};

struct OneElement {
  static constexpr int kCount = 1;
  const Common& common;
  const Entry& entry;
  const AdamLayout* layout;  // null: dense
  int64_t n;

  __device__ __forceinline__ int64_t offset(int operand) const {
    return layout ? offset_of(*layout, operand, n) : n;
  }
  __device__ __forceinline__ void load(int operand, float* out) const {
    *out = load1(entry.tensor.data[operand], entry.tensor.dtype[operand], offset(operand));
  }
  __device__ __forceinline__ void store(int operand, const float* in) const {
    store1(entry.tensor.data[operand], entry.tensor.dtype[operand], offset(operand), *in);
  }
  __device__ __forceinline__ void random(int operand, uint32_t (&bits)[kCount]) const {
    const PhiloxWords words = random8(common, entry, operand, n / 8);
    const uint32_t low = n & 4 ? words.word[2] : words.word[0];
    const uint32_t high = n & 4 ? words.word[3] : words.word[1];
    bits[0] = (n & 2 ? high : low) >> 16 * (n & 1) & 0xffffu;
  }
};

template <class Elements>
__device__ __forceinline__ void round_stochastically(const Elements& elements, int operand,
                                                     float* values) {
  const DType dtype = elements.entry.tensor.dtype[operand];
  if (!elements.common.stochastic_rounding || dtype == DType::kFloat32) return;
  uint32_t bits[Elements::kCount];
  elements.random(operand, bits);
#pragma unroll
  for (int i = 0; i < Elements::kCount; ++i) {
    values[i] = dtype == DType::kBFloat16 ? round_to_bfloat16(values[i], bits[i])
                                          : round_to_float16(values[i], bits[i]);
  }
}

template <bool kAmsgrad, class Elements>
__device__ __forceinline__ void update(const AdamScalars& s, const Elements& elements) {
  constexpr int kCount = Elements::kCount;
  const Common& common = elements.common;
  const Entry& entry = elements.entry;
  const AdamTensor& tensor = entry.tensor;
  const bool master = tensor.data[kMaster] != nullptr;
  const float2 rates = common.coefficients
                           ? common.coefficients[entry.index]
                           : make_float2(tensor.step_size, tensor.inv_sqrt_correction2);
  float param[kCount], grad[kCount], exp_avg[kCount], exp_avg_sq[kCount], max_sq[kCount];
  elements.load(master ? kMaster : kParam, param);
  elements.load(kGrad, grad);
  elements.load(kExpAvg, exp_avg);
  elements.load(kExpAvgSq, exp_avg_sq);
  if constexpr (kAmsgrad) elements.load(kMaxExpAvgSq, max_sq);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
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
  if (common.store_grad) elements.store(kGrad, grad);
  if constexpr (kAmsgrad) elements.store(kMaxExpAvgSq, max_sq);
  if (master) {
    elements.store(kMaster, param);
  } else {
    round_stochastically(elements, kParam, param);
  }
  elements.store(kParam, param);
  round_stochastically(elements, kExpAvg, exp_avg);
  elements.store(kExpAvg, exp_avg);
  round_stochastically(elements, kExpAvgSq, exp_avg_sq);
  elements.store(kExpAvgSq, exp_avg_sq);
}

// The warp's kWarpElements elements from `first` on, one by one: neighbours to neighbours.
template <bool kAmsgrad>
__device__ __forceinline__ void update_singly(const Common& common, const AdamScalars& s,
                                              const Entry& entry, const AdamLayout* layout,
                                              int64_t first, int lane) {
#pragma unroll 1
  for (int64_t n = first + lane; n < min(first + kWarpElements, entry.tensor.numel); n += 32) {
    update<kAmsgrad>(s, OneElement{common, entry, layout, n});
  }
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
  const AdamScalars s = read_scalars(batch.common);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t n = (blockIdx.x - entry.first_chunk) * kChunk + warp * kWarpElements;
  for (int turn = 0; turn < kTurns && n < entry.tensor.numel; ++turn, n += kThreads * kWidth) {
    if (entry.aligned && n + kWarpElements <= entry.tensor.numel) {
      const Eight at(n, lane, entry.wide);
      update<kAmsgrad>(s, EightElements{batch.common, entry, at});
    } else {
      update_singly<kAmsgrad>(batch.common, s, entry, nullptr, n, lane);
    }
  }
}

template <bool kAmsgrad>
__global__ void __launch_bounds__(kThreads)
    adam_strided_kernel(const __grid_constant__ Strided strided) {
  if (strided.common.found_inf && *strided.common.found_inf > 0.0f) return;
  const AdamScalars s = read_scalars(strided.common);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = blockIdx.x * (kThreads * int64_t{kWidth}) + warp * kWarpElements;
  update_singly<kAmsgrad>(strided.common, s, strided.entry, &strided.layout, n, lane);
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

Entry entry_of(const AdamTensor& tensor, int64_t index, int64_t first_chunk) {
  Entry entry{tensor, static_cast<int32_t>(index), static_cast<int32_t>(first_chunk), true, false};
  for (int operand = 0; operand < kAdamOperands; ++operand) {
    const auto address = reinterpret_cast<uintptr_t>(tensor.data[operand]);
    if (address % 16 != 0) entry.aligned = false;
    if (address != 0 && tensor.dtype[operand] == DType::kFloat32) entry.wide = true;
  }
  return entry;
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
    const Entry entry = entry_of(tensor, i, blocks);
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
