// Attention forward on CPU: flash attention, keys streamed in packed blocks past a chunk of
// queries.
#include <type_traits>

#include "attention/cpu_few_rows.h"
#include "attention/cpu_scores.h"
#include "attention/kernels.h"
#include "common/dispatch.h"
#include "common/parallel.h"

namespace fl::FL_ISA {
namespace {

constexpr int kTileM = 32;  // queries per tile: its scores stay in the first-level cache

// Packed queries and outputs of a chunk fill a quarter of the second-level cache: 1 MiB of Zen 5's,
// 2 MiB of the Xeons that have AMX.
#if defined(__AMX_BF16__)
constexpr int64_t kChunkElements = 131072;
#else
constexpr int64_t kChunkElements = 65536;
#endif

// How the work is cut into tasks. A chunk is `rows` queries of `heads` query heads that share a key
// head; its keys may be split, and the parts are then combined.
struct ForwardPlan {
  int64_t rows, heads, chunks, head_groups, splits, tasks;

  explicit ForwardPlan(const AttentionForward& p) {
    const int64_t workers = p.deterministic ? 16 : num_threads();  // no dependence on the machine
    const int64_t group = p.heads_q / p.heads_k;
    const int64_t fitting =
        most(kTileM, round_down(kChunkElements / (p.head_dim + p.head_dim_v), kTileM));
    rows = least(fitting, round_up(p.seqlen_q, kRows));
    heads = rows < p.seqlen_q ? 1 : least(group, most(1, fitting / rows));
    head_groups = (group + heads - 1) / heads;
    const int64_t per_chunk = p.batch * p.heads_k * head_groups;
    // Short of work for every worker: smaller chunks, but not so small that packing the keys shows.
    while (rows > 4 * kTileM && per_chunk * ((p.seqlen_q + rows - 1) / rows) < 4 * workers) {
      rows = round_up(rows / 2, kTileM);
    }
    chunks = (p.seqlen_q + rows - 1) / rows;
    // Still short of it: split the keys.
    splits = 1;
    const int64_t blocks = (p.seqlen_k + kBlockN - 1) / kBlockN;
    if (workers > 1 && per_chunk * chunks < 2 * workers && blocks >= 4) {
      splits = least(blocks / 2, (4 * workers + per_chunk * chunks - 1) / (per_chunk * chunks));
    }
    tasks = per_chunk * chunks * splits;
  }

  FL_INLINE int64_t padded_rows() const { return round_up(rows * heads, kTileM); }
};

// Results of one part of the keys, for later combination: o is not yet divided by sum.
struct Partial {
  float *o, *max, *sum;  // (padded_rows, padded Dv), (padded_rows,), (padded_rows,)

  static int64_t bytes(int64_t rows, int64_t ld) { return rows * (ld + 2) * 4; }
  static Partial at(char* base, int64_t rows, int64_t ld) {
    auto* o = reinterpret_cast<float*>(base);
    return {o, o + rows * ld, o + rows * ld + rows};
  }
};

// One worker's buffers and the steps of one task.
template <class T>
class ForwardWorker {
  using Dot = typename DotFor<T>::type;
  using Packed = std::conditional_t<Dot::kPair == 2, T, float>;  // elements of packed rows

 public:
  ForwardWorker(const AttentionForward& p, const ForwardPlan& plan, Arena& arena)
      : p_(p), plan_(plan), qk_{p.head_dim}, v_{p.head_dim_v} {
    const int64_t rows = plan.padded_rows();
    q_ = arena.take<float>(rows * qk_.row_units());
    o_ = arena.take<float>(rows * v_.padded());
    max_ = arena.take<float>(rows);
    sum_ = arena.take<float>(rows);
    rows_ = arena.take<QueryRow>(rows);
    k_rows_ = arena.take<float>(kBlockN * qk_.row_units());
    k_panels_ = arena.take<float>(kBlockN / kPanel * qk_.panel_stride());
    v_rows_ = arena.take<float>(kBlockN * v_.row_units());
    v_columns_ = arena.take<float>(column_units(v_, kBlockN));
    s_ = arena.take<float>(kTileM * kBlockN);
    pairs_ = arena.take<float>(Dot::kPair == 1 ? 0 : kTileM * kBlockN / 2);
  }

  void run(int64_t task, char* partials);

