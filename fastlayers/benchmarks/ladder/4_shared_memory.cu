// Step 4, shared memory: no conflicts, and copies that run beside the work.
//
// The 16-byte chunks of a row are swizzled: chunk c of row r stands at c ^ (r % 8). ldmatrix reads
// the same chunk of 8 rows, which now lies in 8 different groups of banks; whoever writes a row
// still writes all 128 bytes of it. Copies are cp.async, from global to shared memory past the
// registers: v is on its way during q k', the next k during p v. The tile of q is free once its
// fragments are loaded, and takes the output, so that global memory gets whole rows of it.
//
// Prediction. Wavefronts fall to the minimum: 64 * 4 for ldmatrix, 64 for copies of k and v, 32 for
// q and o on their ways in and out: 352. Sectors fall to 320: k and v 256, q and o 64. Instructions
// stay about the same; that memory's latency is hidden, the point of cp.async, no count shows.
// Result. 352 wavefronts, 320 sectors; 2,617 instructions, 9% more than step 3, because a swizzled
// address is more arithmetic than a plain one.
#include <cuda_bf16.h>

#include <cstdint>

constexpr int kDim = 64, kRows = 128, kKeys = 64, kThreads = 128;
constexpr float kScale = 0.125f;  // 1 / sqrt(kDim)

// Shared address of 8 columns of a tile (rows, kDim).
__device__ uint32_t at(const void* tile, uint32_t row, uint32_t chunk) {
  const uint32_t place = chunk ^ row % 8;
  return static_cast<uint32_t>(__cvta_generic_to_shared(tile)) + row * 128 + place * 16;
}

// The address `chunk` chunks to the right, where the first is even, and `row` rows below, a
// multiple of 8. As to add a constant is part of the instruction, it costs one XOR at most.
__device__ uint32_t further(uint32_t address, int row, int chunk) {
  return (address ^ chunk * 16) + row * 128;
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

// The first `rows` of kTileRows rows, some time later; the others are zero, and not read.
template <int kTileRows>
__device__ void copy_tile(void* tile, const __nv_bfloat16* from, int rows) {
  const int chunk = threadIdx.x % 8;
#pragma unroll
  for (int row = threadIdx.x / 8; row < kTileRows; row += kThreads / 8) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at(tile, row, chunk)),
                 "l"(from + row * kDim + chunk * 8), "r"(row < rows ? 16 : 0)
                 : "memory");
  }
}

// All copies of all threads have arrived, and all threads have come here.
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
}

// q, k, v, o: (heads, seqlen, kDim). Grid: (rows of q / kRows, heads).
extern "C" __global__ void __launch_bounds__(kThreads)
    attention(const __nv_bfloat16* q, const __nv_bfloat16* k, const __nv_bfloat16* v,
              __nv_bfloat16* o, int seqlen, bool is_causal) {
  __shared__ __align__(128) __nv_bfloat16 tile_q[kRows][kDim], tile_k[kKeys][kDim],
      tile_v[kKeys][kDim];
  const int lane = threadIdx.x % 32, first = blockIdx.x * kRows, own = threadIdx.x / 32 * 32;
  const long long head = static_cast<long long>(blockIdx.y) * seqlen * kDim;
  q += head + first * kDim, k += head, v += head, o += head;

  copy_tile<kRows>(tile_q, q, seqlen - first);
  copy_tile<kKeys>(tile_k, k, seqlen);
  wait_for_copies();
  const uint32_t lane_q = at(tile_q, own + lane % 16, lane / 16);
  const uint32_t lane_k = at(tile_k, lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const uint32_t lane_v = at(tile_v, lane % 16, lane / 16);
  uint32_t rows_q[4][2][4];  // 16 columns and 16 rows each
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      load(rows_q[step][m], further(lane_q, 16 * m, 2 * step));
    }
  }

  float output[2][8][4] = {}, top[2][2], sum[2][2] = {};  // of rows 16 m + 8 r + lane / 4
  top[0][0] = top[0][1] = top[1][0] = top[1][1] = -INFINITY;
  const int end = is_causal ? min(first + kRows, seqlen) : seqlen;
  for (int j0 = 0; j0 < end; j0 += kKeys) {
    wait_for_copies();  // k is here; v has been used by all
    copy_tile<kKeys>(tile_v, v + j0 * kDim, seqlen - j0);

    float scores[2][8][4];
    float zero[4] = {};
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int n = 0; n < 8; n += 2) {  // 16 keys: two operands of 8
        uint32_t b[4];
        load(b, further(lane_k, 8 * n, 2 * step));
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

    wait_for_copies();  // v is here; k has been used by all
    if (j0 + kKeys < end) copy_tile<kKeys>(tile_k, k + (j0 + kKeys) * kDim, seqlen - j0 - kKeys);
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
        load_transposed(b, further(lane_v, 16 * step, d));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply(output[m][d], p[m], b[0], b[1], output[m][d]);
          multiply(output[m][d + 1], p[m], b[2], b[3], output[m][d + 1]);
        }
      }
    }
  }

  // A warp's rows of tile_q are its own: no other has read them, none will.
  const uint32_t lane_o = at(tile_q, own + lane / 4, 0) + lane % 4 * 4;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float share = 1.0f / sum[m][r];
#pragma unroll
      for (int d = 0; d < 8; ++d) {
        const uint32_t pair = pack(output[m][d][2 * r] * share, output[m][d][2 * r + 1] * share);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(further(lane_o, 16 * m + 8 * r, d)), "r"(pair)
                     : "memory");
      }
    }
  }
  __syncwarp();
  const int chunk = lane % 8;
#pragma unroll
  for (int row = own + lane / 8; row < own + 32; row += 4) {
    uint4 bits;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "r"(at(tile_q, row, chunk))
                 : "memory");
    if (first + row < seqlen) reinterpret_cast<uint4*>(o + (first + row) * kDim)[chunk] = bits;
  }
}
