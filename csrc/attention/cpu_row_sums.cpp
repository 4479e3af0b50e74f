// What the backward on CPU needs of every row before its first tile, where do . o and the rounded
// lse are not exact enough.
#include "attention/cpu_backward.h"
#include "attention/cpu_gradient.h"
#include "common/dispatch.h"
#include "common/parallel.h"

namespace fl::FL_ISA {
namespace {

constexpr int64_t kChunk = 4 * kGradientTileM;  // queries per task

template <class T>
class RowSumsWorker {
 public:
  RowSumsWorker(const AttentionBackward& p, Arena& arena)
      : p_(p),
        f_(p.forward),
        queries_(p, kChunk, false, RowSums{}, arena),
        keys_(f_, arena),
        tile_(f_, arena) {}

  void run(int64_t b, int64_t head, int64_t first, const RowSums& out);

 private:
  const AttentionBackward& p_;
  const AttentionForward& f_;
  QueryChunk<T> queries_;
  KeyBlock<T> keys_;
  GradientTile<T> tile_;
};

template <class T>
void RowSumsWorker<T>::run(int64_t b, int64_t head, int64_t first, const RowSums& out) {
  const Sequence seq(f_, b);
  const int64_t end = least(first + kChunk, seq.seqlen_q);
  if (first >= end) return;
  queries_.load(b, seq, head, first, end);
  alignas(64) float sums[kChunk] = {}, dots[kChunk] = {};
  ScoreRules rules(f_, b, seq);
  for (int64_t j0 = 0; j0 < seq.seqlen_k; j0 += kBlockN) {
    keys_.load(b, seq, head / (f_.heads_q / f_.heads_k), j0);
    rules.begin_block(head, j0);
    for (int64_t r0 = 0; r0 < queries_.count; r0 += kGradientTileM) {
      const Columns columns = tile_.columns_of(queries_, r0, j0);
      if (columns.begin >= columns.end) continue;
      tile_.products(queries_, r0, keys_, j0, columns, rules);
      tile_.add_sums(queries_, r0, b, j0, columns, rules.score_scale(), sums + r0, dots + r0);
    }
  }
  const int64_t at = (b * f_.heads_q + head) * f_.seqlen_q + first;
  for (int64_t r = 0; r < queries_.count; ++r) {
    const float sum = sums[r] + queries_.p_sink[r];
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    out.normalizer[at + r] = inverse;
    out.delta[at + r] = dots[r] * inverse - queries_.dlse[r];
  }
}

template <class T>
void find_row_sums(const AttentionBackward& p, const RowSums& out) {
  const AttentionForward& f = p.forward;
  Arena sizes;
  const RowSumsWorker<T> measured(p, sizes);
  const int64_t worker_bytes = round_up(sizes.used, 4096) + 64;
  const Scratch memory(worker_bytes * num_threads());
  const int64_t chunks = (f.seqlen_q + kChunk - 1) / kChunk;
  auto find = [&](int64_t task, int worker) {
    [[maybe_unused]] const TileRegisters registers;
    Arena arena{memory.as<char>(worker * worker_bytes)};
    const int64_t bh = task / chunks, first = task % chunks * kChunk;
    RowSumsWorker<T>(p, arena).run(bh / f.heads_q, bh % f.heads_q, first, out);
  };
  parallel_tasks(f.batch * f.heads_q * chunks, find);
}

}  // namespace

void attention_row_sums(const AttentionBackward& p, const RowSums& out) {
  with_dtype(p.forward.dtype,
             [&](auto type) { find_row_sums<typename decltype(type)::type>(p, out); });
}

}  // namespace fl::FL_ISA
