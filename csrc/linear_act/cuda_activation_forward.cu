// What is left to do where a product came from elsewhere, or in parts: the activation, and of parts
// bias and pre-activation, too. One pass over rows.
#include <climits>

#include "common/check.h"
#include "linear_act/cuda_epilogue.cuh"
#include "linear_act/cuda_passes.h"
#include "linear_act/cuda_rows.cuh"
#include "linear_act/kernels.h"

namespace fl {
namespace {

// (m, n) matrices, one per product; where `parts` > 1, sums of that many, `part` elements apart.
struct Products {
  const void* from[2];
  int64_t stride[2];
  int64_t part;
  int parts;
};

template <class From, class T>
__global__ void __launch_bounds__(kPassThreads)
    linear_act_epilogue_kernel(const __grid_constant__ LinearActGemm g,
                               const __grid_constant__ Products products) {
  using Values = Chunk<Strip<From>::kChunk>;
  const Strip<From> strip(g.m, g.n);
  if (strip.count == 0) return;
  const Epilogue<T, Values::kCount, true> epilogue(g, strip.column);
  const bool gated = g.form == LinearActGemm::Form::kGated;
  for (int64_t row = strip.first_row; row < strip.end_row; row += kPassWarps) {
    Values sums[2] = {Values::of(0.0f), Values::of(0.0f)};
    for (int part = 0; part < products.parts; ++part) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (i == 1 && !gated) continue;
        Values more;
        more.load(static_cast<const From*>(products.from[i]) + part * products.part +
                      row * products.stride[i] + strip.column,
                  strip.count);
        sums[i] = sums[i] + more;
      }
    }
    epilogue.store(row, sums[0], sums[1]);
  }
}

template <class From, class T>
void launch(const LinearActGemm& g, const Products& products, void* stream) {
  const int64_t blocks = pass_strips<From>(g.n) * pass_parts(g.m);
  FL_CHECK(blocks <= INT_MAX, "linear_act: a matrix of ", g.m, " rows is too large");
  linear_act_epilogue_kernel<From, T>
      <<<static_cast<unsigned>(blocks), kPassThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          g, products);
  const cudaError_t error = cudaGetLastError();
  FL_CHECK(error == cudaSuccess, "linear_act: ", cudaGetErrorString(error));
}

}  // namespace

void add_parts(const GemmCall& call, void* stream) {
  const int64_t matrix = call.g.m * call.partial_stride;
  const bool gated = call.g.form == LinearActGemm::Form::kGated;
  const Products products{{call.partial, call.partial + matrix},
                          {call.partial_stride, call.partial_stride},
                          gated ? 2 * matrix : matrix,
                          call.splits};
  with_cuda_type(call.g.dtype, [&](auto type) {
    launch<float, typename decltype(type)::type>(call.g, products, stream);
  });
}

void cuda_activation_forward(const ActivationForward& p, void* stream) {
  if (p.rows == 0 || p.cols == 0) return;
  LinearActGemm g;
  g.dtype = p.dtype;
  g.activation = p.activation;
  g.form = p.gated ? LinearActGemm::Form::kGated : LinearActGemm::Form::kPlain;
  g.m = p.rows;
  g.n = p.cols;
  g.out = p.out;
  const Products products{{p.z[0], p.z[1]}, {p.z_stride[0], p.z_stride[1]}, 0, 1};
  with_cuda_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch<T, T>(g, products, stream);
  });
}

}  // namespace fl
