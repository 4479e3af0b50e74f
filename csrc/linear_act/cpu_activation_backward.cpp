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

// The vector of one row at column `col`, whole or its lanes under `m`. sums: (2, cols).
template <class Act, bool kGated, bool kWhole, class T>
FL_INLINE void backward_vector(const ActivationBackward& p, const T* dout, int64_t row, int64_t col,
                               Mask m, float* sums) {
  const int64_t index = row * p.cols + col;
  const auto read = [&](const auto* from) { return kWhole ? load(from) : load(from, m); };
  const auto write = [&](auto* to, Vec x) { kWhole ? store(to, x) : store(to, x, m); };
  const auto finish = [&](int which, Vec dz) {
    if (p.dz[which]) write(static_cast<T*>(p.dz[which]) + index, dz);
    float* sum = sums + which * p.cols + col;
    if (p.dbias[which]) write(sum, read(sum) + dz);
  };
  const Vec grad = read(dout + col);
  if (p.z[0] == nullptr) return finish(0, grad);
  const Vec z0 = read(static_cast<const T*>(p.z[0]) + index);
  if constexpr (kGated) {
    const Vec z1 = read(static_cast<const T*>(p.z[1]) + index);
    finish(0, grad * z1 * Act::derivative(z0));
    finish(1, grad * Act::forward(z0));
  } else {
    finish(0, grad * Act::derivative(z0));
  }
}

template <class Act, bool kGated, class T>
void backward_rows(const ActivationBackward& p, int64_t begin, int64_t end, float* sums) {
  const Mask all = first_lanes(kLanes);
  const int64_t whole = p.cols / kLanes * kLanes;
  for (int64_t row = begin; row < end; ++row) {
    const T* dout = static_cast<const T*>(p.dout) + row * p.dout_stride;
    for (int64_t col = 0; col < whole; col += kLanes) {
      backward_vector<Act, kGated, true>(p, dout, row, col, all, sums);
    }
    if (whole < p.cols) {
      const Mask m = first_lanes(static_cast<int>(p.cols - whole));
      backward_vector<Act, kGated, false>(p, dout, row, whole, m, sums);
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