  // Writes rows [0, count) of the chunk: o / sum, lse.
  void finish(const Partial& part);
  void load_chunk(int64_t chunk_task);
  int64_t count() const { return count_; }
  int64_t output_ld() const { return v_.padded(); }

 private:
  void load_queries();
  void pack_keys(const Layout<Dot>& layout, const TensorView4& x, int64_t j0, int64_t keys,
                 float* rows) const;
  void key_block(int64_t j0, int64_t keys, ScoreRules& rules);
  void tile(int64_t r0, int64_t j0, ScoreRules& rules);
  void key_block_of_few(int64_t j0, int64_t keys, ScoreRules& rules);
  void rows_of_keys(const TensorView4& x, int64_t j, int count, const T** rows) const;
  void exponentiate(int64_t r0, int64_t j0, const Columns& columns, float scale, float* decay);

  const AttentionForward& p_;
  const ForwardPlan& plan_;
  const Layout<Dot> qk_, v_;
  float *q_, *o_, *max_, *sum_, *k_rows_, *k_panels_, *v_rows_, *v_columns_, *s_, *pairs_;
  const float* v_operand_ = nullptr;
  QueryRow* rows_;
  int64_t b_ = 0, head_k_ = 0, head0_ = 0, count_ = 0;
  Sequence seq_{p_, 0};
};

// Which rows the task has. Chunks come last to first: under causality the last are the longest.
template <class T>
void ForwardWorker<T>::load_chunk(int64_t chunk_task) {
  const int64_t per_chunk = p_.batch * p_.heads_k * plan_.head_groups;
  const int64_t chunk = plan_.chunks - 1 - chunk_task / per_chunk;
  const int64_t head_group = chunk_task % plan_.head_groups;
  head_k_ = chunk_task / plan_.head_groups % p_.heads_k;
  b_ = chunk_task % per_chunk / (plan_.head_groups * p_.heads_k);
  seq_ = Sequence(p_, b_);
  const int64_t group = p_.heads_q / p_.heads_k;
  head0_ = head_k_ * group + head_group * plan_.heads;
  const int64_t heads = least(plan_.heads, group - head_group * plan_.heads);
  const int64_t first = chunk * plan_.rows;
  const int64_t queries = most(0, least(plan_.rows, seq_.seqlen_q - first));
  count_ = 0;
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < queries; ++i) {
      rows_[count_++] = query_row(p_, seq_, head0_ + h, first + i);
    }
  }
  for (int64_t r = count_; r < round_up(count_, kTileM); ++r) rows_[r] = kNoRow;
}

template <class T>
void ForwardWorker<T>::load_queries() {
  for (int64_t r = 0; r < count_;) {
    int64_t run = 1;
    while (r + run < count_ && rows_[r + run].head == rows_[r].head) ++run;
    const T* q = row_at<const T>(p_.q, b_, rows_[r].head, seq_.q_row + rows_[r].query);
    const bool last = r + run == count_;
    pack_rows(qk_, q, p_.q.stride_s, run, last ? round_up(count_, kTileM) - r : run,
              q_ + r * qk_.row_units());
    r += run;
  }
  for (int64_t u = 0; u < round_up(count_, kTileM) * v_.padded(); u += kLanes) {
    store(o_ + u, Vec(0.0f));
  }
  for (int64_t r = 0; r < round_up(count_, kTileM); ++r) {
    max_[r] = -kInfinity;
    sum_[r] = 0.0f;
  }
}

template <class T>
void ForwardWorker<T>::run(int64_t task, char* partials) {
  load_chunk(task / plan_.splits);
  load_queries();
  int64_t begin = seq_.seqlen_k, end = 0;
  for (int64_t r = 0; r < count_; ++r) {
    if (rows_[r].begin >= rows_[r].end) continue;
    begin = least(begin, rows_[r].begin);
    end = most(end, rows_[r].end);
  }
  const int64_t split = task % plan_.splits, blocks = (p_.seqlen_k + kBlockN - 1) / kBlockN;
  begin = most(round_down(begin, kBlockN), split * blocks / plan_.splits * kBlockN);
  end = least(end, (split + 1) * blocks / plan_.splits * kBlockN);
  ScoreRules rules(p_, b_, seq_);
  for (int64_t j0 = begin; j0 < end; j0 += kBlockN) {
    key_block(j0, least(kBlockN, seq_.seqlen_k - j0), rules);
  }
  const Partial here{o_, max_, sum_};
  if (plan_.splits == 1) return finish(here);
  const int64_t bytes = Partial::bytes(plan_.padded_rows(), v_.padded());
  const Partial out = Partial::at(partials + task * bytes, plan_.padded_rows(), v_.padded());
  __builtin_memcpy(out.o, o_, count_ * v_.padded() * 4);
  __builtin_memcpy(out.max, max_, count_ * 4);
  __builtin_memcpy(out.sum, sum_, count_ * 4);
}

