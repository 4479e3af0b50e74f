// Threads and scratch memory for CPU kernels. Implemented in bindings/parallel.cpp on Torch's own
// pool, so that torch.set_num_threads holds here too.
#pragma once

#include <cstdint>

namespace fl {

int num_threads();

// body(context, begin, end) over disjoint ranges that cover [0, count), each at least `grain` long.
void parallel_ranges(int64_t count, int64_t grain,
                     void (*body)(void* context, int64_t begin, int64_t end), void* context);

// body(context, task, worker) for every task in [0, count), handed out in order, one at a time, to
// whichever worker is free; worker is in [0, num_threads()). For tasks of unequal length.
void parallel_tasks(int64_t count, void (*body)(void* context, int64_t task, int worker),
                    void* context);

// 64-byte aligned memory for the life of the object; contents undefined. Throws on failure.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* as(int64_t byte_offset = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(data_) + byte_offset);
  }

 private:
  void* data_;
};

}  // namespace fl

// The same for lambdas. Always inlined, so that code compiled for one instruction set is never
// shared with another.
namespace fl {

template <class F>
__attribute__((always_inline)) inline void parallel_ranges(int64_t count, int64_t grain, F& body) {
  parallel_ranges(
      count, grain, [](void* f, int64_t begin, int64_t end) { (*static_cast<F*>(f))(begin, end); },
      &body);
}

template <class F>
__attribute__((always_inline)) inline void parallel_tasks(int64_t count, F& body) {
  parallel_tasks(
      count, [](void* f, int64_t task, int worker) { (*static_cast<F*>(f))(task, worker); }, &body);
}

}  // namespace fl
