#include "adam/plan.h"

#include <cmath>

#include "common/check.h"

namespace fl {
namespace {

bool can_merge(const AdamLayout& layout, const AdamShape& shape, int outer, int inner) {
  for (int o = 0; o < kAdamOperands; ++o) {
    if (shape.strides[o] == nullptr) continue;
    if (layout.strides[o][outer] != layout.strides[o][inner] * layout.sizes[inner]) return false;
  }
  return true;
}

bool is_dense(const AdamLayout& layout, int operand) {
  int64_t expected = 1;
  for (int d = layout.dims - 1; d >= 0; --d) {
    if (layout.strides[operand][d] != expected) return false;
    expected *= layout.sizes[d];
  }
  return true;
}

// Inserts dimension `d` before the first one of smaller parameter stride.
void insert(const AdamShape& shape, int64_t d, AdamLayout* layout) {
  FL_CHECK(layout->dims < kAdamMaxDims, "adam_step: a parameter has more than ", kAdamMaxDims,
           " dimensions that are longer than 1");
  int place = layout->dims++;
  for (; place > 0 && layout->strides[kParam][place - 1] < shape.strides[kParam][d]; --place) {
    layout->sizes[place] = layout->sizes[place - 1];
    for (auto& strides : layout->strides) strides[place] = strides[place - 1];
  }
  layout->sizes[place] = shape.sizes[d];
  for (int o = 0; o < kAdamOperands; ++o) {
    if (shape.strides[o] == nullptr) continue;
    layout->strides[o][place] = shape.strides[o][d];
    FL_CHECK(!shape.updates || o == kGrad || shape.strides[o][d] != 0,
             "adam_step: a tensor to be updated has elements that share memory (an expanded view)");
  }
}

}  // namespace

bool plan_layout(const AdamShape& shape, AdamLayout* layout) {
  *layout = AdamLayout{};
  for (int64_t d = 0; d < shape.dims; ++d) {
    if (shape.sizes[d] != 1) insert(shape, d, layout);
  }
  int kept = 0;  // merge what is adjacent into dimension `kept`
  for (int d = 1; d < layout->dims; ++d) {
    const bool merge = can_merge(*layout, shape, kept, d);
    if (!merge) ++kept;
    layout->sizes[kept] = merge ? layout->sizes[kept] * layout->sizes[d] : layout->sizes[d];
    for (auto& strides : layout->strides) strides[kept] = strides[d];
  }
  if (layout->dims > 0) layout->dims = kept + 1;
  bool all_dense = true;
  for (int o = 0; o < kAdamOperands; ++o) {
    layout->dense[o] = shape.strides[o] == nullptr || is_dense(*layout, o);
    all_dense = all_dense && layout->dense[o];
  }
  return !all_dense;
}

AdamScalars adam_scalars(double lr, double beta1, double beta2, double weight_decay, double eps,
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

void BiasCorrection::apply(float step, AdamTensor* tensor) {
  if (step != step_) {
    step_ = step;
    step_size_ = static_cast<float>(lr_ / (1 - std::pow(beta1_, step)));
    inv_sqrt_correction2_ = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2_, step)));
  }
  tensor->step_size = step_size_;
  tensor->inv_sqrt_correction2 = inv_sqrt_correction2_;
}

}  // namespace fl
