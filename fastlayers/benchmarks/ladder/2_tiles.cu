// Step 2, tiles: each key is fetched once for 128 rows, and seen once.
//
// A block's threads copy 64 keys and values to shared memory, as float32, where all read them.
// One pass instead of two: softmax does not need the largest score of the row, it needs any shift
// that is near it. So take the largest so far, and when a larger one comes, multiply what has been
// summed by exp(old - new). That is the online softmax (Milakov & Gimelshein 2018), and what makes
// FlashAttention possible. Scores are taken 8 at a time, so that o is rescaled once for 8 keys.
//
// Prediction. 128 multiply-adds per score, 32 loads of four numbers each, some 24 for softmax:
// 128 * 184 = 23,552 instructions. Global memory: 64 keys and values are 512 sectors for 128 rows,
// 256 for 64, and q and o 64 more. Shared memory: no conflicts, as all lanes read the same 16
// bytes; 16 bytes for 32 lanes count as four wavefronts, 128 * 32 * 4 = 16,384.
// Result. 24,628 instructions, 16,512 wavefronts; 512 sectors, as lanes read and write rows of q
// and o, 8 bytes at a time, each of which takes a sector.
#include <cuda_bf16.h>

constexpr int kDim = 64, kRows = 128, kKeys = 64, kChunk = 8;
constexpr float kScale = 0.125f;  // 1 / sqrt(kDim)

__device__ float4 widen(uint2 bits) {
  const float2 low = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits.x));
  const float2 high = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(bits.y));
  return make_float4(low.x, low.y, high.x, high.y);
}

// The first `rows` of kKeys rows; the others are zero.
__device__ void copy_tile(float4 (*tile)[kDim / 4], const __nv_bfloat16* from, int rows) {
  for (int index = threadIdx.x; index < kKeys * kDim / 4; index += kRows) {
    const int row = index / (kDim / 4), chunk = index % (kDim / 4);
    uint2 bits = make_uint2(0, 0);
    if (row < rows) bits = reinterpret_cast<const uint2*>(from)[index];
    tile[row][chunk] = widen(bits);
  }
}

// q, k, v, o: (heads, seqlen, kDim). Grid: (rows of q / kRows, heads).
extern "C" __global__ void __launch_bounds__(kRows)
    attention(const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v,
              __nv_bfloat16* o, int seqlen, bool is_causal) {
  __shared__ float4 tile_k[kKeys][kDim / 4], tile_v[kKeys][kDim / 4];
  const int first = blockIdx.x * kRows, i = first + threadIdx.x;
  const long long head = static_cast<long long>(blockIdx.y) * seqlen * kDim;
  q += head + i * kDim, k += head, v += head, o += head + i * kDim;

  float4 row[kDim / 4] = {}, output[kDim / 4] = {};
  if (i < seqlen) {
    for (int c = 0; c < kDim / 4; ++c) row[c] = widen(reinterpret_cast<const uint2*>(q)[c]);
  }
  float top = -INFINITY, sum = 0.0f;
  const int end = is_causal ? min(first + kRows, seqlen) : seqlen;  // of what the block sees
  for (int j0 = 0; j0 < end; j0 += kKeys) {
    __syncthreads();  // all have used the tiles before
    copy_tile(tile_k, k + j0 * kDim, seqlen - j0);
    copy_tile(tile_v, v + j0 * kDim, seqlen - j0);
    __syncthreads();  // the tiles are here
    for (int part = 0; part < kKeys; part += kChunk) {
      float p[kChunk], before = top;
#pragma unroll
      for (int n = 0; n < kChunk; ++n) {
        float4 dot = {};
#pragma unroll
        for (int c = 0; c < kDim / 4; ++c) {
          const float4 key = tile_k[part + n][c];
          dot.x += row[c].x * key.x, dot.y += row[c].y * key.y;
          dot.z += row[c].z * key.z, dot.w += row[c].w * key.w;
        }
        const int j = j0 + part + n;
        const bool visible = j < seqlen && (!is_causal || j <= i);
        p[n] = visible ? kScale * (dot.x + dot.y + dot.z + dot.w) : -INFINITY;
        top = fmaxf(top, p[n]);
      }
      const float shrink = __expf(before - top);
      sum *= shrink;
#pragma unroll
      for (int c = 0; c < kDim / 4; ++c) {
        output[c].x *= shrink, output[c].y *= shrink;
        output[c].z *= shrink, output[c].w *= shrink;
      }
#pragma unroll
      for (int n = 0; n < kChunk; ++n) {
        p[n] = __expf(p[n] - top);
        sum += p[n];
#pragma unroll
        for (int c = 0; c < kDim / 4; ++c) {
          const float4 value = tile_v[part + n][c];
          output[c].x += p[n] * value.x, output[c].y += p[n] * value.y;
          output[c].z += p[n] * value.z, output[c].w += p[n] * value.w;
        }
      }
    }
  }
  if (i >= seqlen) return;
  for (int c = 0; c < kDim / 4; ++c) {
    const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(output[c].x / sum, output[c].y / sum),
                                     __floats2bfloat162_rn(output[c].z / sum, output[c].w / sum)};
    reinterpret_cast<uint2*>(o)[c] = reinterpret_cast<const uint2&>(pairs);
  }
}
