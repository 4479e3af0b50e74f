// State spaces: constants, variables, parameters, dynamic shared and generic addresses.
#include <cstdint>

__constant__ int table[4] = {10, 20, 30, 40};
__constant__ int zeros[3];
__device__ int counter = 7;
__device__ __align__(64) float line[4] = {1.5f, 2.5f, 3.5f, 4.5f};
__device__ int* pointer = &counter;

struct Mixed {
  char small;
  double real;
  short pair[3];
  const int* data;
};

extern "C" __global__ void constants(int* out) {
  const int i = threadIdx.x;
  out[i] = table[i % 4] + zeros[i % 3] + static_cast<int>(line[i % 4] * 2) * 100;
  if (i == 0) out[32] = (reinterpret_cast<uintptr_t>(line) % 64 == 0) + *pointer * 2;
}
extern "C" __global__ void count(int* out) { out[threadIdx.x] = atomicAdd(&counter, 1); }

extern "C" __global__ void parameters(char a, short b, int c, long long d, float e, double f,
                                      Mixed m, double* out) {
  out[0] = a;
  out[1] = b;
  out[2] = c;
  out[3] = d;
  out[4] = e;
  out[5] = f;
  out[6] = m.small;
  out[7] = m.real;
  out[8] = m.pair[2];
  out[9] = m.data[1];
}

// One function for memory of every kind.
__device__ __noinline__ int read(const int* from, int i) { return from[i]; }

extern "C" __global__ void generic(const int* global, int* out) {
  __shared__ int shared[32];
  int local[4] = {1, 2, 3, 4};
  const int i = threadIdx.x;
  shared[i] = 1000 * i;
  local[i % 4] += i;
  const int* from = i % 4 == 0 ? global : i % 4 == 1 ? shared : i % 4 == 2 ? local : table;
  out[i] = read(from, i % 4 == 0 ? i : i % 4);
  out[32 + i] = __isShared(from) * 4 + __isLocal(from) * 2 + __isGlobal(from);
}

extern "C" __global__ void two_arrays(float* out) {
  extern __shared__ double dynamic[];
  __shared__ float fixed[33];
  const int i = threadIdx.x;
  fixed[i] = i;
  dynamic[i] = 2 * i;
  __syncthreads();
  out[i] = fixed[31 - i] + static_cast<float>(dynamic[i]);
}

template <class T>
__device__ T cas_add(T* at, T value) {
  T old = *at, seen;
  do {
    seen = old;
    old = atomicCAS(at, seen, seen + value);
  } while (old != seen);
  return old;
}
extern "C" __global__ void spin_sum(unsigned* at) { cas_add(at, threadIdx.x); }
extern "C" __global__ void shared_sums(unsigned* out, float* real) {
  __shared__ unsigned s[2];
  __shared__ float f;
  if (threadIdx.x < 2) s[threadIdx.x] = 0;
  if (threadIdx.x == 0) f = 0;
  __syncthreads();
  atomicAdd(&s[threadIdx.x % 2], threadIdx.x);
  atomicAdd(&f, 0.5f);
  __syncthreads();
  if (threadIdx.x < 2) out[threadIdx.x] = s[threadIdx.x];
  if (threadIdx.x == 2) *real = f;
}
