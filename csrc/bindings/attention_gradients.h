// What the attention_backward operators of every device share: their arguments, checked and laid
// out, and the gradients that they return.
#pragma once

#include <tuple>

#include "bindings/attention_inputs.h"

namespace fl {

struct AttentionGradients {
  AttentionInputs in;  // prepared by prepare_gradients
  Tensor grad_out;
  OptionalTensor grad_lse;
  Tensor out, lse;
  bool mask_gradient, sinks_gradient;
  Tensor dquery = {}, dkey = {}, dvalue = {};  // not initialised
  Tensor dmask = {}, dsinks = {};              // zero, float32; empty where not wanted

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> results() const {
    return {dquery, dkey, dvalue, dmask, dsinks};
  }
};

// Throws for what no kernel could read safely, copies what is not laid out as kernels read it, and
// allocates the gradients.
void prepare_gradients(AttentionGradients& call);

// Of a prepared call.
AttentionBackward parameters(const AttentionGradients& call);

}  // namespace fl
