// What a linear + activation kernel is told: pointers, sizes, strides. No Torch.
//
// Everything the op computes is one of two things:
//   LinearActGemm       out = activation(a b' + bias), the gated form of it, or a sum of products:
//                       the forward, and with activation identity both gradients,
//                       dinput = dz weight and dweight = dz' input
//   ActivationBackward  dz = activation'(z) * dout, and dbias = the column sums of dz
// and on a GPU one of two more:
//   LinearActGemm with dout      the first half of a backward that kept no z: it computes z again
//   ActivationForward   out = activation(z), where somebody else multiplied
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/dtype.h"

namespace fl {

// A (rows, k) factor of a product, k being what the product sums over. One dimension is dense:
// element (r, k) lies at r * stride + k where k_dense, else at k * stride + r.
struct GemmFactor {
  const void* data = nullptr;
  int64_t stride = 0;
  bool k_dense = true;
};

struct LinearActGemm {
  DType dtype = DType::kFloat32;  // of every matrix here
  Activation activation = Activation::kIdentity;
  int64_t m = 0, n = 0;
  int64_t k[2] = {0, 0};

  // plain   out = activation(a[0] b[0]' + bias[0])
  // gated   out = activation(a[0] b[0]' + bias[0]) * (a[0] b[1]' + bias[1])
  // sum     out = a[0] b[0]' + a[1] b[1]'
  enum class Form : int { kPlain, kGated, kSum } form = Form::kPlain;
  GemmFactor a[2];                              // (m, k)
  GemmFactor b[2];                              // (n, k)
  const void* bias[2] = {nullptr, nullptr};     // (n,) dense, or null
  void* preactivation[2] = {nullptr, nullptr};  // (m, n) dense: a b' + bias, or null: not wanted
  void* out = nullptr;                          // (m, n) dense

  // Not null, and then with z[i] = a[0] b[i]' + bias[i], for the CUDA kernels alone:
  // plain   out = activation'(z[0]) dout
  // gated   out = activation'(z[0]) z[1] dout,  out_up = activation(z[0]) dout
  const void* dout = nullptr;  // (m, n), n dense
  int64_t dout_stride = 0;
  void* out_up = nullptr;  // (m, n) dense

  // float32 on tensor cores: whether the first 10 bits after the point are enough.
  bool allow_tf32 = false;
};

// out = activation(z[0] + bias[0]), or gated, activation(z[0] + bias[0]) * (z[1] + bias[1]).
struct ActivationForward {
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kIdentity;
  int64_t rows = 0, cols = 0;
  bool gated = false;
  const void* z[2] = {nullptr, nullptr};  // (rows, cols), cols dense
  int64_t z_stride[2] = {0, 0};
  void* out = nullptr;  // (rows, cols) dense
};

struct ActivationBackward {
  DType dtype = DType::kFloat32;
  Activation activation = Activation::kIdentity;
  int64_t rows = 0, cols = 0;
  const void* dout = nullptr;  // (rows, cols), cols dense
  int64_t dout_stride = 0;

  // plain   dz[0] = activation'(z[0]) dout
  // gated   dz[0] = activation'(z[0]) z[1] dout,  dz[1] = activation(z[0]) dout
  bool gated = false;
  const void* z[2] = {nullptr, nullptr};  // (rows, cols) dense; z[0] may be null for identity
  void* dz[2] = {nullptr, nullptr};       // (rows, cols) dense; null: not wanted
  void* dbias[2] = {nullptr, nullptr};    // (cols,) dense; null: not wanted
};

}  // namespace fl
