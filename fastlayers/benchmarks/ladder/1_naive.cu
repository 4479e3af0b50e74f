// Step 1, naive: o[i] = sum_j softmax_j(q[i] . k[j] / 8) v[j], as the formula reads.
//
// One thread per row of q, everything from global memory, two passes over the keys: the first for
// the largest score, which keeps exp from overflowing, the second for the sums.
//
// Prediction. A score costs 64 multiply-adds in each pass and 64 more for its share of o, and q, k,
// q, k and v are loaded for them, 64 numbers each: 192 + 320 instructions. 64 x 64 scores are 64
// keys for each of two warps: 128 * 512 = 65,536. All lanes read the same k and v, but q row by
// row, 128 bytes apart, 32 sectors for 64 useful bytes: 128 * 128 * 32 = 524,288 sectors.
// Result. 111,179 instructions, as each number is converted to float32, too; 541,200 sectors.
#include <cuda_bf16.h>

constexpr int kDim = 64;
constexpr float kScale = 0.125f;  // 1 / sqrt(kDim)

__device__ float dot(const __nv_bfloat16* a, const __nv_bfloat16* b) {
  float sum = 0.0f;
  for (int d = 0; d < kDim; ++d) sum += __bfloat162float(a[d]) * __bfloat162float(b[d]);
  return sum;
}

// q, k, v, o: (heads, seqlen, kDim). Grid: (rows of q / blockDim.x, heads).
extern "C" __global__ void attention(const __nv_bfloat16* q, const __nv_bfloat16* k,
                                     const __nv_bfloat16* v, __nv_bfloat16* o, int seqlen,
                                     bool is_causal) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= seqlen) return;
  const long long head = static_cast<long long>(blockIdx.y) * seqlen * kDim;
  q += head + i * kDim, k += head, v += head, o += head + i * kDim;
  const int end = is_causal ? i + 1 : seqlen;

  float top = -INFINITY;
  for (int j = 0; j < end; ++j) top = fmaxf(top, kScale * dot(q, k + j * kDim));

  float sum = 0.0f, output[kDim] = {};
  for (int j = 0; j < end; ++j) {
    const float p = expf(kScale * dot(q, k + j * kDim) - top);
    sum += p;
    for (int d = 0; d < kDim; ++d) output[d] += p * __bfloat162float(v[j * kDim + d]);
  }
  for (int d = 0; d < kDim; ++d) o[d] = __float2bfloat16(output[d] / sum);
}
