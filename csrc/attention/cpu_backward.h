// The passes of the attention backward on CPU. Only for cpu_*.cpp.
#pragma once

#include "attention/params.h"

namespace fl::FL_ISA {

// p.dmask: recomputes the score gradients and adds them up over the mask's broadcast dimensions.
void attention_mask_gradient(const AttentionBackward& p);

}  // namespace fl::FL_ISA
