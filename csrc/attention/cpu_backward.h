// The passes of the attention backward on CPU. Only for cpu_*.cpp.
#pragma once

#include "attention/params.h"

namespace fl::FL_ISA {

struct RowSums;

// normalizer = 1 / (sum_j exp(s - lse) + exp(sink - lse)): 1 but for the rounding of lse.
// delta = normalizer sum_j exp(s - lse) dp - dlse: do . o - dlse but for the rounding of o.
void attention_row_sums(const AttentionBackward& p, const RowSums& out);

// p.dmask: recomputes the score gradients and adds them up over the mask's broadcast dimensions.
void attention_mask_gradient(const AttentionBackward& p, const RowSums& sums);

}  // namespace fl::FL_ISA
