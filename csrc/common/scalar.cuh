// One float with the functions of simd.h, so that the formulas of activation.h run on the device.
#pragma once

#include <cuda_runtime.h>

#include "common/activation.h"

namespace fl {

struct Scalar {
  float x;
  __device__ __forceinline__ Scalar(float value) : x(value) {}
};

__device__ __forceinline__ Scalar operator+(Scalar a, Scalar b) { return a.x + b.x; }
__device__ __forceinline__ Scalar operator-(Scalar a, Scalar b) { return a.x - b.x; }
__device__ __forceinline__ Scalar operator-(Scalar a) { return -a.x; }
__device__ __forceinline__ Scalar operator*(Scalar a, Scalar b) { return a.x * b.x; }
// The formulas divide by numbers from 1 on; infinity gives 0.
__device__ __forceinline__ Scalar operator/(Scalar a, Scalar b) { return __fdividef(a.x, b.x); }
__device__ __forceinline__ bool operator<=(Scalar a, Scalar b) { return a.x <= b.x; }
__device__ __forceinline__ bool operator>(Scalar a, Scalar b) { return a.x > b.x; }
__device__ __forceinline__ Scalar select(bool which, Scalar yes, Scalar no) {
  return which ? yes : no;
}
__device__ __forceinline__ Scalar fma(Scalar a, Scalar b, Scalar c) { return fmaf(a.x, b.x, c.x); }
__device__ __forceinline__ Scalar fnma(Scalar a, Scalar b, Scalar c) {
  return fmaf(-a.x, b.x, c.x);
}
__device__ __forceinline__ Scalar abs(Scalar a) { return fabsf(a.x); }
__device__ __forceinline__ Scalar exp(Scalar a) { return expf(a.x); }
__device__ __forceinline__ Scalar erf(Scalar a) { return erff(a.x); }
__device__ __forceinline__ Scalar tanh(Scalar a) { return tanhf(a.x); }
__device__ __forceinline__ Scalar sigmoid(Scalar a) {
  return Scalar(1.0f) / (Scalar(1.0f) + exp(-a));
}

}  // namespace fl
