// Sums of squares of all gradients on CPU, in double precision: the norm that clipping needs.
#include "adam/cpu_operand.h"
#include "adam/kernels.h"
#include "common/parallel.h"

namespace fl::FL_ISA {
namespace {

constexpr int64_t kBlock = 1024;
constexpr int kSums = 16;  // independent sums, so that the additions overlap

double sum_of_squares(const AdamTensor& tensor, int64_t begin, int64_t end) {
  alignas(64) float buffer[kBlock];
  double sums[kSums] = {};
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t count = end - i < kBlock ? end - i : kBlock;
    const float* x = read_block(tensor, kGrad, i, count, buffer);
    int64_t j = 0;
    for (; j + kSums <= count; j += kSums) {
      for (int k = 0; k < kSums; ++k) {
        const double value = x[j + k];
        sums[k] += value * value;
      }
    }
    for (; j < count; ++j) sums[0] += static_cast<double>(x[j]) * x[j];
  }
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

}  // namespace

void grad_norm(const GradNorm& norm) {
  auto task = [&](int64_t task, int) {
    double sum = 0;
    for_each_stretch(norm.tensors, norm.starts, norm.count, task,
                     [&](int64_t index, int64_t begin, int64_t end) {
                       sum += sum_of_squares(norm.tensors[index], begin, end);
                     });
    norm.partial_sums[task] = sum;
  };
  parallel_tasks((norm.starts[norm.count] + kAdamTask - 1) / kAdamTask, task);
}

}  // namespace fl::FL_ISA
