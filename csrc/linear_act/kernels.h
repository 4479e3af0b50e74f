// The linear + activation kernels, per backend.
#pragma once

#include "common/isa.h"
#include "linear_act/params.h"

FL_DECLARE_CPU_KERNEL(void, linear_act_gemm, const ::fl::LinearActGemm&)
FL_DECLARE_CPU_KERNEL(void, activation_backward, const ::fl::ActivationBackward&)
