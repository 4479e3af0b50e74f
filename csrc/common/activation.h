// The activations, each with its derivative, on any type V that has the functions of simd.h: a
// vector on the CPU, Scalar (scalar.cuh) on a GPU.
// To add one: a struct here, a line in FL_ACTIVATIONS, a line in
// fastlayers/reference/activations.py.
//
// Every formula keeps NaN, and agrees with torch at the kinks: relu'(0) = 0, leaky_relu'(0) =
// slope.
#pragma once

#include <string_view>

#include "common/check.h"

#if defined(__CUDACC__)
#define FL_EVERYWHERE __host__ __device__ __forceinline__
#else
#define FL_EVERYWHERE __attribute__((always_inline)) inline
#endif
#define FL_FORMULA   \
  template <class V> \
  FL_EVERYWHERE static V

namespace fl {

struct Identity {
  FL_FORMULA forward(V x) { return x; }
  FL_FORMULA derivative(V) { return V(1.0f); }
};

struct Relu {
  FL_FORMULA forward(V x) { return select(x <= V(0.0f), V(0.0f), x); }
  FL_FORMULA derivative(V x) { return select(x <= V(0.0f), V(0.0f), V(1.0f)); }
};

struct ReluSquared {
  FL_FORMULA forward(V x) {
    const V r = Relu::forward(x);
    return r * r;
  }
  FL_FORMULA derivative(V x) { return V(2.0f) * Relu::forward(x); }
};

struct LeakyRelu {
  static constexpr float kSlope = 0.01f;  // torch's default
  FL_FORMULA forward(V x) { return select(x > V(0.0f), x, x * V(kSlope)); }
  FL_FORMULA derivative(V x) { return select(x > V(0.0f), V(1.0f), V(kSlope)); }
};

// x Phi(x), Phi the normal distribution function: Hendrycks & Gimpel 2016, arXiv:1606.08415.
struct Gelu {
  FL_FORMULA normal_cdf(V x) { return fma(V(0.5f), erf(x * V(0.70710678f)), V(0.5f)); }
  FL_FORMULA forward(V x) { return x * normal_cdf(x); }
  FL_FORMULA derivative(V x) {
    const V density = V(0.39894228f) * exp(x * x * V(-0.5f));
    return fma(x, density, normal_cdf(x));
  }
};

// The tanh approximation of the same paper: x sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3).
struct GeluTanh {
  FL_FORMULA gate_argument(V x) { return x * fma(x * x, V(0.0713548163f), V(1.59576912f)); }
  FL_FORMULA forward(V x) { return x * sigmoid(gate_argument(x)); }
  FL_FORMULA derivative(V x) {
    // The gate and 1 - gate from e^-|2 u|: 1 - gate itself would cancel, times a slope of x^3.
    const V v = gate_argument(x);
    const V e = exp(-abs(v));
    const V larger = V(1.0f) / (V(1.0f) + e);
    const V smaller = e * larger;
    const V slope = fma(x * x, V(0.214064449f), V(1.59576912f));
    return fma(x * slope * larger, smaller, select(v > V(0.0f), larger, smaller));
  }
};

// x sigmoid(1.702 x): the sigmoid approximation of the same paper.
struct QuickGelu {
  FL_FORMULA forward(V x) { return x * sigmoid(x * V(1.702f)); }
  FL_FORMULA derivative(V x) {
    const V s = sigmoid(x * V(1.702f));
    return fma(x * V(1.702f) * s, V(1.0f) - s, s);
  }
};

// x sigmoid(x): Elfwing, Uchibe & Doya 2017, arXiv:1702.03118.
struct Silu {
  FL_FORMULA forward(V x) { return x * sigmoid(x); }
  FL_FORMULA derivative(V x) {
    const V s = sigmoid(x);
    return fma(x * s, V(1.0f) - s, s);
  }
};

struct Sigmoid {
  FL_FORMULA forward(V x) { return sigmoid(x); }
  FL_FORMULA derivative(V x) {
    const V s = sigmoid(x);
    return s * (V(1.0f) - s);
  }
};

struct Tanh {
  FL_FORMULA forward(V x) { return tanh(x); }
  FL_FORMULA derivative(V x) {
    const V t = tanh(x);
    return fnma(t, t, V(1.0f));
  }
};

#define FL_ACTIVATIONS(X)      \
  X(identity, Identity)        \
  X(relu, Relu)                \
  X(gelu, Gelu)                \
  X(gelu_tanh, GeluTanh)       \
  X(quick_gelu, QuickGelu)     \
  X(silu, Silu)                \
  X(sigmoid, Sigmoid)          \
  X(tanh, Tanh)                \
  X(relu_squared, ReluSquared) \
  X(leaky_relu, LeakyRelu)

enum class Activation : int {
#define FL_ENUMERATOR(name, Struct) k##Struct,
  FL_ACTIVATIONS(FL_ENUMERATOR)
#undef FL_ENUMERATOR
};

inline Activation activation_from_name(std::string_view wanted) {
#define FL_MATCH(name, Struct) \
  if (wanted == #name) return Activation::k##Struct;
  FL_ACTIVATIONS(FL_MATCH)
#undef FL_MATCH
  fail("unknown activation ", wanted);
}

// f(Gelu{}) and so on: the activation as a type.
template <class F>
FL_EVERYWHERE void with_activation(Activation activation, F&& f) {
  switch (activation) {
#define FL_CASE(name, Struct) \
  case Activation::k##Struct: \
    return f(Struct{});
    FL_ACTIVATIONS(FL_CASE)
#undef FL_CASE
  }
}

}  // namespace fl
