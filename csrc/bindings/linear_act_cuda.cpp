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
  void forward(const ActivationForward& p) const { cuda_activation_forward(p, device_.stream()); }
  void admit(const Tensor& tensor, const char* what) const { device_.admit(tensor, what); }
  Tensor output(Tensor tensor) const { return device_.output(tensor); }

 private:
  Tensor floats(int64_t count) const { return device_.empty({count}, ScalarType::Float); }

  CudaDevice device_;
  bool allow_tf32_;
};

// The activation of products that somebody else computed, biases included: (rows..., out_features)
// each, product_up for the gated form. The biases are here for their gradients.
Tensor linear_act_epilogue(Tensor product, OptionalTensor product_up, OptionalTensor bias,
                           OptionalTensor bias_up, std::string activation) {
  const Cuda device(product, false);
  const OptionalTensor products[2] = {product, product_up}, *biases[2] = {&bias, &bias_up};
  Tensor out = empty(device, product, sizes_with_last(product, product.size(product.dim() - 1)));
  ActivationForward p;
  p.dtype = dtype_of(product, "linear_act_epilogue: product");
  p.activation = activation_from_name(activation);
  p.gated = product_up.has_value();
  p.out = out.mutable_data_ptr();
  std::optional<Matrix> matrices[2];
  for (int i = 0; i < (p.gated ? 2 : 1); ++i) {
    check_same_kind(*products[i], product, "linear_act_epilogue: product_up");
    const Matrix& matrix = matrices[i].emplace(device, *products[i], true);
    FL_CHECK(matrix.rows() == matrices[0]->rows() && matrix.cols() == matrices[0]->cols(),
             "linear_act_epilogue: product_up has to be of the shape of product");
    p.z[i] = matrix.data();
    p.z_stride[i] = matrix.stride();
    OptionalTensor kept;
    bias_data(device, *biases[i], product, matrix.cols(), kept);  // which checks it
  }
  p.rows = matrices[0]->rows();
  p.cols = matrices[0]->cols();
  device.forward(p);
  return out;
}

// Its gradient, from the pre-activations that were saved.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_act_epilogue_backward(
    Tensor grad, OptionalTensor preactivation, OptionalTensor preactivation_up,
    std::string activation, bool needs_product, bool needs_product_up, bool needs_bias,
    bool needs_bias_up) {
  const Cuda device(grad, false);
  const Matrix dout(device, grad, true);
  const OptionalTensor* saved[2] = {&preactivation, &preactivation_up};
  const bool needs[2] = {needs_product, needs_product_up},
             needs_sums[2] = {needs_bias, needs_bias_up};
  Tensor dz[2] = {nothing(grad), nothing(grad)}, dbias[2] = {nothing(grad), nothing(grad)};
  ActivationBackward p;
  p.dtype = dtype_of(grad, "linear_act_epilogue: grad");
  p.activation = activation_from_name(activation);
  p.gated = preactivation_up.has_value();
  p.rows = dout.rows();
  p.cols = dout.cols();
  p.dout = dout.data();
  p.dout_stride = dout.stride();
  FL_CHECK(preactivation || (p.activation == Activation::kIdentity && !p.gated),
           "linear_act_epilogue: its gradient needs the pre-activation");
  FL_CHECK(p.gated || !(needs_product_up || needs_bias_up),
           "linear_act_epilogue: the gradient of product_up needs both pre-activations");
  for (int i = 0; i < 2; ++i) {
    if (*saved[i]) {
      check_preactivation(**saved[i], grad);
      device.admit(**saved[i], "linear_act_epilogue: preactivation");
      p.z[i] = (*saved[i])->const_data_ptr();
    }
    if (needs[i]) {
      dz[i] = empty(device, grad, sizes_with_last(grad, p.cols));
      p.dz[i] = dz[i].mutable_data_ptr();
    }
    if (needs_sums[i]) {
      dbias[i] = empty(device, grad, {p.cols});
      p.dbias[i] = dbias[i].mutable_data_ptr();
    }
  }
  device.backward(p);
  return {dz[0], dz[1], dbias[0], dbias[1]};
}

}  // namespace
}  // namespace fl

STABLE_TORCH_LIBRARY_IMPL(FL_NAMESPACE, FL_CUDA_KEY, m) {
  m.impl("linear_act_forward", TORCH_BOX(&fl::forward<fl::Cuda>));
  m.impl("linear_act_backward", TORCH_BOX(&fl::backward<fl::Cuda>));
  m.impl("gated_linear_act_forward", TORCH_BOX(&fl::gated_forward<fl::Cuda>));
  m.impl("gated_linear_act_backward", TORCH_BOX(&fl::gated_backward<fl::Cuda>));
  m.impl("linear_act_epilogue", TORCH_BOX(&fl::linear_act_epilogue));
  m.impl("linear_act_epilogue_backward", TORCH_BOX(&fl::linear_act_epilogue_backward));
}