// Keys or values [j0, j0 + keys) to packed rows, page by page where the cache has pages.
template <class T>
void ForwardWorker<T>::pack_keys(const Layout<Dot>& layout, const TensorView4& x, int64_t j0,
                                 int64_t keys, float* rows) const {
  const int64_t padded = round_up(keys, kPanel);
  if (p_.page_table == nullptr) {
    return pack_rows(layout, row_at<const T>(x, b_, head_k_, seq_.k_row + j0), x.stride_s, keys,
                     padded, rows);
  }
  const int32_t* pages = p_.page_table + b_ * p_.page_table_stride;
  for (int64_t j = j0, end = j0 + keys; j < end;) {
    const int64_t row = j % p_.page_size, run = least(p_.page_size - row, end - j);
    pack_rows(layout, row_at<const T>(x, pages[j / p_.page_size], head_k_, row), x.stride_s, run,
              j + run == end ? j0 + padded - j : run, rows + (j - j0) * layout.row_units());
    j += run;
  }
}

template <class T>
void ForwardWorker<T>::key_block(int64_t j0, int64_t keys, ScoreRules& rules) {
  if (count_ <= Dot::kFewQueries) return key_block_of_few(j0, keys, rules);
  pack_keys(qk_, p_.k, j0, keys, k_rows_);
  pack_transposed(qk_, k_rows_, round_up(keys, kPanel), k_panels_);
  pack_keys(v_, p_.v, j0, keys, v_rows_);
  v_operand_ = pack_columns(v_, v_rows_, round_up(keys, kPanel), v_columns_);
  rules.begin_block(rows_[0].head == rows_[count_ - 1].head ? rows_[0].head : -1, j0);
  for (int64_t r0 = 0; r0 < count_; r0 += kTileM) tile(r0, j0, rules);
}

template <class T>
void ForwardWorker<T>::tile(int64_t r0, int64_t j0, ScoreRules& rules) {
  const int count = static_cast<int>(least(kTileM, round_up(count_ - r0, kRows)));
  const Columns columns = needed_columns(rows_ + r0, count, j0);
  if (columns.begin >= columns.end) return;
  const int width = columns.end - columns.begin;
  OperandB keys = qk_.as_transposed(k_panels_);
  keys.data += columns.begin / kPanel * keys.panel;
  product<Dot, Update::kSet>(count, width / kLanes, qk_.depth_units(),
                             qk_.as_a(q_ + r0 * qk_.row_units()), keys, s_ + columns.begin,
                             kBlockN);
  rules.apply(rows_ + r0, count, j0, columns, s_, nullptr);
  alignas(64) float decay[kTileM];
  exponentiate(r0, j0, columns, rules.score_scale(), decay);
  const float* weights = Dot::kPair == 1 ? s_ : pairs_;
  const OperandB values = v_.as_columns(v_operand_ + columns.begin / Dot::kPair * v_.padded());
  product<Dot, Update::kDecayAndAdd>(
      count, v_.vecs(), width / Dot::kPair,
      {weights + columns.begin / Dot::kPair, kBlockN / Dot::kPair, 1}, values,
      o_ + r0 * v_.padded(), v_.padded(), decay);
}

// Where keys or values [j, j + count) begin.
template <class T>
void ForwardWorker<T>::rows_of_keys(const TensorView4& x, int64_t j, int count,
                                    const T** rows) const {
  const int32_t* pages = p_.page_table ? p_.page_table + b_ * p_.page_table_stride : nullptr;
  for (int c = 0; c < count; ++c, ++j) {
    rows[c] = pages ? row_at<const T>(x, pages[j / p_.page_size], head_k_, j % p_.page_size)
                    : row_at<const T>(x, b_, head_k_, seq_.k_row + j);
  }
}

