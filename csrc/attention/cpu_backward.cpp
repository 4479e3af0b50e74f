// Attention backward on CPU: for each block of keys the queries stream past; dk and dv of the block
// and dq of the head are added up in float32.
#include "attention/cpu_backward.h"

#include "attention/cpu_gradient.h"
#include "attention/kernels.h"
#include "common/dispatch.h"
#include "common/parallel.h"

namespace fl::FL_ISA {
namespace {

// One task is one key head's query heads against one part of its keys. Each part has its own dq,
// added up afterwards in order.
struct BackwardPlan {
  int64_t group, splits, blocks_per_split, tasks;

  explicit BackwardPlan(const AttentionForward& p) {
    const int64_t workers = p.deterministic ? 16 : num_threads();  // no dependence on the machine
    const int64_t heads = p.batch * p.heads_k, blocks = (p.seqlen_k + kBlockN - 1) / kBlockN;
    group = p.heads_q / p.heads_k;
    const bool balanced = heads % workers == 0 || heads >= 4 * workers;
    const int64_t wanted = balanced ? 1 : (4 * workers + heads - 1) / heads;
    blocks_per_split = most(1, (blocks + wanted - 1) / wanted);
    splits = most(1, (blocks + blocks_per_split - 1) / blocks_per_split);
    tasks = heads * splits;
  }
};

template <class T>
class BackwardWorker {
  using Dot = typename DotFor<T>::type;

 public:
  BackwardWorker(const AttentionBackward& p, const BackwardPlan& plan, const RowSums& sums,
                 Arena& arena)
      : p_(p),
        f_(p.forward),
        plan_(plan),
        qk_{f_.head_dim},
        v_{f_.head_dim_v},
        queries_(p, f_.seqlen_q, true, sums, arena),
        keys_(f_, arena),
        tile_(f_, arena) {
    // With one query head per key head a block's dk and dv are finished at once.
    const int64_t keys = plan.group == 1 ? kBlockN : plan.blocks_per_split * kBlockN;
    dq_ = arena.take<float>(round_up(f_.seqlen_q, kGradientTileM) * qk_.padded());
    dk_ = arena.take<float>(keys * qk_.padded());
    dv_ = arena.take<float>(keys * v_.padded());
  }

  // dq_parts: (splits, B, Hq, Sq, D) float32, used where splits > 1; dsinks: (B, Hq)
  void run(int64_t task, float* dq_parts, float* dsinks);

 private:
  void head(int64_t head, float* dq_parts, float* dsinks);
  void key_block(int64_t head, int64_t j0, ScoreRules& rules, float* dk, float* dv);
  void store_keys(int64_t j0, const float* dk, const float* dv);
  void store_queries(int64_t head, float* dq_parts);
  float sink_gradient() const;

