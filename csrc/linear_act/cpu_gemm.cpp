// linear_act_gemm on CPU: the factor with fewer rows, of b or of a, is packed once by all threads
// and shared. Then blocks of the result are computed independently, each packing what it needs of
// the other: with b shared
//
//   for each chunk of k                    the sums so far wait in a float32 block
//     pack a: kBlockOwn rows x kChunkSteps stays in L2
//     for each panel of b                  kTileN x kChunkSteps, streams through L2
//       for each panel of a                kTileM x kChunkSteps
//         multiply_tile                    after the last chunk: store_tile
//
// and with a shared, each panel of b is packed where it is first needed.
//
// Sums run over at most kChunkSteps steps before they are added up, which also keeps the rounding
// error of long sums small. The order of summation does not depend on the number of threads.
#include "common/amx.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "linear_act/gemm_store.h"
#if defined(__AMX_BF16__)
#include "linear_act/gemm_amx.h"
#else
#include "linear_act/gemm_tile.h"
#endif
#include "linear_act/kernels.h"

namespace fl::FL_ISA {
namespace {

FL_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FL_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

// Whether every sum of a tile's rows [begin, end) is finite.
bool all_finite(const float* sums, int64_t stride, int begin, int end) {
  Vec zeros(0.0f);  // 0 times each sum: NaN where one is not
  for (int r = begin; r < end; ++r) {
    for (int c = 0; c < kTileN; c += kLanes) {
      zeros = fma(load(sums + r * stride + c), Vec(0.0f), zeros);
    }
  }
  return reduce_add(zeros) == 0.0f;
}

// A stretch of k of one of the products.
struct Chunk {
  int product;
  int64_t k, depth, steps;
};

template <class T>
class Gemm {
  using Step = typename PanelOf<T>::Step;
  static constexpr int64_t kGroup = PanelOf<T>::kGroup;
  static constexpr int64_t kChunkSteps = PanelOf<T>::kChunkSteps;
  static constexpr int64_t kGroupDepth = PanelOf<T>::kDepth * kGroup;
  static constexpr int64_t kChunkDepth = kChunkSteps * PanelOf<T>::kDepth;

 public:
  explicit Gemm(const LinearActGemm& g)
      : g_(g),
        store_tile_(choose_store_tile<T>(g)),
        pair_(g.form == LinearActGemm::Form::kGated ? 2 : 1),
        chunks0_(count_chunks(g.k[0])),
        chunks_(chunks0_ + (g.form == LinearActGemm::Form::kSum ? count_chunks(g.k[1]) : 0)),
        panels_m_(ceil_div(g.m, kTileM)),
        panels_n_(ceil_div(g.n, kTileN)),
        b_is_shared_(g.m >= g.n) {
    choose_blocks();
  }

  void run() {
    int64_t steps = 0;
    for (int64_t c = 0; c < chunks_; ++c) steps += chunk(c).steps;
    const int64_t width = b_is_shared_ ? pair_ * kTileN : kTileM;
    const Scratch packed(width * shared_panels() * steps * sizeof(Step));
    shared_ = packed.as<Step>();
    pack_shared();
    const int64_t flags = PanelOf<T>::kSplits ? g_.m : 0;
    const Scratch to_redo(flags);
    to_redo_ = to_redo.as<bool>();
    for (int64_t r = 0; r < flags; ++r) to_redo_[r] = false;

    const int64_t own_bytes = (b_is_shared_ ? rows_ : pair_ * cols_) * kChunkSteps * sizeof(Step);
    const int64_t sums_bytes = pair_ * sums_rows() * sums_stride() * sizeof(float);
    const int64_t blocks = blocks_m_ * blocks_n_;
    const int64_t workers = min64(blocks, num_threads());
    const Scratch scratch(workers * (own_bytes + sums_bytes));
    auto block = [&](int64_t task, int worker) {
      const int64_t at = worker * (own_bytes + sums_bytes);
      compute_block(task, scratch.as<Step>(at), scratch.as<float>(at + own_bytes));
    };
    parallel_tasks(blocks, block);
    if constexpr (PanelOf<T>::kSplits) {
      if (any_to_redo_) redo_rows();
    }
  }

