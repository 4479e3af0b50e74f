#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <vector>

#include "adam/kernels.h"
#include "adam/plan.h"
#include "bindings/adam_tables.h"

namespace fl {
namespace {

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

void adam_step_cpu(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                   const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                   const TensorList& master_params, const TensorList& steps,
                   OptionalTensor lr_tensor, OptionalTensor grad_scale, OptionalTensor found_inf,
                   OptionalTensor grad_norm, OptionalTensor rng, double lr, double beta1,
                   double beta2, double weight_decay, double eps, double max_grad_norm,
                   bool decoupled_weight_decay, bool maximize) {
  if (params.empty()) return;
  AdamTables tables = build_adam_tables(
      {&params, &grads, &exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs, &master_params});
  const std::vector<float*> step_at = step_pointers(steps, params.size());
  if (found_inf && value_on_cpu(*found_inf, "found_inf") > 0) return;
  if (lr_tensor) lr = value_on_cpu(*lr_tensor, "lr");

  AdamStep step{};
  set_rounding_rng(rng, &step);
  step.scalars =
      adam_scalars(lr, beta1, beta2, weight_decay, eps, decoupled_weight_decay, maximize);
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
  const AdamTables tables = build_adam_tables({nullptr, &grads});
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