  const AttentionBackward& p_;
  const AttentionForward& f_;
  const BackwardPlan& plan_;
  const Layout<Dot> qk_, v_;
  QueryChunk<T> queries_;
  KeyBlock<T> keys_;
  GradientTile<T> tile_;
  float *dq_, *dk_, *dv_;
  int64_t b_ = 0, head_k_ = 0, split_ = 0, begin_ = 0, end_ = 0;  // keys [begin, end)
  Sequence seq_{f_, 0};
};

FL_INLINE void fill_zero(float* x, int64_t count) {
  for (int64_t u = 0; u < count; u += kLanes) store(x + u, Vec(0.0f));
}

template <class T>
void BackwardWorker<T>::run(int64_t task, float* dq_parts, float* dsinks) {
  split_ = task % plan_.splits;
  head_k_ = task / plan_.splits % f_.heads_k;
  b_ = task / plan_.splits / f_.heads_k;
  seq_ = Sequence(f_, b_);
  begin_ = least(split_ * plan_.blocks_per_split * kBlockN, seq_.seqlen_k);
  end_ = least((split_ + 1) * plan_.blocks_per_split * kBlockN, seq_.seqlen_k);
  for (int64_t g = 0; g < plan_.group; ++g) head(head_k_ * plan_.group + g, dq_parts, dsinks);
}

template <class T>
void BackwardWorker<T>::head(int64_t head, float* dq_parts, float* dsinks) {
  queries_.load(b_, seq_, head, 0, seq_.seqlen_q);
  fill_zero(dq_, round_up(queries_.count, kGradientTileM) * qk_.padded());
  ScoreRules rules(f_, b_, seq_);
  const int64_t first_head = head_k_ * plan_.group;
  for (int64_t j0 = begin_; j0 < end_; j0 += kBlockN) {
    const int64_t row = plan_.group == 1 ? 0 : j0 - begin_;
    float *dk = dk_ + row * qk_.padded(), *dv = dv_ + row * v_.padded();
    if (head == first_head) {
      fill_zero(dk, kBlockN * qk_.padded());
      fill_zero(dv, kBlockN * v_.padded());
    }
    key_block(head, j0, rules, dk, dv);
    if (head == first_head + plan_.group - 1) store_keys(j0, dk, dv);
  }
  store_queries(head, dq_parts);
  if (p_.dsinks && split_ == 0) dsinks[b_ * f_.heads_q + head] = sink_gradient();
}

template <class T>
void BackwardWorker<T>::key_block(int64_t head, int64_t j0, ScoreRules& rules, float* dk,
                                  float* dv) {
  keys_.load(b_, seq_, head_k_, j0);
  rules.begin_block(head, j0);
  for (int64_t r0 = 0; r0 < queries_.count; r0 += kGradientTileM) {
    const Columns columns = tile_.columns_of(queries_, r0, j0);
    if (columns.begin >= columns.end) continue;
    tile_.products(queries_, r0, keys_, j0, columns, rules);
    tile_.differentiate(queries_, r0, b_, j0, columns, rules.score_scale());
    const int first = columns.begin, width = columns.end - columns.begin;
    const int rows = tile_.rows_of(queries_, r0);
    const int64_t unit = r0 / Dot::kPair;
    product<Dot, Update::kAdd>(width, v_.vecs(), rows / Dot::kPair, tile_.p_transposed(first),
                               v_.as_columns(queries_.dout_columns + unit * v_.padded()),
                               dv + first * v_.padded(), v_.padded());
    product<Dot, Update::kAdd>(width, qk_.vecs(), rows / Dot::kPair, tile_.ds_transposed(first),
                               qk_.as_columns(queries_.q_columns + unit * qk_.padded()),
                               dk + first * qk_.padded(), qk_.padded());
    product<Dot, Update::kAdd>(rows, qk_.vecs(), width / Dot::kPair, tile_.ds_rows(first),
                               qk_.as_columns(keys_.k_columns + first / Dot::kPair * qk_.padded()),
                               dq_ + r0 * qk_.padded(), qk_.padded());
  }
}

template <class T>
void BackwardWorker<T>::store_keys(int64_t j0, const float* dk, const float* dv) {
  const int64_t keys = least(kBlockN, seq_.seqlen_k - j0), row = seq_.k_row + j0;
  const float dropout_scale = f_.dropout.enabled() ? f_.dropout.scale() : 1.0f;
  store_rows(dk, qk_.padded(), keys, f_.head_dim, f_.softmax_scale,
             row_at<T>(p_.dk, b_, head_k_, row), p_.dk.stride_s);
  store_rows(dv, v_.padded(), keys, f_.head_dim_v, dropout_scale,
             row_at<T>(p_.dv, b_, head_k_, row), p_.dv.stride_s);
}

template <class T>
void BackwardWorker<T>::store_queries(int64_t head, float* dq_parts) {
  if (plan_.splits == 1) {
    store_rows(dq_, qk_.padded(), queries_.count, f_.head_dim, f_.softmax_scale,
               row_at<T>(p_.dq, b_, head, seq_.q_row), p_.dq.stride_s);
    return;
  }
  const int64_t row = ((split_ * f_.batch + b_) * f_.heads_q + head) * f_.seqlen_q;
  store_rows(dq_, qk_.padded(), queries_.count, f_.head_dim, f_.softmax_scale,
             dq_parts + row * f_.head_dim, f_.head_dim);
}

// dsink = sum_i p_sink[i] (dlse[i] - do[i] . o[i]),  p_sink = exp(sink - lse)
template <class T>
float BackwardWorker<T>::sink_gradient() const {
  double sum = 0.0;
  for (int64_t r = 0; r < queries_.count; ++r) {
    sum -= static_cast<double>(queries_.p_sink[r]) * queries_.delta[r];
  }
  return static_cast<float>(sum);
}

// dq of query row `row` = the sum of its parts; task is (b, head).
template <class T>
void add_parts(const AttentionBackward& p, const BackwardPlan& plan, float* parts, int64_t task) {
  const AttentionForward& f = p.forward;
  const int64_t b = task / f.heads_q, head = task % f.heads_q;
  const Sequence seq(f, b);
  const int64_t size = f.seqlen_q * f.head_dim, between = f.batch * f.heads_q * size;
  float* sum = parts + task * size;
  for (int64_t split = 1; split < plan.splits; ++split) {
    const float* part = sum + split * between;
    for (int64_t c = 0; c < seq.seqlen_q * f.head_dim; ++c) sum[c] += part[c];
  }
  store_rows(sum, f.head_dim, seq.seqlen_q, f.head_dim, 1.0f, row_at<T>(p.dq, b, head, seq.q_row),
             p.dq.stride_s);
}

template <class T>
void backward(const AttentionBackward& p, const RowSums& sums) {
  const AttentionForward& f = p.forward;
  const BackwardPlan plan(f);
  Arena sizes;
  const BackwardWorker<T> measured(p, plan, sums, sizes);
  const int64_t worker_bytes = round_up(sizes.used, 4096) + 64;
  const Scratch memory(worker_bytes * num_threads());
  const int64_t dq_size = f.batch * f.heads_q * f.seqlen_q * f.head_dim;
  const Scratch parts(plan.splits == 1 ? 0 : plan.splits * dq_size * 4);
  const Scratch sink_parts(f.batch * f.heads_q * 4);
  auto differentiate = [&](int64_t task, int worker) {
    [[maybe_unused]] const TileRegisters registers;
    Arena arena{memory.as<char>(worker * worker_bytes)};
    BackwardWorker<T>(p, plan, sums, arena).run(task, parts.as<float>(), sink_parts.as<float>());
  };
  parallel_tasks(plan.tasks, differentiate);
  if (plan.splits > 1) {
    auto reduce = [&](int64_t task, int) { add_parts<T>(p, plan, parts.as<float>(), task); };
    parallel_tasks(f.batch * f.heads_q, reduce);
  }
  if (p.dsinks == nullptr) return;
  for (int64_t bh = 0; bh < f.batch * f.heads_q; ++bh) {
    p.dsinks[bh % f.heads_q] += sink_parts.as<float>()[bh];
  }
}

constexpr int64_t kFewRows = 8;

// At 1024 neighbouring float32 numbers lie 6e-5 apart, and so much of each probability exp(s - lse)
// is lost; where a mask of the most negative numbers hides a whole row, lse keeps nothing of the
// scores.
bool has_coarse_lse(const AttentionForward& f) {
  for (int64_t b = 0; b < f.batch; ++b) {
    const Sequence seq(f, b);
    for (int64_t h = 0; h < f.heads_q; ++h) {
      const float* lse = f.lse + b * f.lse_stride_b + h * f.lse_stride_h + seq.q_row;
      for (int64_t i = 0; i < seq.seqlen_q; ++i) {
        if (lse[i] > 1024.0f || (lse[i] < -1024.0f && lse[i] != -kInfinity)) return true;
      }
    }
  }
  return false;
}

}  // namespace

void attention_backward(const AttentionBackward& p) {
  const AttentionForward& f = p.forward;
  if (f.batch == 0 || f.heads_q == 0) return;
  // Sums of whole rows or columns of ds would show the rounding of o, and all of ds that of lse: so
  // would gradients to which few rows add, where the pass costs little.
  const bool exact = p.dmask || p.dsinks || f.seqlen_q <= kFewRows || has_coarse_lse(f);
  const int64_t rows = f.batch * f.heads_q * f.seqlen_q;
  const Scratch memory(exact ? 2 * rows * 4 : 0);
  RowSums sums;
  if (exact) {
    sums = {memory.as<float>(), memory.as<float>() + rows};
    attention_row_sums(p, sums);
  }
  with_dtype(f.dtype, [&](auto type) { backward<typename decltype(type)::type>(p, sums); });
  if (p.dmask) attention_mask_gradient(p, sums);
}

}  // namespace fl::FL_ISA
