#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <vector>

#include "adam/kernels.h"
#include "adam/plan.h"
#include "bindings/adam_tables.h"

namespace fl {
namespace {

using OptionalTensor = std::optional<Tensor>;

// All steps are checked before the first one moves.
std::vector<float*> step_pointers(const TensorList& steps, size_t count) {
  FL_CHECK(steps.size() == count, "adam_step: ", count, " params, but ", steps.size(), " steps");
  std::vector<float*> pointers(count);
  for (size_t i = 0; i < count; ++i) {
    FL_CHECK(steps[i].numel() == 1 && steps[i].scalar_type() == aoti_torch_dtype_float32() &&
                 steps[i].device_type() == aoti_torch_device_type_cpu(),
             "adam_step: steps[", i, "] has to be one float32 on the CPU");
    pointers[i] = static_cast<float*>(steps[i].data());
  }
  return pointers;
}

void set_rng(const OptionalTensor& rng, AdamStep* step) {
  step->stochastic_rounding = rng.has_value();
  if (!rng) return;
  FL_CHECK(rng->is_cpu() && rng->numel() == 2 && rng->is_contiguous() &&
               rng->scalar_type() == torch::headeronly::ScalarType::Long,
           "adam_step: rng has to be two int64, seed and offset, on the CPU");
  const int64_t* words = static_cast<const int64_t*>(rng->data_ptr());
  step->seed = static_cast<uint64_t>(words[0]);
  step->offset = static_cast<uint32_t>(words[1]);
}

AdamScalars scalars(double lr, double beta1, double beta2, double weight_decay, double eps,
                    bool decoupled_weight_decay, bool maximize) {
  AdamScalars s;
  s.one_minus_beta1 = static_cast<float>(1 - beta1);
  s.beta2 = static_cast<float>(beta2);
  s.one_minus_beta2 = static_cast<float>(1 - beta2);
  s.eps = static_cast<float>(eps);
  s.l2 = decoupled_weight_decay ? 0.0f : static_cast<float>(weight_decay);
  s.decay = decoupled_weight_decay ? static_cast<float>(1 - lr * weight_decay) : 1.0f;
  s.grad_scale = 1.0f;
  s.grad_factor = maximize ? -1.0f : 1.0f;
  return s;
}

void adam_step_cpu(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                   const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                   const TensorList& master_params, const TensorList& steps,
                   OptionalTensor lr_tensor, OptionalTensor grad_scale, OptionalTensor found_inf,
                   OptionalTensor grad_norm, OptionalTensor rng, double lr, double beta1,
                   double beta2, double weight_decay, double eps, double max_grad_norm,
                   bool decoupled_weight_decay, bool maximize) {
  if (params.empty()) return;
  const TensorList* lists[kAdamOperands] = {&params,
                                            &grads,
                                            &exp_avgs,
                                            &exp_avg_sqs,
                                            max_exp_avg_sqs.empty() ? nullptr : &max_exp_avg_sqs,
                                            master_params.empty() ? nullptr : &master_params};
  AdamTables tables = build_adam_tables(lists);
  const std::vector<float*> step_at = step_pointers(steps, params.size());
  if (found_inf && value_on_cpu(*found_inf, "found_inf") > 0) return;
  if (lr_tensor) lr = value_on_cpu(*lr_tensor, "lr");

  AdamStep step{};
  set_rng(rng, &step);
  step.scalars = scalars(lr, beta1, beta2, weight_decay, eps, decoupled_weight_decay, maximize);
  if (grad_scale) step.scalars.grad_scale = 1.0 / value_on_cpu(*grad_scale, "grad_scale");
  if (grad_norm) {
    const double norm = value_on_cpu(*grad_norm, "grad_norm");
    const double factor = max_grad_norm / (norm + 1e-6);
    if (!(factor > 1)) step.scalars.grad_factor *= static_cast<float>(factor);
  }
  step.store_grad = grad_scale.has_value();
  BiasCorrection correction(lr, beta1, beta2);
  for (size_t i = 0; i < step_at.size(); ++i) {
    correction.apply(*step_at[i] += 1, &tables.tensors[i]);
  }
  step.tensors = tables.tensors.data();
  step.starts = tables.starts.data();
  step.count = tables.count();
  FL_CALL_CPU_KERNEL(adam_step, step);
}

Tensor grad_norm_cpu(const TensorList& grads, OptionalTensor grad_scale) {
  const TensorList* lists[kAdamOperands] = {};
  lists[kGrad] = &grads;
  const AdamTables tables = build_adam_tables(lists);
  std::vector<double> partial_sums(tables.tasks(), 0.0);
  const GradNorm norm{tables.tensors.data(), tables.starts.data(), tables.count(),
                      partial_sums.data()};
  FL_CALL_CPU_KERNEL(grad_norm, norm);
  double sum = 0;
  for (double partial : partial_sums) sum += partial;
  double result = std::sqrt(sum);
  if (grad_scale) result /= value_on_cpu(*grad_scale, "grad_scale");
  Tensor out = torch::stable::empty({}, torch::headeronly::ScalarType::Float);
  *static_cast<float*>(out.data_ptr()) = static_cast<float>(result);
  return out;
}

}  // namespace
}  // namespace fl

STABLE_TORCH_LIBRARY_IMPL(fastlayers, CPU, m) {
  m.impl("adam_step", TORCH_BOX(&fl::adam_step_cpu));
  m.impl("grad_norm", TORCH_BOX(&fl::grad_norm_cpu));
}
