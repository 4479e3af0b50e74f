// Moves blocks of an operand between its own dtype and layout and dense float32. Only for
// cpu_*.cpp.
#pragma once

#include "adam/params.h"
#include "common/simd.h"

namespace fl::FL_ISA {

// f(offset, run) for runs of elements begin, begin + 1, ... along the innermost dimension; `offset`
// is the first one's place in memory, in elements.
template <class F>
FL_INLINE void for_each_run(const AdamLayout& layout, int operand, int64_t begin, int64_t count,
                            F&& f) {
  const int64_t* strides = layout.strides[operand];
  int64_t index[kAdamMaxDims];
  int64_t offset = 0;
  for (int d = layout.dims - 1; d >= 0; --d) {
    index[d] = begin % layout.sizes[d];
    begin /= layout.sizes[d];
    offset += index[d] * strides[d];
  }
  const int inner = layout.dims - 1;
  while (count > 0) {
    const int64_t left = layout.sizes[inner] - index[inner];
    const int64_t run = left < count ? left : count;
    f(offset, run);
    count -= run;
    offset -= index[inner] * strides[inner];
    index[inner] = 0;
    for (int d = inner - 1; d >= 0; --d) {
      offset += strides[d];
      if (++index[d] < layout.sizes[d]) break;
      offset -= layout.sizes[d] * strides[d];
      index[d] = 0;
    }
  }
}

template <class T>
FL_INLINE void widen(const T* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(in + i));
  if (i < count) {
    const Mask tail = first_lanes(static_cast<int>(count - i));
    store(out + i, load(in + i, tail), tail);
  }
}

template <class T>
FL_INLINE void narrow(const float* in, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(in + i));
  if (i < count) {
    const Mask tail = first_lanes(static_cast<int>(count - i));
    store(out + i, load(in + i, tail), tail);
  }
}

// Elements begin .. begin + count of the operand as float32, in `out`.
template <class T>
FL_INLINE void gather(const AdamTensor& tensor, int operand, int64_t begin, int64_t count,
                      float* out) {
  const T* data = static_cast<const T*>(tensor.data[operand]);
  if (tensor.layout == nullptr || tensor.layout->dense[operand]) {
    return widen(data + begin, count, out);
  }
  const int64_t stride = tensor.layout->strides[operand][tensor.layout->dims - 1];
  for_each_run(*tensor.layout, operand, begin, count, [&](int64_t offset, int64_t run) {
    if (stride == 1) {
      widen(data + offset, run, out);
    } else {
      for (int64_t i = 0; i < run; ++i) widen(data + offset + i * stride, 1, out + i);
    }
    out += run;
  });
}

// And back, rounding to nearest even.
template <class T>
FL_INLINE void scatter(const AdamTensor& tensor, int operand, int64_t begin, int64_t count,
                       const float* in) {
  T* data = static_cast<T*>(tensor.data[operand]);
  if (tensor.layout == nullptr || tensor.layout->dense[operand]) {
    return narrow(in, count, data + begin);
  }
  const int64_t stride = tensor.layout->strides[operand][tensor.layout->dims - 1];
  for_each_run(*tensor.layout, operand, begin, count, [&](int64_t offset, int64_t run) {
    if (stride == 1) {
      narrow(in, run, data + offset);
    } else {
      for (int64_t i = 0; i < run; ++i) narrow(in + i, 1, data + offset + i * stride);
    }
    in += run;
  });
}

inline bool is_direct(const AdamTensor& tensor, int operand) {
  return tensor.dtype[operand] == DType::kFloat32 &&
         (tensor.layout == nullptr || tensor.layout->dense[operand]);
}

// A dense float32 view of the elements: the operand's own memory where that is what it is, else
// `buffer`, filled.
inline float* read_block(const AdamTensor& tensor, int operand, int64_t begin, int64_t count,
                         float* buffer) {
  if (tensor.data[operand] == nullptr) return nullptr;
  if (is_direct(tensor, operand)) return static_cast<float*>(tensor.data[operand]) + begin;
  switch (tensor.dtype[operand]) {
    case DType::kFloat32:
      gather<float>(tensor, operand, begin, count, buffer);
      break;
    case DType::kFloat16:
      gather<Half>(tensor, operand, begin, count, buffer);
      break;
    case DType::kBFloat16:
      gather<BFloat16>(tensor, operand, begin, count, buffer);
      break;
  }
  return buffer;
}

// Puts a block back that read_block gave: nothing to do where it is the operand's own memory.
inline void write_block(const AdamTensor& tensor, int operand, int64_t begin, int64_t count,
                        const float* block) {
  if (is_direct(tensor, operand)) return;
  switch (tensor.dtype[operand]) {
    case DType::kFloat32:
      return scatter<float>(tensor, operand, begin, count, block);
    case DType::kFloat16:
      return scatter<Half>(tensor, operand, begin, count, block);
    case DType::kBFloat16:
      return scatter<BFloat16>(tensor, operand, begin, count, block);
  }
}

// f(tensor, begin, end) for the stretch of every tensor that lies in task number `task`.
template <class F>
FL_INLINE void for_each_stretch(const AdamTensor* tensors, const int64_t* starts, int64_t count,
                                int64_t task, F&& f) {
  const int64_t task_begin = task * kAdamTask, task_end = task_begin + kAdamTask;
  int64_t low = 0, high = count;  // the last tensor with starts[low] <= task_begin
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (starts[middle] <= task_begin ? low : high) = middle;
  }
  for (int64_t t = low; t < count && starts[t] < task_end; ++t) {
    const int64_t begin = task_begin > starts[t] ? task_begin - starts[t] : 0;
    const int64_t end =
        task_end - starts[t] < tensors[t].numel ? task_end - starts[t] : tensors[t].numel;
    if (begin < end) f(t, begin, end);
  }
}

}  // namespace fl::FL_ISA
