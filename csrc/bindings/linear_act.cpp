// linear_act and gated_linear_act: checks that memory safety needs, allocation, and which products
// make up a forward and a backward. What a device adds is its two kernels (see Cpu below).
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/tensor.h"
#include "linear_act/kernels.h"

namespace fl {
namespace {

struct Cpu {
  static void gemm(const LinearActGemm& g) { FL_CALL_CPU_KERNEL(linear_act_gemm, g); }
  static void backward(const ActivationBackward& p) { FL_CALL_CPU_KERNEL(activation_backward, p); }
};

using OptionalTensor = std::optional<Tensor>;

// A tensor seen as (rows, cols): leading dimensions taken together. One of the two dimensions is
// dense; a tensor for which that does not hold is copied.
class Matrix {
 public:
  explicit Matrix(const Tensor& tensor) : tensor_(tensor) {
    FL_CHECK(tensor.dim() >= 1, "linear_act: a tensor has no dimension");
    if (!view()) {
      tensor_ = torch::stable::contiguous(tensor);
      FL_CHECK(view(), "linear_act: a contiguous tensor has to be a matrix");
    }
  }

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t stride() const { return stride_; }
  bool cols_dense() const { return cols_dense_; }
  const void* data() const { return tensor_.const_data_ptr(); }

  // As a factor whose products sum over the columns, or over the rows.
  GemmFactor over_cols() const { return {data(), stride_, cols_dense_}; }
  GemmFactor over_rows() const { return {data(), stride_, !cols_dense_}; }

 private:
  bool view() {
    const int64_t last = tensor_.dim() - 1;
    cols_ = tensor_.size(last);
    rows_ = 1;
    int64_t row_stride = cols_;
    for (int64_t d = last - 1; d >= 0; --d) {
      if (tensor_.size(d) == 1) continue;
      if (rows_ != 1 && tensor_.stride(d) != row_stride * rows_) return tensor_.numel() == 0;
      if (rows_ == 1) row_stride = tensor_.stride(d);
      rows_ *= tensor_.size(d);
    }
    cols_dense_ = tensor_.stride(last) == 1 || cols_ <= 1;
    stride_ = cols_dense_ ? row_stride : tensor_.stride(last);
    return cols_dense_ || row_stride == 1 || rows_ == 1;
  }

