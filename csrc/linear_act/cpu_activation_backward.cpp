// activation_backward on CPU: one pass over z and dout gives dz and the column sums of it.
//
// Rows go in blocks of kBlockRows, whatever the number of threads; each block leaves its column
// sums in a row of its own, and these are added in order, so that dbias is reproducible.
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "linear_act/kernels.h"

namespace fl::FL_ISA {
namespace {

constexpr int64_t kBlockRows = 32;

struct Gradients {
  Vec dz0, dz1;
};

template <class Act, bool kGated, class T>
FL_INLINE Gradients gradients(const ActivationBackward& p, Vec dout, int64_t index, Mask m) {
  if (!kGated && p.z[0] == nullptr) return {dout, dout};
  const Vec z0 = load(static_cast<const T*>(p.z[0]) + index, m);
  const Vec slope = Act::derivative(z0);
  if constexpr (!kGated) return {dout * slope, dout};
  const Vec z1 = load(static_cast<const T*>(p.z[1]) + index, m);
  return {dout * z1 * slope, dout * Act::forward(z0)};
}

// sums: (2, cols) of this block, starting at 0.
template <class Act, bool kGated, class T>
void backward_rows(const ActivationBackward& p, int64_t begin, int64_t end, float* sums) {
  for (int64_t row = begin; row < end; ++row) {
    const T* dout = static_cast<const T*>(p.dout) + row * p.dout_stride;
    for (int64_t col = 0; col < p.cols; col += kLanes) {
      const int64_t left = p.cols - col;
      const Mask m = first_lanes(static_cast<int>(left < kLanes ? left : kLanes));
      const int64_t index = row * p.cols + col;
      const Gradients d = gradients<Act, kGated, T>(p, load(dout + col, m), index, m);
      if (p.dz[0]) store(static_cast<T*>(p.dz[0]) + index, d.dz0, m);
      if (kGated && p.dz[1]) store(static_cast<T*>(p.dz[1]) + index, d.dz1, m);
      if (p.dbias[0]) store(sums + col, load(sums + col, m) + d.dz0, m);
      if (kGated && p.dbias[1]) {
        float* up = sums + p.cols + col;
        store(up, load(up, m) + d.dz1, m);
      }
    }
  }
}

template <class T>
void add_up(const float* sums, int64_t blocks, int64_t stride, int64_t begin, int64_t end, T* to) {
  for (int64_t col = begin; col < end; col += kLanes) {
    const Mask m = first_lanes(static_cast<int>(end - col < kLanes ? end - col : kLanes));
    Vec total = 0.0f;
    for (int64_t b = 0; b < blocks; ++b) total += load(sums + b * stride + col, m);
    store(to + col, total, m);
  }
}

template <class Act, bool kGated, class T>
void run(const ActivationBackward& p) {
  const int64_t blocks = (p.rows + kBlockRows - 1) / kBlockRows;
  const int64_t stride = (kGated ? 2 : 1) * p.cols;
  const Scratch scratch(blocks * stride * static_cast<int64_t>(sizeof(float)));
  float* sums = scratch.as<float>();
  auto rows = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t i = 0; i < stride; ++i) sums[b * stride + i] = 0.0f;
      const int64_t last = (b + 1) * kBlockRows < p.rows ? (b + 1) * kBlockRows : p.rows;
      backward_rows<Act, kGated, T>(p, b * kBlockRows, last, sums + b * stride);
    }
  };
  parallel_ranges(blocks, 1, rows);
  for (int which = 0; which < (kGated ? 2 : 1); ++which) {
    if (p.dbias[which] == nullptr) continue;
    auto columns = [&](int64_t begin, int64_t end) {
      add_up(sums + which * p.cols, blocks, stride, begin, end, static_cast<T*>(p.dbias[which]));
    };
    parallel_ranges(p.cols, 1024, columns);
  }
}

}  // namespace

void activation_backward(const ActivationBackward& p) {
  if (p.cols == 0) return;
  with_dtype(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_activation(p.activation, [&](auto activation) {
      using Act = decltype(activation);
      p.gated ? run<Act, true, T>(p) : run<Act, false, T>(p);
    });
  });
}

}  // namespace fl::FL_ISA