template <class T>
void ForwardWorker<T>::key_block_of_few(int64_t j0, int64_t keys, ScoreRules& rules) {
  const int count = static_cast<int>(count_);
  const Columns columns = needed_columns(rows_, count, j0);
  if (columns.begin >= columns.end) return;
  const int end = static_cast<int>(least(columns.end, keys));
  const T* rows[kKeysAtOnce];
  for (int c = columns.begin; c < end; c += kKeysAtOnce) {
    const int here = static_cast<int>(least(kKeysAtOnce, end - c));
    rows_of_keys(p_.k, j0 + c, here, rows);
    for (int r = 0; r < count; ++r) {
      const auto* q = reinterpret_cast<const Packed*>(q_ + r * qk_.row_units());
      dot_keys(q, p_.head_dim, rows, here, s_ + r * kBlockN + c);
    }
  }
  rules.begin_block(rows_[0].head == rows_[count - 1].head ? rows_[0].head : -1, j0);
  rules.apply(rows_, count, j0, columns, s_, nullptr);
  alignas(64) float decay[kTileM];
  exponentiate(0, j0, columns, rules.score_scale(), decay);
  for (int c = columns.begin; c < end; c += kKeysAtOnce) {
    const int here = static_cast<int>(least(kKeysAtOnce, end - c));
    rows_of_keys(p_.v, j0 + c, here, rows);
    for (int r = 0; r < count; ++r) {
      const auto* weights = reinterpret_cast<const Packed*>(Dot::kPair == 1 ? s_ : pairs_);
      add_values(weights + r * kBlockN + c, p_.head_dim_v, rows, here,
                 c == columns.begin ? decay[r] : 1.0f, o_ + r * v_.padded());
    }
  }
}

// p = exp(scale * s - max), dropped where dropout says so, to be multiplied by V. Returns sum(p)
// before dropout.
template <class Dot>
FL_INLINE float weigh_row(const float* s, const Columns& columns, float scale, float max,
                          const uint64_t* keep, float* out) {
  Vec sum = 0.0f;
  for (int c = columns.begin; c < columns.end; c += kPanel) {
    Vec p[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      p[v] = exp(fma(load(s + c + v * kLanes), Vec(scale), Vec(-max)));
      sum += p[v];
      if (keep) p[v] = select(kept_lanes(keep, c + v * kLanes), p[v], Vec(0.0f));
    }
    if constexpr (Dot::kPair == 1) {
      store(out + c, p[0]);
      store(out + c + kLanes, p[1]);
    } else {
#if defined(__AVX512BF16__)
      const __m512bh both = _mm512_cvtne2ps_pbh(p[1].v, p[0].v);
      _mm512_storeu_si512(out + c / 2, reinterpret_cast<__m512i>(both));
#endif
    }
  }
  return reduce_add(sum);
}

template <class T>
void ForwardWorker<T>::exponentiate(int64_t r0, int64_t j0, const Columns& columns, float scale,
                                    float* decay) {
  alignas(64) float shift[kTileM];
  for (int r = 0; r < kTileM; ++r) {
    const float* s = s_ + r * kBlockN;
    if (r0 + r >= round_up(count_, kRows)) {
      shift[r] = decay[r] = 0.0f;
      continue;
    }
    Vec row_max = load(s + columns.begin);
    for (int c = columns.begin + kLanes; c < columns.end; c += kLanes) {
      row_max = max(row_max, load(s + c));
    }
    shift[r] = reduce_max(row_max) * scale;
  }
  for (int r = 0; r < kTileM; r += kLanes) {
    const Vec before = load(max_ + r0 + r), now = max(before, load(shift + r));
    const Vec finite = select(now == Vec(-kInfinity), Vec(0.0f), now);
    store(max_ + r0 + r, now);
    store(shift + r, finite);
    store(decay + r, exp(before - finite));
  }
  for (int r = 0; r < kTileM && r0 + r < round_up(count_, kRows); ++r) {
    uint64_t keep[kBlockN / 64];
    const bool drops = p_.dropout.enabled();
    if (drops) dropout_row(p_, b_, rows_[r0 + r], j0, columns, keep);
    float* out = Dot::kPair == 1 ? s_ + r * kBlockN : pairs_ + r * kBlockN / 2;
    const float sum =
        weigh_row<Dot>(s_ + r * kBlockN, columns, scale, shift[r], drops ? keep : nullptr, out);
    sum_[r0 + r] = sum_[r0 + r] * decay[r] + sum;
  }
}