  Tensor tensor_;
  int64_t rows_, cols_, stride_;
  bool cols_dense_;
};

std::vector<int64_t> sizes_with_last(const Tensor& tensor, int64_t last) {
  FL_CHECK(tensor.dim() >= 1, "linear_act: input and grad have to have at least one dimension");
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes.back() = last;
  return sizes;
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes);
}

// Stands for an output that was not asked for.
Tensor nothing(const Tensor& like) { return empty(like, {0}); }

void check_same_kind(const Tensor& tensor, const Tensor& reference, const char* what) {
  FL_CHECK(tensor.scalar_type() == reference.scalar_type(), what, " differs in dtype");
  FL_CHECK(tensor.get_device_index() == reference.get_device_index() &&
               tensor.is_cpu() == reference.is_cpu(),
           what, " is on another device");
}

void check_weight(const Tensor& weight, const Tensor& reference, int64_t out_features,
                  int64_t in_features) {
  check_same_kind(weight, reference, "linear_act: weight");
  FL_CHECK(weight.dim() == 2 && weight.size(0) == out_features && weight.size(1) == in_features,
           "linear_act: weight has to be (", out_features, ", ", in_features, ")");
}

// A bias, dense, as the kernels take it; `keep` owns the copy where one is needed.
const void* bias_data(const OptionalTensor& bias, const Tensor& reference, int64_t out_features,
                      OptionalTensor& keep) {
  if (!bias) return nullptr;
  check_same_kind(*bias, reference, "linear_act: bias");
  FL_CHECK(bias->dim() == 1 && bias->size(0) == out_features, "linear_act: bias has to be (",
           out_features, ",)");
  keep = torch::stable::contiguous(*bias);
  return keep->const_data_ptr();
}

// activation(x w' + b) into out, or the gated form of two; preactivations where tensors are given.
template <class Device>
void run_forward(const Tensor& input, const Tensor* const (&weight)[2],
                 const OptionalTensor* const (&bias)[2], Activation activation,
                 Tensor* const (&preactivation)[2], Tensor& out) {
  const Matrix x(input);
  LinearActGemm g;
  g.dtype = dtype_of(input, "linear_act: input");
  g.activation = activation;
  g.form = weight[1] ? LinearActGemm::Form::kGated : LinearActGemm::Form::kPlain;
  g.m = x.rows();
  g.n = weight[0]->size(0);
  g.k[0] = x.cols();
  g.a[0] = x.over_cols();
  g.out = out.mutable_data_ptr();
  std::optional<Matrix> w[2];
  OptionalTensor kept_bias[2];
  for (int i = 0; i < (weight[1] ? 2 : 1); ++i) {
    check_weight(*weight[i], input, g.n, x.cols());
    w[i].emplace(*weight[i]);
    g.b[i] = w[i]->over_cols();
    g.bias[i] = bias_data(*bias[i], input, g.n, kept_bias[i]);
    if (preactivation[i]) g.preactivation[i] = preactivation[i]->mutable_data_ptr();
  }
  Device::gemm(g);
}

template <class Device>
std::tuple<Tensor, Tensor> forward(Tensor input, Tensor weight, OptionalTensor bias,
                                   std::string activation, bool save_preactivation) {
  FL_CHECK(weight.dim() == 2, "linear_act: weight has to have two dimensions");
  const auto sizes = sizes_with_last(input, weight.size(0));
  Tensor out = empty(input, sizes);
  Tensor z = save_preactivation ? empty(input, sizes) : nothing(input);
  run_forward<Device>(input, {&weight, nullptr}, {&bias, nullptr}, activation_from_name(activation),
                      {save_preactivation ? &z : nullptr, nullptr}, out);
  return {out, z};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> gated_forward(Tensor input, Tensor weight_gate, Tensor weight_up,
                                                 OptionalTensor bias_gate, OptionalTensor bias_up,
                                                 std::string activation, bool save_preactivation) {
  FL_CHECK(weight_gate.dim() == 2, "gated_linear_act: weight_gate has to have two dimensions");
  const auto sizes = sizes_with_last(input, weight_gate.size(0));
  Tensor out = empty(input, sizes);
  Tensor gate = save_preactivation ? empty(input, sizes) : nothing(input);
  Tensor up = save_preactivation ? empty(input, sizes) : nothing(input);
  run_forward<Device>(
      input, {&weight_gate, &weight_up}, {&bias_gate, &bias_up}, activation_from_name(activation),
      {save_preactivation ? &gate : nullptr, save_preactivation ? &up : nullptr}, out);
  return {out, gate, up};
}

// dinput = dz weight, summed over the one or two products of the forward.
template <class Device>
Tensor input_gradient(const Tensor& dout, const Matrix* const (&dz)[2],
                      const OptionalTensor* const (&weight)[2]) {
  LinearActGemm g;
  g.dtype = dtype_of(dout, "linear_act: grad");
  g.form = dz[1] ? LinearActGemm::Form::kSum : LinearActGemm::Form::kPlain;
  std::optional<Matrix> w[2];
  for (int i = 0; i < (dz[1] ? 2 : 1); ++i) {
    FL_CHECK(weight[i]->has_value(), "linear_act: the gradient of input needs weight");
    const Tensor& tensor = **weight[i];
    FL_CHECK(tensor.dim() == 2, "linear_act: weight has to have two dimensions");
    if (i == 0) g.n = tensor.size(1);
    check_weight(tensor, dout, dz[i]->cols(), g.n);
    w[i].emplace(tensor);
    g.a[i] = dz[i]->over_cols();
    g.b[i] = w[i]->over_rows();
    g.k[i] = dz[i]->cols();
  }
  g.m = dz[0]->rows();
  Tensor dinput = empty(dout, sizes_with_last(dout, g.n));
  g.out = dinput.mutable_data_ptr();
  Device::gemm(g);
  return dinput;
}

// dweight = dz' input.
template <class Device>
Tensor weight_gradient(const Tensor& dout, const Matrix& dz, const OptionalTensor& input) {
  FL_CHECK(input.has_value(), "linear_act: the gradient of weight needs input");
  check_same_kind(*input, dout, "linear_act: input");
  const Matrix x(*input);
  FL_CHECK(x.rows() == dz.rows(), "linear_act: grad has ", dz.rows(), " rows, input has ",
           x.rows());
  Tensor dweight = empty(dout, {dz.cols(), x.cols()});
  LinearActGemm g;
  g.dtype = dtype_of(dout, "linear_act: grad");
  g.m = dz.cols();
  g.n = x.cols();
  g.k[0] = dz.rows();
  g.a[0] = dz.over_rows();
  g.b[0] = x.over_rows();
  g.out = dweight.mutable_data_ptr();
  Device::gemm(g);
  return dweight;
}

void check_preactivation(const Tensor& z, const Tensor& dout) {
  check_same_kind(z, dout, "linear_act: preactivation");
  FL_CHECK(z.is_contiguous() && z.numel() == dout.numel(),
           "linear_act: preactivation has to be contiguous, of the shape of grad");
}

// dout with dense columns, which is what activation_backward reads.
Matrix dense_columns(const Tensor& dout) {
  Matrix matrix(dout);
  return matrix.cols_dense() ? matrix : Matrix(torch::stable::contiguous(dout));
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> backward(Tensor dout, OptionalTensor input,
                                            OptionalTensor weight, OptionalTensor bias,
                                            OptionalTensor preactivation, std::string name,
                                            bool needs_input, bool needs_weight, bool needs_bias) {
  const Activation activation = activation_from_name(name);
  FL_CHECK(dout.dim() >= 1, "linear_act: grad has to have at least one dimension");
  const bool identity = activation == Activation::kIdentity;
  if (!identity && !preactivation) {
    FL_CHECK(input && weight && input->dim() >= 1,
             "linear_act: without preactivation, input and weight are needed");
    preactivation = empty(dout, sizes_with_last(dout, dout.size(dout.dim() - 1)));
    check_weight(*weight, dout, dout.size(dout.dim() - 1), input->size(input->dim() - 1));
    run_forward<Device>(*input, {&*weight, nullptr}, {&bias, nullptr}, Activation::kIdentity,
                        {nullptr, nullptr}, *preactivation);
  }
  const Matrix grad = dense_columns(dout);
  const Tensor dz_tensor = identity ? dout : empty(dout, {grad.rows(), grad.cols()});
  const Matrix dz = identity ? grad : Matrix(dz_tensor);
  Tensor dbias = needs_bias ? empty(dout, {grad.cols()}) : nothing(dout);
  if (!identity || needs_bias) {
    ActivationBackward p;
    p.dtype = dtype_of(dout, "linear_act: grad");
    p.activation = activation;
    p.rows = grad.rows();
    p.cols = grad.cols();
    p.dout = grad.data();
    p.dout_stride = grad.stride();
    if (!identity) {
      check_preactivation(*preactivation, dout);
      p.z[0] = preactivation->const_data_ptr();
      p.dz[0] = dz_tensor.mutable_data_ptr();
    }
    if (needs_bias) p.dbias[0] = dbias.mutable_data_ptr();
    Device::backward(p);
  }
  Tensor dinput = needs_input ? input_gradient<Device>(dout, {&dz, nullptr}, {&weight, nullptr})
                              : nothing(dout);
  Tensor dweight = needs_weight ? weight_gradient<Device>(dout, dz, input) : nothing(dout);
  return {dinput, dweight, dbias};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_backward(
    Tensor dout, OptionalTensor input, OptionalTensor weight_gate, OptionalTensor weight_up,
    OptionalTensor bias_gate, OptionalTensor bias_up, OptionalTensor gate, OptionalTensor up,
    std::string name, bool needs_input, bool needs_weight_gate, bool needs_weight_up,
    bool needs_bias_gate, bool needs_bias_up) {
  if (!gate || !up) {
    FL_CHECK(input && weight_gate && weight_up && input->dim() >= 1 && dout.dim() >= 1,
             "gated_linear_act: without gate and up, input and both weights are needed");
    gate = empty(dout, sizes_with_last(dout, dout.size(dout.dim() - 1)));
    up = empty(dout, sizes_with_last(dout, dout.size(dout.dim() - 1)));
    for (auto [weight, bias, z] :
         {std::tuple(&weight_gate, &bias_gate, &gate), std::tuple(&weight_up, &bias_up, &up)}) {
      check_weight(**weight, dout, dout.size(dout.dim() - 1), input->size(input->dim() - 1));
      run_forward<Device>(*input, {&**weight, nullptr}, {bias, nullptr}, Activation::kIdentity,
                          {nullptr, nullptr}, **z);
    }
  }
  check_preactivation(*gate, dout);
  check_preactivation(*up, dout);
  const Matrix grad = dense_columns(dout);
  const Tensor dgate_tensor = empty(dout, {grad.rows(), grad.cols()});
  const Tensor dup_tensor = empty(dout, {grad.rows(), grad.cols()});
  Tensor dbias_gate = needs_bias_gate ? empty(dout, {grad.cols()}) : nothing(dout);
  Tensor dbias_up = needs_bias_up ? empty(dout, {grad.cols()}) : nothing(dout);
  ActivationBackward p;
  p.dtype = dtype_of(dout, "gated_linear_act: grad");
  p.activation = activation_from_name(name);
  p.rows = grad.rows();
  p.cols = grad.cols();
  p.dout = grad.data();
  p.dout_stride = grad.stride();
  p.gated = true;
  p.z[0] = gate->const_data_ptr();
  p.z[1] = up->const_data_ptr();
  p.dz[0] = dgate_tensor.mutable_data_ptr();
  p.dz[1] = dup_tensor.mutable_data_ptr();
  if (needs_bias_gate) p.dbias[0] = dbias_gate.mutable_data_ptr();
  if (needs_bias_up) p.dbias[1] = dbias_up.mutable_data_ptr();
  Device::backward(p);

  const Matrix dgate(dgate_tensor), dup(dup_tensor);
  Tensor dinput = needs_input
                      ? input_gradient<Device>(dout, {&dgate, &dup}, {&weight_gate, &weight_up})
                      : nothing(dout);
  Tensor dweight_gate =
      needs_weight_gate ? weight_gradient<Device>(dout, dgate, input) : nothing(dout);
  Tensor dweight_up = needs_weight_up ? weight_gradient<Device>(dout, dup, input) : nothing(dout);
  return {dinput, dweight_gate, dweight_up, dbias_gate, dbias_up};
}

}  // namespace
}  // namespace fl

STABLE_TORCH_LIBRARY_IMPL(fastlayers, CPU, m) {
  m.impl("linear_act_forward", TORCH_BOX(&fl::forward<fl::Cpu>));
  m.impl("linear_act_backward", TORCH_BOX(&fl::backward<fl::Cpu>));
  m.impl("gated_linear_act_forward", TORCH_BOX(&fl::gated_forward<fl::Cpu>));
  m.impl("gated_linear_act_backward", TORCH_BOX(&fl::gated_backward<fl::Cpu>));
}