 private:
  // An empty sum is one chunk of no steps, so that the result is written all the same.
  static int64_t count_chunks(int64_t k) { return k == 0 ? 1 : ceil_div(k, kChunkDepth); }

  Chunk chunk(int64_t index) const {
    const int product = index < chunks0_ ? 0 : 1;
    const int64_t k = (index - product * chunks0_) * kChunkDepth;
    const int64_t depth = min64(kChunkDepth, g_.k[product] - k);
    return {product, k, depth, ceil_div(depth, kGroupDepth) * kGroup};
  }

  // Blocks of at most kBlockOwn rows of the factor that they pack themselves and kBlockShared of
  // the other, cut further until every thread has some.
  void choose_blocks() {
    const int64_t threads = num_threads();
    blocks_m_ = ceil_div(g_.m, b_is_shared_ ? kBlockOwn : kBlockShared);
    blocks_n_ = ceil_div(g_.n, b_is_shared_ ? kBlockShared : kBlockOwn / pair_);
    while (blocks_m_ * blocks_n_ < 4 * threads &&
           (blocks_m_ < panels_m_ || blocks_n_ < panels_n_)) {
      const bool split_m = panels_m_ * blocks_n_ * kTileM > panels_n_ * blocks_m_ * kTileN;
      if (blocks_n_ == panels_n_ || (split_m && blocks_m_ < panels_m_)) {
        ++blocks_m_;
      } else {
        ++blocks_n_;
      }
    }
    rows_ = ceil_div(panels_m_, blocks_m_) * kTileM;
    cols_ = ceil_div(panels_n_, blocks_n_) * kTileN;
    blocks_m_ = ceil_div(g_.m, rows_);
    blocks_n_ = ceil_div(g_.n, cols_);
  }

  // With one chunk a tile of sums is enough; with more they wait for the next chunk.
  int64_t sums_rows() const { return chunks_ > 1 ? rows_ : kTileM; }
  int64_t sums_stride() const { return chunks_ > 1 ? cols_ : kTileN; }

  int64_t shared_panels() const { return b_is_shared_ ? panels_n_ : panels_m_; }

  // The shared factor, packed: chunk by chunk, panel by panel.
  Step* shared(int64_t c, int64_t panel) const {
    int64_t steps_before = 0;
    for (int64_t i = 0; i < c; ++i) steps_before += chunk(i).steps;
    const int64_t panels = steps_before * shared_panels() + chunk(c).steps * panel;
    return shared_ + panels * (b_is_shared_ ? pair_ * kTileN : kTileM);
  }

  // Rows [row, row + rows) of a.
  void pack_rows(const Chunk& k, int64_t row, int64_t rows, Step* panels) const {
    pack_a<T>(g_.a[k.product], row, min64(rows, g_.m - row), k.k, k.depth, panels);
  }

  // One panel of b; in the gated form, that of b[0] followed by that of b[1].
  void pack_column_panel(const Chunk& k, int64_t col, Step* panel) const {
    for (int which = 0; which < pair_; ++which, panel += k.steps * kTileN) {
      const GemmFactor& b = g_.b[pair_ == 2 ? which : k.product];
      pack_b<T>(b, col, min64(kTileN, g_.n - col), k.k, k.depth, panel);
    }
  }

  void pack_shared() {
    auto pack = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c = i / shared_panels(), panel = i % shared_panels();
        if (b_is_shared_) {
          pack_column_panel(chunk(c), panel * kTileN, shared(c, panel));
        } else {
          pack_rows(chunk(c), panel * kTileM, kTileM, shared(c, panel));
        }
      }
    };
    parallel_ranges(chunks_ * shared_panels(), 4, pack);
  }

