#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>

namespace fl {

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

namespace {

// An exception must not cross the C boundary of Torch's pool: keep the first one, rethrow it
// outside.
class FirstException {
 public:
  template <class F>
  void guard(F&& f) {
    try {
      f();
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!first_) first_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr first_;
};

}  // namespace

void parallel_ranges(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t),
                     void* context) {
  if (count <= 0) return;
  FirstException exception;
  torch::stable::parallel_for(0, count, grain < 1 ? 1 : grain, [&](int64_t begin, int64_t end) {
    exception.guard([&] { body(context, begin, end); });
  });
  exception.rethrow();
}

void parallel_tasks(int64_t count, void (*body)(void*, int64_t, int), void* context) {
  if (count <= 0) return;
  FirstException exception;
  std::atomic<int64_t> next{0};
  const int64_t workers = count < num_threads() ? count : num_threads();
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      exception.guard([&] {
        for (int64_t task = next++; task < count; task = next++) {
          body(context, task, static_cast<int>(worker));
        }
      });
    }
  });
  exception.rethrow();
}

Scratch::Scratch(int64_t bytes) {
  const size_t rounded = (static_cast<size_t>(bytes) + 63) / 64 * 64;
  data_ = std::aligned_alloc(64, rounded == 0 ? 64 : rounded);
  if (data_ == nullptr) throw std::bad_alloc();
}

Scratch::~Scratch() { std::free(data_); }

}  // namespace fl
