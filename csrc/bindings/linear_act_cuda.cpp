// linear_act and gated_linear_act on CUDA.
#include "bindings/cuda_device.h"
#include "bindings/linear_act_op.h"
#include "bindings/namespace.h"
#include "linear_act/kernels.h"

namespace fl {
namespace {

class Cuda {
 public:
  static constexpr bool kAnyLayout = false, kRecomputes = true;

  Cuda(const Tensor& tensor, bool allow_tf32)
      : device_(tensor.get_device_index()), allow_tf32_(allow_tf32) {
    FL_CHECK(cuda_linear_act_gemm != nullptr,
             "fastlayers was built without CUDA kernels; rebuild it where nvcc is found");
  }

  void gemm(LinearActGemm g) const {
    g.allow_tf32 = allow_tf32_;
    const Tensor workspace = floats(cuda_linear_act_gemm_workspace(g));
    cuda_linear_act_gemm(g, static_cast<float*>(workspace.data_ptr()), device_.stream());
  }
  void backward(const ActivationBackward& p) const {
    const Tensor workspace = floats(cuda_activation_backward_workspace(p));
    cuda_activation_backward(p, static_cast<float*>(workspace.data_ptr()), device_.stream());
  }
  void admit(const Tensor& tensor, const char* what) const { device_.admit(tensor, what); }
  Tensor output(Tensor tensor) const { return device_.output(tensor); }

 private:
  Tensor floats(int64_t count) const { return device_.empty({count}, ScalarType::Float); }

  CudaDevice device_;
  bool allow_tf32_;
};

}  // namespace
}  // namespace fl

STABLE_TORCH_LIBRARY_IMPL(FL_NAMESPACE, FL_CUDA_KEY, m) {
  m.impl("linear_act_forward", TORCH_BOX(&fl::forward<fl::Cuda>));
  m.impl("linear_act_backward", TORCH_BOX(&fl::backward<fl::Cuda>));
  m.impl("gated_linear_act_forward", TORCH_BOX(&fl::gated_forward<fl::Cuda>));
  m.impl("gated_linear_act_backward", TORCH_BOX(&fl::gated_backward<fl::Cuda>));
}
