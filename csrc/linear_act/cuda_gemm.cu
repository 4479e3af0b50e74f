// linear_act_gemm on CUDA: how the work is cut up, and which kernel does it.
#include <algorithm>
#include <climits>

#include "common/cuda_arch.h"
#include "linear_act/cuda_launch.cuh"
#include "linear_act/kernels.h"

namespace fl {
namespace {

// Into how many parts k goes: where the tiles of out leave more than half of the multiprocessors
// without work, as many as give each of them some, but none shorter than kLeast.
int choose_splits(int64_t tiles, int64_t k) {
  constexpr int64_t kLeast = 256;
  const int64_t multiprocessors = device_attribute("linear_act", cudaDevAttrMultiProcessorCount);
  if (2 * tiles > multiprocessors) return 1;
  return static_cast<int>(std::clamp(k / kLeast, int64_t{1}, multiprocessors / tiles));
}

GemmCall cut_up(const LinearActGemm& g) {
  constexpr int64_t kLargest = INT_MAX - 1024;
  FL_CHECK(g.m <= kLargest && g.n <= kLargest && g.k[0] + g.k[1] <= kLargest,
           "linear_act: a dimension of more than ", kLargest, " elements");
  const bool gated = g.form == LinearActGemm::Form::kGated;
  const int columns = gated ? kBlockRows / 2 : kBlockRows;
  GemmCall call;
  call.g = g;
  call.tiles_m = static_cast<int>((g.m + kBlockRows - 1) / kBlockRows);
  call.tiles_n = static_cast<int>((g.n + columns - 1) / columns);
  const int64_t tiles = int64_t{call.tiles_m} * call.tiles_n;
  FL_CHECK(tiles <= INT_MAX, "linear_act: an output of ", g.m, " x ", g.n, " is too large");
  call.splits = tiles == 0 ? 1 : choose_splits(tiles, g.k[0] + g.k[1]);
  call.partial_stride = (g.n + 3) / 4 * 4;
  return call;
}

}  // namespace

int64_t cuda_linear_act_gemm_workspace(const LinearActGemm& g) {
  const GemmCall call = cut_up(g);
  if (call.splits == 1) return 0;
  const int64_t products = g.form == LinearActGemm::Form::kGated ? 2 : 1;
  return call.splits * products * g.m * call.partial_stride;
}

void cuda_linear_act_gemm(const LinearActGemm& g, float* workspace, void* stream) {
  if (g.m == 0 || g.n == 0) return;
  GemmPlan plan;
  plan.call = cut_up(g);
  plan.call.partial = workspace;
  plan.arch = compiled_arch("linear_act");
  plan.stream = static_cast<cudaStream_t>(stream);
  switch (g.dtype) {
    case DType::kFloat16:
      launch_gemm_float16(plan);
      break;
    case DType::kBFloat16:
      need_arch_80("linear_act: bfloat16", plan.arch);
      launch_gemm_bfloat16(plan);
      break;
    case DType::kFloat32:
      g.allow_tf32&& plan.arch >= 80 ? launch_gemm_tf32(plan) : launch_gemm_float32(plan);
      break;
  }
  if (plan.call.splits > 1) add_parts(plan.call, stream);
}

}  // namespace fl
