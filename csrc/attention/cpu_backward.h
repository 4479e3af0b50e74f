// The passes of the attention backward on CPU. Only for cpu_*.cpp.
#pragma once

#include "attention/params.h"

namespace fl::FL_ISA {

// deltas[b, h, i] = sum_j p[i,j] dp[i,j] - dlse[i]: what do . o - dlse is but for the rounding of
// o.
void attention_deltas(const AttentionBackward& p, float* deltas);

// p.dmask: recomputes the score gradients and adds them up over the mask's broadcast dimensions.
void attention_mask_gradient(const AttentionBackward& p, const float* deltas);

}  // namespace fl::FL_ISA
