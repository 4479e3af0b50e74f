// The row sums of p dp on CPU, where do . o is not exact enough.
#include "attention/cpu_backward.h"
#include "attention/cpu_gradient.h"
#include "common/dispatch.h"
#include "common/parallel.h"

namespace fl::FL_ISA {
namespace {

constexpr int64_t kChunk = 4 * kGradientTileM;  // queries per task

template <class T>
class DeltasWorker {
 public:
  DeltasWorker(const AttentionBackward& p, Arena& arena)
      : p_(p),
        f_(p.forward),
        queries_(p, kChunk, false, nullptr, arena),
        keys_(f_, arena),
        tile_(f_, arena) {}

  void run(int64_t b, int64_t head, int64_t first, float* deltas);

 private:
  const AttentionBackward& p_;
  const AttentionForward& f_;
  QueryChunk<T> queries_;
  KeyBlock<T> keys_;
  GradientTile<T> tile_;
};

template <class T>
void DeltasWorker<T>::run(int64_t b, int64_t head, int64_t first, float* deltas) {
  const Sequence seq(f_, b);
  const int64_t end = least(first + kChunk, seq.seqlen_q);
  if (first >= end) return;
  queries_.load(b, seq, head, first, end);
  for (int64_t r = 0; r < queries_.count; ++r) queries_.delta[r] = -queries_.dlse[r];
  ScoreRules rules(f_, b, seq);
  for (int64_t j0 = 0; j0 < seq.seqlen_k; j0 += kBlockN) {
    keys_.load(b, seq, head / (f_.heads_q / f_.heads_k), j0);
    rules.begin_block(head, j0);
    for (int64_t r0 = 0; r0 < queries_.count; r0 += kGradientTileM) {
      const Columns columns = tile_.columns_of(queries_, r0, j0);
      if (columns.begin >= columns.end) continue;
      tile_.products(queries_, r0, keys_, j0, columns, rules);
      tile_.add_deltas(queries_, r0, b, j0, columns, rules.score_scale());
    }
  }
  for (int64_t r = 0; r < queries_.count; ++r) deltas[r] = queries_.delta[r];
}

template <class T>
void deltas_of(const AttentionBackward& p, float* deltas) {
  const AttentionForward& f = p.forward;
  Arena sizes;
  const DeltasWorker<T> measured(p, sizes);
  const int64_t worker_bytes = round_up(sizes.used, 4096) + 64;
  const Scratch memory(worker_bytes * num_threads());
  const int64_t chunks = (f.seqlen_q + kChunk - 1) / kChunk;
  auto find = [&](int64_t task, int worker) {
    Arena arena{memory.as<char>(worker * worker_bytes)};
    const int64_t bh = task / chunks, first = task % chunks * kChunk;
    DeltasWorker<T>(p, arena).run(bh / f.heads_q, bh % f.heads_q, first,
                                  deltas + bh * f.seqlen_q + first);
  };
  parallel_tasks(f.batch * f.heads_q * chunks, find);
}

}  // namespace

void attention_deltas(const AttentionBackward& p, float* deltas) {
  with_dtype(p.forward.dtype,
             [&](auto type) { deltas_of<typename decltype(type)::type>(p, deltas); });
}

}  // namespace fl::FL_ISA