template <class T>
void ForwardWorker<T>::finish(const Partial& part) {
  const float scale = p_.dropout.enabled() ? p_.dropout.scale() : 1.0f;
  for (int64_t r = 0; r < count_; ++r) {
    const QueryRow& row = rows_[r];
    float *o = part.o + r * v_.padded(), max = part.max[r], sum = part.sum[r];
    float output_scale = scale / sum;
    if (sum == 0.0f) {
      output_scale = 0.0f;
      for (int64_t c = 0; c < v_.padded(); ++c) o[c] = 0.0f;
    }
    if (p_.sinks) {
      const float sink = p_.sinks[row.head];
      const float larger = max < sink ? sink : max;
      if (larger != -kInfinity) {
        const float kept = sum == 0.0f ? 0.0f : __builtin_expf(max - larger);
        sum = sum * kept + __builtin_expf(sink - larger);
        output_scale = scale * kept / sum;
        max = larger;
      }
    }
    store_row(o, p_.head_dim_v, output_scale,
              row_at<T>(p_.o, b_, row.head, seq_.q_row + row.query));
    float* lse = p_.lse + b_ * p_.lse_stride_b + row.head * p_.lse_stride_h;
    lse[seq_.q_row + row.query] = sum == 0.0f ? -kInfinity : max + __builtin_logf(sum);
  }
}

// Adds up the parts of one chunk's keys, first to last, into the first.
FL_INLINE Partial combine(const ForwardPlan& plan, char* partials, int64_t chunk_task,
                          int64_t count, int64_t ld) {
  const int64_t rows = plan.padded_rows(), bytes = Partial::bytes(rows, ld);
  char* base = partials + chunk_task * plan.splits * bytes;
  const Partial first = Partial::at(base, rows, ld);
  for (int64_t split = 1; split < plan.splits; ++split) {
    const Partial next = Partial::at(base + split * bytes, rows, ld);
    for (int64_t r = 0; r < count; ++r) {
      const float larger = first.max[r] < next.max[r] ? next.max[r] : first.max[r];
      const float finite = larger == -kInfinity ? 0.0f : larger;
      const float keep = __builtin_expf(first.max[r] - finite);
      const float take = __builtin_expf(next.max[r] - finite);
      first.max[r] = larger;
      first.sum[r] = first.sum[r] * keep + next.sum[r] * take;
      for (int64_t c = r * ld; c < (r + 1) * ld; c += kLanes) {
        store(first.o + c, fma(load(next.o + c), Vec(take), load(first.o + c) * Vec(keep)));
      }
    }
  }
  return first;
}

template <class T>
void forward(const AttentionForward& p) {
  const ForwardPlan plan(p);
  Arena sizes;
  const ForwardWorker<T> measured(p, plan, sizes);
  const int64_t worker_bytes = round_up(sizes.used, 4096) + 64;
  const Scratch memory(worker_bytes * num_threads());
  const int64_t ld = measured.output_ld();
  const Scratch partials(plan.splits == 1 ? 0
                                          : plan.tasks * Partial::bytes(plan.padded_rows(), ld));
  const auto worker_at = [&](int worker) {
    Arena arena{memory.as<char>(worker * worker_bytes)};
    return ForwardWorker<T>(p, plan, arena);
  };
  auto attend = [&](int64_t task, int worker) {
    [[maybe_unused]] const TileRegisters registers;
    worker_at(worker).run(task, partials.as<char>());
  };
  parallel_tasks(plan.tasks, attend);
  if (plan.splits == 1) return;
  auto reduce = [&](int64_t chunk_task, int worker) {
    ForwardWorker<T> chunk = worker_at(worker);
    chunk.load_chunk(chunk_task);
    chunk.finish(combine(plan, partials.as<char>(), chunk_task, chunk.count(), ld));
  };
  parallel_tasks(plan.tasks / plan.splits, reduce);
}

}  // namespace

void attention_forward(const AttentionForward& p) {
  if (p.batch == 0 || p.heads_q == 0 || p.seqlen_q == 0) return;
  with_dtype(p.dtype, [&](auto type) { forward<typename decltype(type)::type>(p); });
}

}  // namespace fl::FL_ISA
