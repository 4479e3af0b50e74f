#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <vector>

#include "adam/kernels.h"
#include "adam/plan.h"
#include "bindings/tensor.h"

namespace fl {
namespace {

using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOperandNames[kAdamOperands] = {
    "params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "master_params"};

// The tensors of a step in the kernels' terms. Layouts are allotted up front: pointers to them
// stay.
struct Tables {
  std::vector<AdamTensor> tensors;
  std::vector<AdamLayout> layouts;
  std::vector<int64_t> starts;
};

void check_like_param(const Tensor& tensor, const Tensor& param, int operand, int64_t index) {
  const auto wanted = param.sizes(), got = tensor.sizes();
  bool same = wanted.size() == got.size();
  for (size_t d = 0; same && d < wanted.size(); ++d) same = wanted[d] == got[d];
  FL_CHECK(same, "adam_step: ", kOperandNames[operand], "[", index,
           "] and params have different shapes");
  FL_CHECK(
      tensor.get_device_index() == param.get_device_index() && tensor.is_cpu() == param.is_cpu(),
      "adam_step: ", kOperandNames[operand], "[", index, "] is not on the parameter's device");
}

// lists[o] holds operand o of every tensor, or is empty where the operand is not used.
Tables build_tables(const Tensors* const lists[kAdamOperands]) {
  const Tensors& shapes = lists[kParam] ? *lists[kParam] : *lists[kGrad];
  Tables tables;
  tables.tensors.resize(shapes.size());
  tables.layouts.resize(shapes.size());
  tables.starts.assign(shapes.size() + 1, 0);
  for (int o = 0; o < kAdamOperands; ++o) {
    FL_CHECK(!lists[o] || lists[o]->size() == shapes.size(), "adam_step: ", shapes.size(),
             " parameters, but ", lists[o] ? lists[o]->size() : 0, " ", kOperandNames[o]);
  }
  for (size_t i = 0; i < shapes.size(); ++i) {
    AdamTensor& entry = tables.tensors[i];
    AdamShape shape{shapes[i].dim(), shapes[i].sizes().data(), {}, lists[kParam] != nullptr};
    for (int o = 0; o < kAdamOperands; ++o) {
      if (!lists[o]) continue;
      const Tensor& tensor = (*lists[o])[i];
      check_like_param(tensor, shapes[i], o, i);
      entry.data[o] = tensor.data_ptr();
      entry.dtype[o] = dtype_of(tensor, kOperandNames[o]);
      shape.strides[o] = tensor.strides().data();
    }
    if (!lists[kParam]) shape.strides[kParam] = shape.strides[kGrad];
    entry.numel = shapes[i].numel();
    if (entry.numel != 0 && plan_layout(shape, &tables.layouts[i])) {
      entry.layout = &tables.layouts[i];
    }
    const int64_t padded = (entry.numel + kAdamAlign - 1) / kAdamAlign * kAdamAlign;
    tables.starts[i + 1] = tables.starts[i] + padded;
  }
  return tables;
}

// The value of a one-element tensor on CPU.
double value_of(const Tensor& tensor, const char* what) {
  using torch::headeronly::ScalarType;
  FL_CHECK(tensor.is_cpu() && tensor.numel() == 1, "adam_step: ", what,
           " has to be one number on the CPU");
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return *static_cast<const float*>(tensor.data_ptr());
    case ScalarType::Double:
      return *static_cast<const double*>(tensor.data_ptr());
    default:
      fail("adam_step: ", what, " has to be float32 or float64");
  }
}

float* step_pointer(const Tensor& step) {
  FL_CHECK(step.numel() == 1 && step.scalar_type() == torch::headeronly::ScalarType::Float,
           "adam_step: each of steps has to be one float32");
  return static_cast<float*>(step.data_ptr());
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

void adam_step_cpu(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                   Tensors max_exp_avg_sqs, Tensors master_params, Tensors steps,
                   OptionalTensor lr_tensor, OptionalTensor grad_scale, OptionalTensor found_inf,
                   OptionalTensor grad_norm, OptionalTensor rng, double lr, double beta1,
                   double beta2, double weight_decay, double eps, double max_grad_norm,
                   bool decoupled_weight_decay, bool maximize) {
  if (params.empty()) return;
  const Tensors* lists[kAdamOperands] = {&params,
                                         &grads,
                                         &exp_avgs,
                                         &exp_avg_sqs,
                                         max_exp_avg_sqs.empty() ? nullptr : &max_exp_avg_sqs,
                                         master_params.empty() ? nullptr : &master_params};
  Tables tables = build_tables(lists);
  FL_CHECK(steps.size() == params.size(), "adam_step: ", params.size(), " parameters, but ",
           steps.size(), " steps");
  if (found_inf && value_of(*found_inf, "found_inf") > 0) return;
  if (lr_tensor) lr = value_of(*lr_tensor, "lr");

  AdamStep step{};
  set_rng(rng, &step);
  step.scalars = scalars(lr, beta1, beta2, weight_decay, eps, decoupled_weight_decay, maximize);
  if (grad_scale) step.scalars.grad_scale = 1.0 / value_of(*grad_scale, "grad_scale");
  if (grad_norm) {
    const double norm = value_of(*grad_norm, "grad_norm");
    const double factor = max_grad_norm / (norm + 1e-6);
    if (!(factor > 1)) step.scalars.grad_factor *= static_cast<float>(factor);
  }
  step.store_grad = grad_scale.has_value();
  BiasCorrection correction(lr, beta1, beta2);
  for (size_t i = 0; i < steps.size(); ++i) {
    FL_CHECK(steps[i].is_cpu(), "adam_step: steps have to be on the CPU");
    step_pointer(steps[i]);
  }
  for (size_t i = 0; i < steps.size(); ++i) {
    correction.apply(*step_pointer(steps[i]) += 1, &tables.tensors[i]);
  }
  step.tensors = tables.tensors.data();
  step.starts = tables.starts.data();
  step.count = static_cast<int64_t>(tables.tensors.size());
  FL_CALL_CPU_KERNEL(adam_step, step);
}

Tensor grad_norm_cpu(Tensors grads, OptionalTensor grad_scale) {
  const Tensors* lists[kAdamOperands] = {};
  lists[kGrad] = &grads;
  const Tables tables = build_tables(lists);
  std::vector<double> partial_sums(tables.starts.back() / kAdamTask + 1, 0.0);
  const GradNorm norm{tables.tensors.data(), tables.starts.data(),
                      static_cast<int64_t>(tables.tensors.size()), partial_sums.data()};
  FL_CALL_CPU_KERNEL(grad_norm, norm);
  double sum = 0;
  for (double partial : partial_sums) sum += partial;
  double result = std::sqrt(sum);
  if (grad_scale) result /= value_of(*grad_scale, "grad_scale");
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
