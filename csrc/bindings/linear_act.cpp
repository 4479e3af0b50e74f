// linear_act and gated_linear_act on the CPU.
#include "bindings/linear_act_op.h"
#include "linear_act/kernels.h"

namespace fl {
namespace {

struct Cpu {
  static constexpr bool kAnyLayout = true, kRecomputes = false;
  Cpu(const Tensor&, bool) {}
  void gemm(const LinearActGemm& g) const { FL_CALL_CPU_KERNEL(linear_act_gemm, g); }
  void backward(const ActivationBackward& p) const { FL_CALL_CPU_KERNEL(activation_backward, p); }
  void admit(const Tensor&, const char*) const {}
  Tensor output(Tensor tensor) const { return tensor; }
};

}  // namespace
}  // namespace fl

STABLE_TORCH_LIBRARY_IMPL(fastlayers, CPU, m) {
  m.impl("linear_act_forward", TORCH_BOX(&fl::forward<fl::Cpu>));
  m.impl("linear_act_backward", TORCH_BOX(&fl::backward<fl::Cpu>));
  m.impl("gated_linear_act_forward", TORCH_BOX(&fl::gated_forward<fl::Cpu>));
  m.impl("gated_linear_act_backward", TORCH_BOX(&fl::gated_backward<fl::Cpu>));
}
