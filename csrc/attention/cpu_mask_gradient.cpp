// Gradient of an additive attention mask on CPU. Every element of the mask's own shape belongs to
// one task, which recomputes the score gradients that end there: no atomics, always the same sums.
#include "attention/cpu_backward.h"
#include "attention/cpu_gradient.h"
#include "common/dispatch.h"
#include "common/parallel.h"

namespace fl::FL_ISA {
namespace {

// A dimension of the scores as tasks see it: where the mask is broadcast, one task takes all of it.
struct Extent {
  int64_t size, step;
  int64_t count() const { return (size + step - 1) / step; }
};

struct MaskGradientPlan {
  Extent batch, heads, queries, keys;

  explicit MaskGradientPlan(const AttentionBackward& p) {
    const AttentionForward& f = p.forward;
    const auto own = [](int64_t stride, int64_t size, int64_t step) {
      return Extent{size, stride == 0 ? most(size, 1) : step};
    };
    batch = own(p.dmask_stride_b, f.batch, 1);
    heads = own(p.dmask_stride_h, f.heads_q, 1);
    queries = own(p.dmask_stride_q, f.seqlen_q, 4 * kGradientTileM);
    keys = own(p.dmask_stride_k, f.seqlen_k, kBlockN);
  }
  int64_t tasks() const { return batch.count() * heads.count() * queries.count() * keys.count(); }
};

template <class T>
class MaskGradientWorker {
 public:
  MaskGradientWorker(const AttentionBackward& p, const MaskGradientPlan& plan, const RowSums& sums,
                     Arena& arena)
      : p_(p),
        f_(p.forward),
        plan_(plan),
        queries_(p, 4 * kGradientTileM, false, sums, arena),
        keys_(f_, arena),
        tile_(f_, arena) {}

  void run(int64_t task);

 private:
  void chunk(int64_t b, int64_t head, int64_t first, int64_t j_begin, int64_t j_end);
  void add_tile(int64_t b, int64_t r0, int64_t j0, const Columns& columns);

  const AttentionBackward& p_;
  const AttentionForward& f_;
  const MaskGradientPlan& plan_;
  QueryChunk<T> queries_;
  KeyBlock<T> keys_;
  GradientTile<T> tile_;
};

template <class T>
void MaskGradientWorker<T>::run(int64_t task) {
  const int64_t j_task = task % plan_.keys.count();
  const int64_t i_task = task / plan_.keys.count() % plan_.queries.count();
  const int64_t bh_task = task / plan_.keys.count() / plan_.queries.count();
  const int64_t h0 = bh_task % plan_.heads.count() * plan_.heads.step;
  const int64_t b0 = bh_task / plan_.heads.count() * plan_.batch.step;
  const int64_t i0 = i_task * plan_.queries.step, j0 = j_task * plan_.keys.step;
  const int64_t i_end = least(i0 + plan_.queries.step, f_.seqlen_q);
  for (int64_t b = b0; b < b0 + plan_.batch.step; ++b) {
    for (int64_t h = h0; h < h0 + plan_.heads.step; ++h) {
      for (int64_t i = i0; i < i_end; i += 4 * kGradientTileM) {
        chunk(b, h, i, j0, least(j0 + plan_.keys.step, f_.seqlen_k));
      }
    }
  }
}

template <class T>
void MaskGradientWorker<T>::chunk(int64_t b, int64_t head, int64_t first, int64_t j_begin,
                                  int64_t j_end) {
  const Sequence seq(f_, b);
  queries_.load(b, seq, head, first, least(first + 4 * kGradientTileM, seq.seqlen_q));
  ScoreRules rules(f_, b, seq);
  for (int64_t j0 = j_begin; j0 < j_end; j0 += kBlockN) {
    keys_.load(b, seq, head / (f_.heads_q / f_.heads_k), j0);
    rules.begin_block(head, j0);
    for (int64_t r0 = 0; r0 < queries_.count; r0 += kGradientTileM) {
      const Columns columns = tile_.columns_of(queries_, r0, j0);
      if (columns.begin >= columns.end) continue;
      tile_.products(queries_, r0, keys_, j0, columns, rules);
      tile_.score_gradient(queries_, r0, b, j0, columns, rules.score_scale());
      add_tile(b, r0, j0, columns);
    }
  }
}

// Sums of one tile first: they keep the long sums over broadcast dimensions accurate.
template <class T>
void MaskGradientWorker<T>::add_tile(int64_t b, int64_t r0, int64_t j0, const Columns& columns) {
  const int64_t rows = least(kGradientTileM, queries_.count - r0);
  const int64_t end = least(columns.end, f_.seqlen_k - j0);
  const auto target = [&](int64_t r, int64_t c) {
    const QueryRow& row = queries_.rows[r0 + r];
    return p_.dmask + b * p_.dmask_stride_b + row.head * p_.dmask_stride_h +
           row.query * p_.dmask_stride_q + (j0 + c) * p_.dmask_stride_k;
  };
  float* ds = tile_.dp;
  if (p_.dmask_stride_q == 0) {
    for (int64_t r = 1; r < rows; ++r) {
      for (int c = columns.begin; c < columns.end; c += kLanes) {
        store(ds + c, load(ds + c) + load(ds + r * kBlockN + c));
      }
    }
  }
  for (int64_t r = 0; r < (p_.dmask_stride_q == 0 ? 1 : rows); ++r) {
    const float* row = ds + r * kBlockN;
    if (p_.dmask_stride_k == 0) {
      float sum = 0.0f;
      for (int64_t c = columns.begin; c < end; ++c) sum += row[c];
      *target(r, 0) += sum;
    } else {
      for (int64_t c = columns.begin; c < end; ++c) *target(r, c) += row[c];
    }
  }
}

template <class T>
void mask_gradient(const AttentionBackward& p, const RowSums& sums) {
  const MaskGradientPlan plan(p);
  Arena sizes;
  const MaskGradientWorker<T> measured(p, plan, sums, sizes);
  const int64_t worker_bytes = round_up(sizes.used, 4096) + 64;
  const Scratch memory(worker_bytes * num_threads());
  auto differentiate = [&](int64_t task, int worker) {
    [[maybe_unused]] const TileRegisters registers;
    Arena arena{memory.as<char>(worker * worker_bytes)};
    MaskGradientWorker<T>(p, plan, sums, arena).run(task);
  };
  parallel_tasks(plan.tasks(), differentiate);
}

}  // namespace

void attention_mask_gradient(const AttentionBackward& p, const RowSums& sums) {
  const AttentionForward& f = p.forward;
  if (f.seqlen_q == 0 || f.seqlen_k == 0) return;
  with_dtype(f.dtype, [&](auto type) { mask_gradient<typename decltype(type)::type>(p, sums); });
}

}  // namespace fl::FL_ISA
