#include "adam/kernels.h"
#include "adam/plan.h"
#include "bindings/adam_tables.h"
#include "bindings/cuda_device.h"
#include "bindings/namespace.h"

namespace fl {
namespace {

void check_built(bool built) {
  FL_CHECK(built, "fastlayers was built without CUDA kernels; rebuild it where nvcc is found");
}

// A number on the device, or null.
const float* number_on(const CudaDevice& device, const OptionalTensor& tensor, const char* what) {
  if (!tensor) return nullptr;
  FL_CHECK(
      device.holds(*tensor) && tensor->numel() == 1 && tensor->scalar_type() == ScalarType::Float,
      "adam_step: ", what, " has to be one float32 on the parameters' device");
  return static_cast<const float*>(tensor->data_ptr());
}

// The step counts: on the device as pointers for the kernel, or advanced here and now.
std::vector<float*> take_steps(const CudaDevice& device, const TensorList& steps,
                               const AdamStepCuda& call, AdamTables* tables) {
  FL_CHECK(steps.size() == tables->tensors.size(), "adam_step: ", tables->tensors.size(),
           " params, but ", steps.size(), " steps");
  std::vector<float*> pointers(steps.size());
  const bool on_device = device.holds(steps[0]);
  for (size_t i = 0; i < steps.size(); ++i) {
    const bool placed =
        on_device ? device.holds(steps[i]) : steps[i].device_type() == aoti_torch_device_type_cpu();
    FL_CHECK(
        placed && steps[i].numel() == 1 && steps[i].scalar_type() == aoti_torch_dtype_float32(),
        "adam_step: steps have to be one float32 each, all on the CPU or all on the device");
    pointers[i] = static_cast<float*>(steps[i].data());
  }
  if (on_device) return pointers;
  FL_CHECK(!call.found_inf && !call.lr,
           "adam_step: with found_inf or lr on the device, steps have to be there too");
  BiasCorrection correction(call.lr_value, call.beta1, call.beta2);
  for (size_t i = 0; i < steps.size(); ++i) {
    correction.apply(*pointers[i] += 1, &tables->tensors[i]);
  }
  return {};
}

void adam_step_cuda(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                    const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                    const TensorList& master_params, const TensorList& steps,
                    OptionalTensor lr_tensor, OptionalTensor grad_scale, OptionalTensor found_inf,
                    OptionalTensor grad_norm, OptionalTensor rng, double lr, double beta1,
                    double beta2, double weight_decay, double eps, double max_grad_norm,
                    bool decoupled_weight_decay, bool maximize) {
  check_built(cuda_adam_step != nullptr);
  if (params.empty()) return;
  AdamTables tables = build_adam_tables(
      {&params, &grads, &exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs, &master_params});
  const CudaDevice device(params[0].device_index());

  AdamStepCuda call;
  if (lr_tensor && device.holds(*lr_tensor)) call.lr = number_on(device, lr_tensor, "lr");
  if (lr_tensor && !call.lr) lr = value_on_cpu(*lr_tensor, "lr");
  call.grad_scale = number_on(device, grad_scale, "grad_scale");
  call.found_inf = number_on(device, found_inf, "found_inf");
  call.grad_norm = number_on(device, grad_norm, "grad_norm");
  call.max_grad_norm = static_cast<float>(max_grad_norm);
  call.lr_value = lr;
  call.beta1 = beta1;
  call.beta2 = beta2;
  call.decoupled_weight_decay = decoupled_weight_decay ? static_cast<float>(weight_decay) : 0.0f;

  const std::vector<float*> step_counts = take_steps(device, steps, call, &tables);
  Tensor coefficients =
      device.empty({2 * static_cast<int64_t>(step_counts.size())}, ScalarType::Float);
  if (!step_counts.empty()) {
    call.step_counts = step_counts.data();
    call.coefficients = static_cast<float*>(coefficients.data_ptr());
  }
  call.step.tensors = tables.tensors.data();
  call.step.starts = tables.starts.data();
  call.step.count = tables.count();
  call.step.scalars =
      adam_scalars(lr, beta1, beta2, weight_decay, eps, decoupled_weight_decay, maximize);
  call.step.store_grad = grad_scale.has_value();
  set_rounding_rng(rng, &call.step);
  cuda_adam_step(call, device.stream());
}

Tensor grad_norm_cuda(const TensorList& grads, OptionalTensor grad_scale) {
  check_built(cuda_grad_norm != nullptr);
  const AdamTables tables = build_adam_tables({nullptr, &grads});
  const CudaDevice device(grads[0].device_index());
  const int64_t partials = tables.count() + tables.tasks();
  Tensor partial_sums = device.empty({partials}, ScalarType::Double);
  Tensor out = device.empty({}, ScalarType::Float);
  const GradNorm norm{tables.tensors.data(), tables.starts.data(), tables.count(),
                      static_cast<double*>(partial_sums.data_ptr())};
  cuda_grad_norm(norm, number_on(device, grad_scale, "grad_scale"),
                 static_cast<float*>(out.data_ptr()), device.stream());
  return out;
}

}  // namespace
}  // namespace fl

STABLE_TORCH_LIBRARY_IMPL(FL_NAMESPACE, FL_CUDA_KEY, m) {
  m.impl("adam_step", TORCH_BOX(&fl::adam_step_cuda));
  m.impl("grad_norm", TORCH_BOX(&fl::grad_norm_cuda));
}
