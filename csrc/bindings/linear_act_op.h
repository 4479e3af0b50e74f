// linear_act and gated_linear_act: checks that memory safety needs, allocation, and which products
// make up a forward and a backward. What a device adds, Cpu in linear_act.cpp for one:
//
//   Device(tensor, allow_tf32)   of the tensors of a call
//   kAnyLayout         whether its products take factors however they lie; else copies are made of
//                      an input or, in the forward, a weight whose columns are not dense
//   kRecomputes        whether gemm takes dout
//   gemm, backward     its kernels
//   admit, output      of arguments, before a kernel reads them, and of tensors for it to fill
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/tensor.h"
#include "linear_act/params.h"

namespace fl {

using OptionalTensor = std::optional<Tensor>;

// A tensor seen as (rows, cols): leading dimensions taken together. One of the two dimensions is
// dense; a tensor for which that does not hold is copied.
class Matrix {
 public:
  // dense_columns: a copy is made where columns are not dense, too.
  template <class Device>
  Matrix(const Device& device, const Tensor& tensor, bool dense_columns = false) : tensor_(tensor) {
    FL_CHECK(tensor.dim() >= 1, "linear_act: a tensor has no dimension");
    if (!view() || (dense_columns && !cols_dense_)) {
      tensor_ = torch::stable::contiguous(tensor);
      FL_CHECK(view(), "linear_act: a contiguous tensor has to be a matrix");
    }
    device.admit(tensor_, "linear_act: a matrix");
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
    if (tensor_.numel() == 0) {
      for (int64_t d = 0; d < last; ++d) rows_ *= tensor_.size(d);
      stride_ = cols_;
      return cols_dense_ = true;
    }
    for (int64_t d = last - 1; d >= 0; --d) {
      if (tensor_.size(d) == 1) continue;
      if (rows_ != 1 && tensor_.stride(d) != row_stride * rows_) return false;
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

inline std::vector<int64_t> sizes_with_last(const Tensor& tensor, int64_t last) {
  FL_CHECK(tensor.dim() >= 1, "linear_act: input and grad have to have at least one dimension");
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes.back() = last;
  return sizes;
}

template <class Device>
Tensor empty(const Device& device, const Tensor& like, const std::vector<int64_t>& sizes) {
  return device.output(torch::stable::new_empty(like, sizes));
}

// Stands for an output that was not asked for.
inline Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

inline void check_same_kind(const Tensor& tensor, const Tensor& reference, const char* what) {
  FL_CHECK(tensor.scalar_type() == reference.scalar_type(), what, " differs in dtype");
  FL_CHECK(tensor.get_device_index() == reference.get_device_index() &&
               tensor.is_cpu() == reference.is_cpu(),
           what, " is on another device");
}

inline void check_weight(const Tensor& weight, const Tensor& reference, int64_t out_features,
                         int64_t in_features) {
  check_same_kind(weight, reference, "linear_act: weight");
  FL_CHECK(weight.dim() == 2 && weight.size(0) == out_features && weight.size(1) == in_features,
           "linear_act: weight has to be (", out_features, ", ", in_features, ")");
}

// A bias, dense, as the kernels take it; `keep` owns the copy where one is needed.
template <class Device>
const void* bias_data(const Device& device, const OptionalTensor& bias, const Tensor& reference,
                      int64_t out_features, OptionalTensor& keep) {
  if (!bias) return nullptr;
  check_same_kind(*bias, reference, "linear_act: bias");
  FL_CHECK(bias->dim() == 1 && bias->size(0) == out_features, "linear_act: bias has to be (",
           out_features, ",)");
  keep = torch::stable::contiguous(*bias);
  device.admit(*keep, "linear_act: bias");
  return keep->const_data_ptr();
}

// The weights and biases of one product, or of the gated form's two: weight[1] is null for one.
struct Parameters {
  const Tensor* weight[2];
  const OptionalTensor* bias[2];
};

// The product x w' + b as gemm does it, or the gated form's two; finish(g) says what becomes of it.
template <class Device, class F>
void run_product(const Device& device, const Tensor& input, const Parameters& parameters,
                 Activation activation, F&& finish) {
  const Matrix x(device, input, !Device::kAnyLayout);
  LinearActGemm g;
  g.dtype = dtype_of(input, "linear_act: input");
  g.activation = activation;
  g.form = parameters.weight[1] ? LinearActGemm::Form::kGated : LinearActGemm::Form::kPlain;
  g.m = x.rows();
  g.n = parameters.weight[0]->size(0);
  g.k[0] = x.cols();
  g.a[0] = x.over_cols();
  std::optional<Matrix> w[2];
  OptionalTensor kept_bias[2];
  for (int i = 0; i < (parameters.weight[1] ? 2 : 1); ++i) {
    check_weight(*parameters.weight[i], input, g.n, x.cols());
    w[i].emplace(device, *parameters.weight[i], !Device::kAnyLayout);
    g.b[i] = w[i]->over_cols();
    g.bias[i] = bias_data(device, *parameters.bias[i], input, g.n, kept_bias[i]);
  }
  finish(g);
  device.gemm(g);
}

// activation(x w' + b), or the gated form, and the pre-activations, empty where not wanted.
template <class Device>
std::tuple<Tensor, Tensor, Tensor> run_forward(const Tensor& input, const Parameters& parameters,
                                               const std::string& activation,
                                               bool save_preactivation, bool allow_tf32) {
  const Device device(input, allow_tf32);
  FL_CHECK(parameters.weight[0]->dim() == 2, "linear_act: weight has to have two dimensions");
  const auto sizes = sizes_with_last(input, parameters.weight[0]->size(0));
  Tensor out = empty(device, input, sizes), z[2] = {nothing(input), nothing(input)};
  run_product(device, input, parameters, activation_from_name(activation), [&](LinearActGemm& g) {
    g.out = out.mutable_data_ptr();
    for (int i = 0; i < (parameters.weight[1] ? 2 : 1) && save_preactivation; ++i) {
      z[i] = empty(device, input, sizes);
      g.preactivation[i] = z[i].mutable_data_ptr();
    }
  });
  return {out, z[0], z[1]};
}

template <class Device>
std::tuple<Tensor, Tensor> forward(Tensor input, Tensor weight, OptionalTensor bias,
                                   std::string activation, bool save_preactivation,
                                   bool allow_tf32) {
  auto [out, z, none] = run_forward<Device>(input, {{&weight, nullptr}, {&bias, nullptr}},
                                            activation, save_preactivation, allow_tf32);
  return {out, z};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> gated_forward(Tensor input, Tensor weight_gate, Tensor weight_up,
                                                 OptionalTensor bias_gate, OptionalTensor bias_up,
                                                 std::string activation, bool save_preactivation,
                                                 bool allow_tf32) {
  return run_forward<Device>(input, {{&weight_gate, &weight_up}, {&bias_gate, &bias_up}},
                             activation, save_preactivation, allow_tf32);
}

// What the backward knows of the forward's one or two products (gated): `count` of everything.
struct Saved {
  int count;
  const OptionalTensor& input;
  const OptionalTensor* weight[2];
  const OptionalTensor* bias[2];
  OptionalTensor z[2];  // none: not kept
};

// dinput = dz weight, summed over the products.
template <class Device>
Tensor input_gradient(const Device& device, const Tensor& dout, const std::vector<Matrix>& dz,
                      const Saved& saved) {
  LinearActGemm g;
  g.dtype = dtype_of(dout, "linear_act: grad");
  g.form = saved.count == 2 ? LinearActGemm::Form::kSum : LinearActGemm::Form::kPlain;
  std::optional<Matrix> w[2];
  for (int i = 0; i < saved.count; ++i) {
    FL_CHECK(saved.weight[i]->has_value(), "linear_act: the gradient of input needs weight");
    const Tensor& weight = **saved.weight[i];
    FL_CHECK(weight.dim() == 2, "linear_act: weight has to have two dimensions");
    if (i == 0) g.n = weight.size(1);
    check_weight(weight, dout, dz[i].cols(), g.n);
    // A sum takes factors that lie alike.
    w[i].emplace(device, weight, i == 1 && !Device::kAnyLayout && w[0]->cols_dense());
    if (i == 1 && !Device::kAnyLayout && w[1]->cols_dense() != w[0]->cols_dense()) {
      w[0].emplace(device, **saved.weight[0], true);
    }
  }
  for (int i = 0; i < saved.count; ++i) {
    g.a[i] = dz[i].over_cols();
    g.b[i] = w[i]->over_rows();
    g.k[i] = dz[i].cols();
  }
  g.m = dz[0].rows();
  Tensor dinput = empty(device, dout, sizes_with_last(dout, g.n));
  g.out = dinput.mutable_data_ptr();
  device.gemm(g);
  return dinput;
}

// dweight = dz' input.
template <class Device>
Tensor weight_gradient(const Device& device, const Tensor& dout, const Matrix& dz,
                       const OptionalTensor& input) {
  FL_CHECK(input.has_value(), "linear_act: the gradient of weight needs input");
  check_same_kind(*input, dout, "linear_act: input");
  const Matrix x(device, *input, !Device::kAnyLayout);
  FL_CHECK(x.rows() == dz.rows(), "linear_act: grad has ", dz.rows(), " rows, input has ",
           x.rows());
  Tensor dweight = empty(device, dout, {dz.cols(), x.cols()});
  LinearActGemm g;
  g.dtype = dtype_of(dout, "linear_act: grad");
  g.m = dz.cols();
  g.n = x.cols();
  g.k[0] = dz.rows();
  g.a[0] = dz.over_rows();
  g.b[0] = x.over_rows();
  g.out = dweight.mutable_data_ptr();
  device.gemm(g);
  return dweight;
}

inline void check_preactivation(const Tensor& z, const Tensor& dout) {
  check_same_kind(z, dout, "linear_act: preactivation");
  FL_CHECK(z.is_contiguous() && z.numel() == dout.numel(),
           "linear_act: preactivation has to be contiguous, of the shape of grad");
}

// dbias = the column sums of dz.
template <class Device>
void sum_columns(const Device& device, const Matrix& dz, const Tensor& dout, Tensor& dbias) {
  ActivationBackward p;
  p.dtype = dtype_of(dout, "linear_act: grad");
  p.rows = dz.rows();
  p.cols = dz.cols();
  p.dout = dz.data();
  p.dout_stride = dz.stride();
  p.dbias[0] = dbias.mutable_data_ptr();
  device.backward(p);
}

// The products once more, from tensors that belong to grad's rows and columns.
template <class Device, class F>
void run_again(const Device& device, const Matrix& grad, const Tensor& dout, const Saved& saved,
               int first, int end, Activation activation, F&& finish) {
  FL_CHECK(saved.input && saved.input->dim() >= 1,
           "linear_act: without preactivation, input and "
           "weight are needed");
  const Tensor& input = *saved.input;
  Parameters parameters{};
  for (int i = first; i < end; ++i) {
    FL_CHECK(saved.weight[i]->has_value(),
             "linear_act: without preactivation, input and weight are needed");
    check_weight(**saved.weight[i], dout, grad.cols(), input.size(input.dim() - 1));
    parameters.weight[i - first] = &**saved.weight[i];
    parameters.bias[i - first] = saved.bias[i];
  }
  run_product(device, input, parameters, activation, [&](LinearActGemm& g) {
    FL_CHECK(g.m == grad.rows(), "linear_act: grad has ", grad.rows(), " rows, input has ", g.m);
    finish(g);
  });
}

// Into dz, from pre-activations that were kept or are computed again, and dbias where not empty.
template <class Device>
void run_backward(const Device& device, const Matrix& grad, const Tensor& dout, Saved& saved,
                  Activation activation, std::vector<Tensor>& dz, Tensor* const (&dbias)[2]) {
  const bool kept = saved.z[0].has_value();
  if (!kept && Device::kRecomputes) {
    run_again(device, grad, dout, saved, 0, saved.count, activation, [&](LinearActGemm& g) {
      g.dout = grad.data();
      g.dout_stride = grad.stride();
      g.out = dz[0].mutable_data_ptr();
      if (saved.count == 2) g.out_up = dz[1].mutable_data_ptr();
    });
    for (int i = 0; i < saved.count; ++i) {
      if (dbias[i]) sum_columns(device, Matrix(device, dz[i]), dout, *dbias[i]);
    }
    return;
  }
  ActivationBackward p;
  p.dtype = dtype_of(dout, "linear_act: grad");
  p.activation = activation;
  p.rows = grad.rows();
  p.cols = grad.cols();
  p.dout = grad.data();
  p.dout_stride = grad.stride();
  p.gated = saved.count == 2;
  for (int i = 0; i < saved.count; ++i) {
    if (!kept) {
      saved.z[i] = empty(device, dout, {grad.rows(), grad.cols()});
      run_again(device, grad, dout, saved, i, i + 1, Activation::kIdentity,
                [&](LinearActGemm& g) { g.out = saved.z[i]->mutable_data_ptr(); });
    }
    check_preactivation(*saved.z[i], dout);
    p.z[i] = saved.z[i]->const_data_ptr();
    p.dz[i] = dz[i].mutable_data_ptr();
    if (dbias[i]) p.dbias[i] = dbias[i]->mutable_data_ptr();
  }
  device.backward(p);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> backward(Tensor dout, OptionalTensor input,
                                            OptionalTensor weight, OptionalTensor bias,
                                            OptionalTensor preactivation, std::string name,
                                            bool needs_input, bool needs_weight, bool needs_bias,
                                            bool allow_tf32) {
  const Device device(dout, allow_tf32);
  const Activation activation = activation_from_name(name);
  const Matrix grad(device, dout, true);
  Saved saved{1, input, {&weight, nullptr}, {&bias, nullptr}, {preactivation, std::nullopt}};
  Tensor dbias = needs_bias ? empty(device, dout, {grad.cols()}) : nothing(dout);
  std::vector<Matrix> dz;
  if (activation == Activation::kIdentity) {
    dz.push_back(grad);
    if (needs_bias) sum_columns(device, grad, dout, dbias);
  } else {
    std::vector<Tensor> tensors{empty(device, dout, {grad.rows(), grad.cols()})};
    run_backward(device, grad, dout, saved, activation, tensors,
                 {needs_bias ? &dbias : nullptr, nullptr});
    dz.emplace_back(device, tensors[0]);
  }
  Tensor dinput = needs_input ? input_gradient(device, dout, dz, saved) : nothing(dout);
  Tensor dweight = needs_weight ? weight_gradient(device, dout, dz[0], input) : nothing(dout);
  return {dinput, dweight, dbias};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_backward(
    Tensor dout, OptionalTensor input, OptionalTensor weight_gate, OptionalTensor weight_up,
    OptionalTensor bias_gate, OptionalTensor bias_up, OptionalTensor gate, OptionalTensor up,
    std::string name, bool needs_input, bool needs_weight_gate, bool needs_weight_up,
    bool needs_bias_gate, bool needs_bias_up, bool allow_tf32) {
  const Device device(dout, allow_tf32);
  const Matrix grad(device, dout, true);
  if (!gate || !up) gate = up = std::nullopt;
  Saved saved{2, input, {&weight_gate, &weight_up}, {&bias_gate, &bias_up}, {gate, up}};
  std::vector<Tensor> tensors;
  for (int i = 0; i < 2; ++i) tensors.push_back(empty(device, dout, {grad.rows(), grad.cols()}));
  Tensor dbias_gate = needs_bias_gate ? empty(device, dout, {grad.cols()}) : nothing(dout);
  Tensor dbias_up = needs_bias_up ? empty(device, dout, {grad.cols()}) : nothing(dout);
  run_backward(device, grad, dout, saved, activation_from_name(name), tensors,
               {needs_bias_gate ? &dbias_gate : nullptr, needs_bias_up ? &dbias_up : nullptr});

  const std::vector<Matrix> dz{Matrix(device, tensors[0]), Matrix(device, tensors[1])};
  Tensor dinput = needs_input ? input_gradient(device, dout, dz, saved) : nothing(dout);
  Tensor dweight_gate =
      needs_weight_gate ? weight_gradient(device, dout, dz[0], input) : nothing(dout);
  Tensor dweight_up = needs_weight_up ? weight_gradient(device, dout, dz[1], input) : nothing(dout);
  return {dinput, dweight_gate, dweight_up, dbias_gate, dbias_up};
}

}  // namespace fl