  void compute_block(int64_t task, Step* own, float* sums) {
    [[maybe_unused]] const TileRegisters registers;
    const int64_t row = task / blocks_n_ * rows_, col = task % blocks_n_ * cols_;
    const int64_t rows = min64(rows_, g_.m - row), cols = min64(cols_, g_.n - col);
    for (int64_t c = 0; c < chunks_; ++c) {
      const Chunk k = chunk(c);
      if (b_is_shared_) pack_rows(k, row, rows, own);
      for (int64_t j = 0; j < cols; j += kTileN) {
        Step* b = b_is_shared_ ? shared(c, (col + j) / kTileN) : own + j * k.steps * pair_;
        if (!b_is_shared_) pack_column_panel(k, col + j, b);
        for (int64_t i = 0; i < rows; i += kTileM) {
          const Step* a = b_is_shared_ ? own + i * k.steps : shared(c, (row + i) / kTileM);
          float* tile = chunks_ > 1 ? sums + i * sums_stride() + j : sums;
          const SumTile t{{tile, tile + sums_rows() * sums_stride()},
                          sums_stride(),
                          row + i,
                          col + j,
                          static_cast<int>(min64(kTileM, rows - i)),
                          static_cast<int>(min64(kTileN, cols - j))};
          compute_tile(k.steps, a, b, t, c);
        }
      }
    }
  }

  void compute_tile(int64_t steps, const Step* a, const Step* b, const SumTile& t, int64_t c) {
    for (int which = 0; which < pair_; ++which) {
      float* sums = const_cast<float*>(t.sums[which]);
      multiply_tile(steps, a, b + which * steps * kTileN, sums, t.stride, c > 0);
    }
    if (c + 1 < chunks_) return;
    for (int which = 0; which < pair_ && PanelOf<T>::kSplits; ++which) {
      if (!all_finite(t.sums[which], t.stride, 0, kTileM)) mark_rows(t, which);
    }
    store_tile_(g_, t);
  }

  void mark_rows(const SumTile& t, int which) {
    for (int r = 0; r < t.rows; ++r) {
      if (all_finite(t.sums[which], t.stride, r, r + 1)) continue;
      __atomic_store_n(to_redo_ + t.row + r, true, __ATOMIC_RELAXED);  // beside other tiles
      __atomic_store_n(&any_to_redo_, true, __ATOMIC_RELAXED);
    }
  }

  // Rows with sums that are not finite, multiplied without parts, a run of neighbours at a time.
  void redo_rows() const {
    for (int64_t begin = 0, end; begin < g_.m; begin = end + 1) {
      for (; begin < g_.m && !to_redo_[begin];) ++begin;
      for (end = begin; end < g_.m && to_redo_[end];) ++end;
      LinearActGemm rows = g_;
      rows.m = end - begin;
      for (GemmFactor& a : rows.a) {
        if (a.data) a.data = static_cast<const T*>(a.data) + begin * (a.k_dense ? a.stride : 1);
      }
      for (void*& z : rows.preactivation) z = z ? static_cast<T*>(z) + begin * g_.n : nullptr;
      rows.out = static_cast<T*>(g_.out) + begin * g_.n;
      avx512_bf16::linear_act_gemm(rows);
    }
  }

  const LinearActGemm& g_;
  const StoreTile store_tile_;
  const int pair_;         // products side by side: 2 in the gated form
  const int64_t chunks0_;  // of the first product
  const int64_t chunks_;
  const int64_t panels_m_, panels_n_;
  const bool b_is_shared_;
  int64_t blocks_m_, blocks_n_;  // how many
  int64_t rows_, cols_;          // of a block
  Step* shared_ = nullptr;
  bool* to_redo_ = nullptr;  // of each row: whether its sums are not all finite
  bool any_to_redo_ = false;
};

}  // namespace

void linear_act_gemm(const LinearActGemm& g) {
  if (g.m == 0 || g.n == 0) return;
  with_dtype(g.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (PanelOf<T>::kSplits) {
      // Six tile instructions take 32 elements of k in the time that a dozen take without.
      if (g.k[0] + g.k[1] <= 12) return avx512_bf16::linear_act_gemm(g);
    }
    Gemm<T>(g).run();
  });
}

}  // namespace fl::FL_ISA
