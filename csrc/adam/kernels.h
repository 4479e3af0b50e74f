// The Adam kernels, per backend.
#pragma once

#include "adam/params.h"
#include "common/isa.h"

FL_DECLARE_CPU_KERNEL(void, adam_step, const ::fl::AdamStep&)
FL_DECLARE_CPU_KERNEL(void, grad_norm, const ::fl::GradNorm&)
