// Host-side preparation that every backend shares: common layouts and bias corrections.
#pragma once

#include "adam/params.h"

namespace fl {

// The shape and strides (in elements) of a tensor; strides[o] is null where operand o is absent.
struct AdamShape {
  int64_t dims;
  const int64_t* sizes;
  const int64_t* strides[kAdamOperands];
  bool updates;  // all operands but the gradient are written
};

// Fills `layout`, ordered by the parameter's memory and with adjacent dimensions merged. False
// where none is needed: every operand is dense in that same order. Throws where an operand other
// than the gradient has elements that share memory, or more than kAdamMaxDims dimensions remain.
bool plan_layout(const AdamShape& shape, AdamLayout* layout);

// The options of a step, as far as the host knows them.
AdamScalars adam_scalars(double lr, double beta1, double beta2, double weight_decay, double eps,
                         bool decoupled_weight_decay, bool maximize);

// Bias corrections of step t, remembering the last one: parameters mostly move in step.
class BiasCorrection {
 public:
  BiasCorrection(double lr, double beta1, double beta2) : lr_(lr), beta1_(beta1), beta2_(beta2) {}
  void apply(float step, AdamTensor* tensor);

 private:
  double lr_, beta1_, beta2_;
  float step_ = -1, step_size_ = 0, inv_sqrt_correction2_ = 0;
};

}  // namespace fl
