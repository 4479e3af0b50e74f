// Step 3, tensor cores: one instruction multiplies 16 x 16 by 16 x 8 numbers.
//
// A warp takes 32 rows of q as two fragments of 16, so that each fragment of k or v serves two
// products. A product spreads over the lanes as the PTX ISA says (mma.m16n8k16): lane 4 g + t
// holds rows g and g + 8, columns 2 t and 2 t + 1. Two gifts lie in that layout: a row of scores
// stays within four lanes, so that its softmax takes two shuffles, and the accumulators of q k',
// rounded to bfloat16, are the operand of p v as they are, so that p never leaves the registers.
//
// Prediction. 256 products where step 2 took 16,384 multiply-adds. Softmax becomes the larger part:
// a lane has 4,096 / 32 = 128 scores, with some 15 instructions each (scale, mask, max, exp, sum):
// with products and addresses about 2,400. But a row of a tile is 128 bytes, the width of shared
// memory, so that the 8 rows which ldmatrix takes at once begin in the same bank: 64 ldmatrix, 32
// wavefronts each where 4 would do.
// Result. 2,398 instructions; 2,184 wavefronts, 336 would do. 352 sectors, as o is stored in pairs.
#include <cuda_bf16.h>

#include <cstdint>

constexpr int kDim = 64, kRows = 128, kKeys = 64, kThreads = 128;
constexpr float kScale = 0.125f;  // 1 / sqrt(kDim)

// Shared address of 8 columns of a tile (rows, kDim).
__device__ uint32_t at(const void* tile, uint32_t row, uint32_t chunk) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(tile)) + row * 128 + chunk * 16;
}

// Four matrices of 8 x 8; lane l gives the address of row l % 8 of matrix l / 8.
__device__ void load(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ void load_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d = a b + c
__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

__device__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// The first `rows` of kTileRows rows; the others are zero.
template <int kTileRows>
__device__ void copy_tile(void* tile, const __nv_bfloat16* from, int rows) {
  const int chunk = threadIdx.x % 8;
#pragma unroll
  for (int row = threadIdx.x / 8; row < kTileRows; row += kThreads / 8) {
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (row < rows) bits = reinterpret_cast<const uint4*>(from + row * kDim)[chunk];
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at(tile, row, chunk)),
                 "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
  }
}

// q, k, v, o: (heads, seqlen, kDim). Grid: (rows of q / kRows, heads).
extern "C" __global__ void __launch_bounds__(kThreads)
    attention(const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v,
              __nv_bfloat16* o, int seqlen, bool is_causal) {
  __shared__ __nv_bfloat16 tile_q[kRows][kDim], tile_k[kKeys][kDim], tile_v[kKeys][kDim];
  const int lane = threadIdx.x % 32, first = blockIdx.x * kRows, own = threadIdx.x / 32 * 32;
  const long long head = static_cast<long long>(blockIdx.y) * seqlen * kDim;
  q += head + first * kDim, k += head, v += head, o += head;

  copy_tile<kRows>(tile_q, q, seqlen - first);
  __syncthreads();
  uint32_t rows_q[4][2][4];  // 16 columns and 16 rows each
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      load(rows_q[step][m], at(tile_q, own + 16 * m + lane % 16, 2 * step + lane / 16));
    }
  }

  float output[2][8][4] = {}, top[2][2], sum[2][2] = {};  // of rows 16 m + 8 r + lane / 4
  top[0][0] = top[0][1] = top[1][0] = top[1][1] = -INFINITY;
  const int end = is_causal ? min(first + kRows, seqlen) : seqlen;
  for (int j0 = 0; j0 < end; j0 += kKeys) {
    __syncthreads();  // all have used the tiles before
    copy_tile<kKeys>(tile_k, k + j0 * kDim, seqlen - j0);
    copy_tile<kKeys>(tile_v, v + j0 * kDim, seqlen - j0);
    __syncthreads();  // the tiles are here

    float scores[2][8][4];
    float zero[4] = {};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int n = 0; n < 8; n += 2) {  // 16 keys: two operands of 8
        uint32_t b[4];
        load(b, at(tile_k, 8 * n + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply(scores[m][n], rows_q[step][m], b[0], b[1], step ? scores[m][n] : zero);
          multiply(scores[m][n + 1], rows_q[step][m], b[2], b[3], step ? scores[m][n + 1] : zero);
        }
      }
    }

#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = first + own + 16 * m + 8 * r + lane / 4;
        float now = top[m][r], terms = 0.0f;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int j = j0 + 8 * n + lane % 4 * 2 + e;
            float& x = scores[m][n][2 * r + e];
            x = j < seqlen && (!is_causal || j <= i) ? kScale * x : -INFINITY;
            now = fmaxf(now, x);
          }
        }
        now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
        now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = scores[m][n][2 * r + e];
            x = __expf(x - now);
            terms += x;
          }
        }
        terms += __shfl_xor_sync(~0u, terms, 1);
        terms += __shfl_xor_sync(~0u, terms, 2);
        const float shrink = __expf(top[m][r] - now);
        top[m][r] = now;
        sum[m][r] = sum[m][r] * shrink + terms;
#pragma unroll
        for (int d = 0; d < 8; ++d) {
          output[m][d][2 * r] *= shrink;
          output[m][d][2 * r + 1] *= shrink;
        }
      }
    }

#pragma unroll
    for (int step = 0; step < 4; ++step) {  // 16 keys
      uint32_t p[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const float (&left)[4] = scores[m][2 * step], (&right)[4] = scores[m][2 * step + 1];
        p[m][0] = pack(left[0], left[1]), p[m][1] = pack(left[2], left[3]);
        p[m][2] = pack(right[0], right[1]), p[m][3] = pack(right[2], right[3]);
      }
#pragma unroll
      for (int d = 0; d < 8; d += 2) {
        uint32_t b[4];
        load_transposed(b, at(tile_v, 16 * step + lane % 16, d + lane / 16));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply(output[m][d], p[m], b[0], b[1], output[m][d]);
          multiply(output[m][d + 1], p[m], b[2], b[3], output[m][d + 1]);
        }
      }
    }
  }

#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = first + own + 16 * m + 8 * r + lane / 4;
      if (i >= seqlen) continue;
      const float share = 1.0f / sum[m][r];
#pragma unroll
      for (int d = 0; d < 8; ++d) {
        reinterpret_cast<uint32_t*>(o + i * kDim)[4 * d + lane % 4] =
            pack(output[m][d][2 * r] * share, output[m][d][2 * r + 1] * share);
      }
    }
  }
}
