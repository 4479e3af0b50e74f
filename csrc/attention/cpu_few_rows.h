// Attention of a few queries: keys and values are read once, as they lie, where packing them would
// cost more than it saves. Only for cpu_*.cpp.
#pragma once

#include "attention/cpu_tile.h"

namespace fl::FL_ISA {

constexpr int kKeysAtOnce = 16;  // whose weighted values are summed before they are added to o

// s[c] = q . k, k being the row at keys[c]. q: dim elements and zeros up to whole vectors.
template <class Q, class T>
FL_INLINE void dot_keys(const Q* q, int64_t dim, const T* const* keys, int count, float* s) {
  const int64_t whole = round_down(dim, kLanes);
  const Mask tail = first_lanes(static_cast<int>(dim - whole));
  for (int c = 0; c < count; ++c) {
    Vec sum = 0.0f;
    for (int64_t d = 0; d < whole; d += kLanes) sum = fma(load(q + d), load(keys[c] + d), sum);
    if (whole < dim) sum = fma(load(q + whole), load(keys[c] + whole, tail), sum);
    s[c] = reduce_add(sum);
  }
}

// o[0 : kVecs vectors] = decay o + sum_c weights[c] v, v being at values[c] + d.
template <int kVecs, class T>
FL_INLINE void add_vectors(const float* weights, int64_t d, Mask last, const T* const* values,
                           int count, float decay, float* o) {
  Vec sum[kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) sum[v] = Vec(0.0f);
  for (int c = 0; c < count; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const T* from = values[c] + d + v * kLanes;
      sum[v] = fma(Vec(weights[c]), kVecs == 1 ? load(from, last) : load(from), sum[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) {
    float* at = o + d + v * kLanes;
    store(at, fma(load(at), Vec(decay), sum[v]));
  }
}

// o = decay o + sum_c p[c] v, v being the row at values[c].
template <class P, class T>
FL_INLINE void add_values(const P* p, int64_t dim, const T* const* values, int count, float decay,
                          float* o) {
  alignas(64) float weights[kKeysAtOnce];
  for (int c = 0; c < kKeysAtOnce; c += kLanes) store(weights + c, load(p + c));
  const Mask all = first_lanes(kLanes);
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) {
    add_vectors<4>(weights, d, all, values, count, decay, o);
  }
  for (; d < dim; d += kLanes) {
    const Mask last = first_lanes(static_cast<int>(least(dim - d, kLanes)));
    add_vectors<1>(weights, d, last, values, count, decay, o);
  }
}

}  // namespace fl::FL_ISA
