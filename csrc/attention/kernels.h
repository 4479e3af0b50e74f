// The attention kernels, per backend.
#pragma once

#include "attention/params.h"
#include "common/isa.h"

FL_DECLARE_CPU_KERNEL(void, attention_forward, const ::fl::AttentionForward&)
FL_DECLARE_CPU_KERNEL(void, attention_backward, const ::fl::AttentionBackward&)
