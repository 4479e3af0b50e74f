// Products of two matrices x, y of at most 32 x 64 numbers, by every way that fragments of them
// come from shared memory. One block of two warps; the first one multiplies.
#include "common/shared_tile.cuh"

using namespace fl;

template <class T>
struct Tiles {
  using In = SharedTile<T, 32, 64>;
  using Out = SharedTile<T, 64, 64>;
};

template <class T, int kM, int kN>
__device__ void write(uint32_t tile, const Accumulator (&d)[kM][2 * kN], int lane) {
  using Out = typename Tiles<T>::Out;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < 2 * kN; ++n) {
      Out::store(Out::lane_accumulator(tile, lane), 16 * m, n, d[m][n]);
    }
  }
}

// x y', both by rows.
template <class T>
__device__ void rows(uint32_t x, uint32_t y, Accumulator (&d)[2][4], int lane) {
  using In = typename Tiles<T>::In;
  const uint32_t lane_x = In::lane_a(x, lane), lane_y = In::lane_b(y, lane);
#pragma unroll
  for (int step = 0; step < 64 / kDepth<T>; ++step) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      FragmentA<T> a;
      In::load_a(a, lane_x, step, 16 * m);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        FragmentB<T> b[2];
        In::load_b(b, lane_y, step, 16 * n);
        mma<T>(d[m][2 * n], a, b[0], d[m][2 * n]);
        mma<T>(d[m][2 * n + 1], a, b[1], d[m][2 * n + 1]);
      }
    }
  }
}

// x' y, both across rows.
template <class T, Order kOrder>
__device__ void across(uint32_t x, uint32_t y, Accumulator (&d)[4][8], int lane) {
  using In = typename Tiles<T>::In;
  const uint32_t lane_x = In::template lane_a_transposed<kOrder>(x, lane);
  const uint32_t lane_y = In::template lane_b_transposed<kOrder>(y, lane);
#pragma unroll
  for (int row = 0; row < 32; row += kDepth<T>) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      FragmentA<T> a;
      In::template load_a_transposed<kOrder>(a, lane_x, m, row);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        FragmentB<T> b[2];
        In::template load_b_transposed<kOrder>(b, lane_y, n, row);
        mma<T>(d[m][2 * n], a, b[0], d[m][2 * n]);
        mma<T>(d[m][2 * n + 1], a, b[1], d[m][2 * n + 1]);
      }
    }
  }
}

// a y, y across rows; load_a(fragment, step, m).
template <class T, Order kOrder, class LoadA>
__device__ void mixed(uint32_t y, Accumulator (&d)[2][8], int lane, LoadA load_a) {
  using In = typename Tiles<T>::In;
  const uint32_t lane_y = In::template lane_b_transposed<kOrder>(y, lane);
#pragma unroll
  for (int step = 0; step < 32 / kDepth<T>; ++step) {
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      FragmentA<T> a;
      load_a(a, step, m);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        FragmentB<T> b[2];
        In::template load_b_transposed<kOrder>(b, lane_y, n, step * kDepth<T>);
        mma<T>(d[m][2 * n], a, b[0], d[m][2 * n]);
        mma<T>(d[m][2 * n + 1], a, b[1], d[m][2 * n + 1]);
      }
    }
  }
}

template <class T>
__device__ void products(const T* x, const T* y, T* out, int rows_, int columns, int stride,
                         int what) {
  using In = typename Tiles<T>::In;
  using Out = typename Tiles<T>::Out;
  __shared__ __align__(128) uint8_t memory[2 * In::kBytes + Out::kBytes];
  const int thread = threadIdx.x, lane = thread % 32;
  const uint32_t sx = shared_address(memory), sy = sx + In::kBytes, sz = sy + In::kBytes;
  TileCopy<In, 64, T>(sx, x, stride, 0, rows_, columns, thread).next();
  TileCopy<In, 64, T>(sy, y, stride, 0, rows_, columns, thread).next();
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  if (thread < 32) {
    if (what == 0) {
      Accumulator d[2][4] = {};
      rows<T>(sx, sy, d, lane);
      write<T, 2, 2>(sz, d, lane);
    } else if (what == 1 || what == 2) {
      Accumulator d[4][8] = {};
      what == 1 ? across<T, Order::kStraight>(sx, sy, d, lane)
                : across<T, Order::kPaired>(sx, sy, d, lane);
      write<T, 4, 4>(sz, d, lane);
    } else {
      Accumulator d[2][8] = {}, scores[2][4] = {};
      if (what == 3) {
        mixed<T, Order::kStraight>(sy, d, lane, [&](FragmentA<T>& a, int step, int m) {
          In::load_a(a, In::lane_a(sx, lane), step, 16 * m);
        });
      } else {
        rows<T>(sx, sy, scores, lane);
        mixed<T, Order::kPaired>(sy, d, lane, [&](FragmentA<T>& a, int step, int m) {
          to_fragment_a<T>(a, &scores[m][step * kDepth<T> / 8]);
        });
      }
      write<T, 2, 4>(sz, d, lane);
    }
  }
  __syncthreads();
  const int height = what == 1 || what == 2 ? 64 : 32, width = what == 0 ? 32 : 64;
  for (int i = thread; i < height * width; i += 64) {
    constexpr int kChunk = 16 / sizeof(T);
    const int row = i / width, column = i % width;
    const uint32_t at = Out::at(row, column / kChunk) + column % kChunk * sizeof(T);
    out[i] = *reinterpret_cast<const T*>(memory + 2 * In::kBytes + at);
  }
}

#define FL_KERNEL(name, T)                                                               \
  extern "C" __global__ void name(const T* x, const T* y, T* out, int rows, int columns, \
                                  int stride, int what) {                                \
    if constexpr (kHasMma<T>) products<T>(x, y, out, rows, columns, stride, what);       \
  }
FL_KERNEL(products_float16, __half)
FL_KERNEL(products_bfloat16, __nv_bfloat16)
FL_KERNEL(products_float32, float)
FL_KERNEL(products_tf32, Tf32)
