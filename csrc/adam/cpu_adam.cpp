// Adam on CPU: all tensors of a step in one parallel region, in blocks that stay in the L1 cache.
// A dense float32 operand is updated where it lies; any other passes through a float32 block.
#include "adam/adam_math.h"
#include "adam/cpu_operand.h"
#include "adam/cpu_stochastic_rounding.h"
#include "adam/kernels.h"
#include "common/parallel.h"

namespace fl::FL_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // elements; six operands of float32 are 24 KiB

struct FullLanes {
  FL_INLINE Vec read(const float* p) const { return load(p); }
  FL_INLINE void write(float* p, Vec x) const { store(p, x); }
};

struct FirstLanes {
  Mask mask;
  FL_INLINE Vec read(const float* p) const { return load(p, mask); }
  FL_INLINE void write(float* p, Vec x) const { store(p, x, mask); }
};

// `at` holds float32 blocks, the master in the parameter's place where there is one.
template <bool kAmsgrad, class Lanes>
FL_INLINE void update_lanes(const AdamStep& step, const AdamTensor& tensor, float* const* at,
                            int64_t i, Lanes lanes) {
  AdamLanes<Vec> x;
  x.param = lanes.read(at[kParam] + i);
  x.grad = lanes.read(at[kGrad] + i) * Vec(step.scalars.grad_scale);
  x.exp_avg = lanes.read(at[kExpAvg] + i);
  x.exp_avg_sq = lanes.read(at[kExpAvgSq] + i);
  if constexpr (kAmsgrad) x.max_exp_avg_sq = lanes.read(at[kMaxExpAvgSq] + i);
  if (step.store_grad) lanes.write(at[kGrad] + i, x.grad);
  x.grad = x.grad * Vec(step.scalars.grad_factor);
  adam_update<kAmsgrad>(step.scalars, tensor.step_size, tensor.inv_sqrt_correction2, x);
  lanes.write(at[kParam] + i, x.param);
  lanes.write(at[kExpAvg] + i, x.exp_avg);
  lanes.write(at[kExpAvgSq] + i, x.exp_avg_sq);
  if constexpr (kAmsgrad) lanes.write(at[kMaxExpAvgSq] + i, x.max_exp_avg_sq);
}

template <bool kAmsgrad>
void update_block(const AdamStep& shared_step, const AdamTensor& shared_tensor, float* const* at,
                  int64_t count) {
  const AdamStep step = shared_step;  // copies, so that no store below can seem to change them
  const AdamTensor tensor = shared_tensor;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) update_lanes<kAmsgrad>(step, tensor, at, i, FullLanes{});
  if (i == count) return;
  update_lanes<kAmsgrad>(step, tensor, at, i, FirstLanes{first_lanes(static_cast<int>(count - i))});
}

void write_back(const AdamStep& step, int64_t index, int64_t begin, int64_t count,
                float* const* at) {
  const AdamTensor& tensor = step.tensors[index];
  const bool has_master = tensor.data[kMaster] != nullptr;
  const auto round = [&](int operand) {
    if (!step.stochastic_rounding || tensor.dtype[operand] == DType::kFloat32) return;
    const RoundingStream stream(step, index, operand);
    round_block(tensor.dtype[operand], stream, begin, count, at[operand]);
  };
  if (has_master) {
    write_block(tensor, kMaster, begin, count, at[kParam]);
  } else {
    round(kParam);
  }
  round(kExpAvg);
  round(kExpAvgSq);
  for (int operand : {kParam, kExpAvg, kExpAvgSq}) {
    write_block(tensor, operand, begin, count, at[operand]);
  }
  if (tensor.data[kMaxExpAvgSq]) write_block(tensor, kMaxExpAvgSq, begin, count, at[kMaxExpAvgSq]);
  if (step.store_grad) write_block(tensor, kGrad, begin, count, at[kGrad]);
}

void update_stretch(const AdamStep& step, int64_t index, int64_t begin, int64_t end) {
  alignas(64) float buffers[kAdamOperands][kBlock];
  const AdamTensor& tensor = step.tensors[index];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = end - i < kBlock ? end - i : kBlock;
    float* at[kAdamOperands];
    for (int operand = 0; operand < kMaster; ++operand) {
      const bool master = operand == kParam && tensor.data[kMaster] != nullptr;
      at[operand] = read_block(tensor, master ? kMaster : operand, i, count, buffers[operand]);
    }
    if (tensor.data[kMaxExpAvgSq]) {
      update_block<true>(step, tensor, at, count);
    } else {
      update_block<false>(step, tensor, at, count);
    }
    write_back(step, index, i, count, at);
  }
}

}  // namespace

void adam_step(const AdamStep& step) {
  auto task = [&](int64_t task, int) {
    for_each_stretch(step.tensors, step.starts, step.count, task,
                     [&](int64_t index, int64_t begin, int64_t end) {
                       update_stretch(step, index, begin, end);
                     });
  };
  parallel_tasks((step.starts[step.count] + kAdamTask - 1) / kAdamTask, task);
}

}  // namespace fl::FL_ISA
