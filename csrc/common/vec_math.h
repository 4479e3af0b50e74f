// exp, exp2, erf, tanh, sigmoid on Vec, correct to about 1 ulp in float32. Included by simd.h.
#pragma once

namespace fl::FL_ISA {

// 2^f on [-1/2, 1/2], relative error below 2^-27: minimax polynomial of degree 6.
FL_INLINE Vec exp2_fraction(Vec f) {
  Vec p = 1.532099537e-04f;
  p = fma(p, f, 1.339027363e-03f);
  p = fma(p, f, 9.618527537e-03f);
  p = fma(p, f, 5.550361890e-02f);
  p = fma(p, f, 2.402264781e-01f);
  p = fma(p, f, 6.931471806e-01f);
  return fma(p, f, 1.0f);
}

// 2^x. exp2(-inf) = 0, exp2(inf) = inf, NaN stays NaN.
FL_INLINE Vec exp2(Vec x) {
  const Vec clamped = min(Vec(300.0f), max(Vec(-300.0f), x));  // operand order keeps NaN
  const Vec n = round(clamped);
  return scale_by_power_of_2(exp2_fraction(clamped - n), n);
}

// e^x, with x = n ln 2 + r and ln 2 split in two, so that r is exact to the last bit that matters.
FL_INLINE Vec exp(Vec x) {
  const Vec clamped = min(Vec(200.0f), max(Vec(-200.0f), x));
  const Vec n = round(clamped * Vec(1.44269504f));
  Vec r = fnma(n, Vec(6.93145752e-1f), clamped);
  r = fnma(n, Vec(1.42860677e-6f), r);
  Vec p = 1.38144696e-3f;
  p = fma(p, r, 8.36877991e-3f);
  p = fma(p, r, 4.16683927e-2f);
  p = fma(p, r, 1.66665196e-1f);
  p = fma(p, r, 4.99999940e-1f);
  return scale_by_power_of_2(fma(p * r, r, r) + Vec(1.0f), n);
}

FL_INLINE Vec sigmoid(Vec x) { return Vec(1.0f) / (Vec(1.0f) + exp(-x)); }

// tanh: an odd polynomial near 0, where the exponential form would cancel.
FL_INLINE Vec tanh(Vec x) {
  const Vec a = abs(x);
  const Vec s = x * x;
  Vec p = 1.57394528e-2f;
  p = fma(p, s, -5.23039624e-2f);
  p = fma(p, s, 1.33152977e-1f);
  p = fma(p, s, -3.33327681e-1f);
  const Vec near = fma(p * s, x, x);
  const Vec far = Vec(1.0f) - Vec(2.0f) / (exp(a + a) + Vec(1.0f));
  return select(a < Vec(0.55f), near, copysign(far, x));
}

// erf: an odd polynomial near 0, 1 - exp(polynomial) elsewhere.
// Coefficients: N. Juffa, "Efficient faithfully-rounded implementation of erff()", 2017 (below 1
// ulp).
FL_INLINE Vec erf(Vec x) {
  const Vec t = abs(x);
  const Vec s = x * x;
  Vec far = fma(Vec(-1.72853470e-5f), t, 3.83197126e-4f);
  const Vec u = fma(Vec(-3.88396438e-3f), t, 2.42546219e-2f);
  far = fma(far, s, u);
  far = fma(far, t, -1.06777877e-1f);
  far = fma(far, t, -6.34846687e-1f);
  far = fma(far, t, -1.28717512e-1f);
  far = fma(far, t, -t);
  far = Vec(1.0f) - exp(far);
  Vec near = -5.96761703e-4f;
  near = fma(near, s, 4.99119423e-3f);
  near = fma(near, s, -2.67681349e-2f);
  near = fma(near, s, 1.12819925e-1f);
  near = fma(near, s, -3.76125336e-1f);
  near = fma(near, s, 1.28379166e-1f);
  near = fma(near, x, x);
  const Vec big = select(t > Vec(4.0f), copysign(Vec(1.0f), x), copysign(far, x));
  return select(t > Vec(0.927734375f), big, near);
}

}  // namespace fl::FL_ISA
