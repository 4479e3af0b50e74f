// The tensors of an Adam step in the kernels' terms.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "adam/params.h"
#include "bindings/tensor_list.h"

namespace fl {

struct AdamTables {
  std::vector<AdamTensor> tensors;
  std::vector<AdamLayout> layouts;  // allotted up front: tensors point into it
  std::vector<int64_t> starts;

  int64_t count() const { return static_cast<int64_t>(tensors.size()); }
  int64_t tasks() const { return (starts.back() + kAdamTask - 1) / kAdamTask; }
};

// lists[o] holds operand o of every tensor, or is null or empty where the operand is not used;
// either the parameters or the gradients are there. Throws where shapes, dtypes or devices do not
// fit.
AdamTables build_adam_tables(const std::array<const TensorList*, kAdamOperands>& lists);

// The value of a one-element tensor on CPU; `what` names it in the error.
double value_on_cpu(const Tensor& tensor, const char* what);

using OptionalTensor = std::optional<Tensor>;

// Seed and offset of stochastic rounding, on the CPU; none: round to nearest.
void set_rounding_rng(const OptionalTensor& rng, AdamStep* step);

}  // namespace fl
