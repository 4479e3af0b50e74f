// Attention of few queries over long caches on tensor cores, the keys split over blocks.
//
// The query heads of a group and the query tokens are the rows of one matrix, token by token: row r
// of KV head h is token r / group of query head h * group + r % group. A block has up to 64 rows of
// one (sequence, KV head), 16 per warp, and one part of the keys that they see, so that keys and
// values are read once for 64 rows. Four warps share 16, 32 or 64 rows; those with the same rows
// take different keys of each tile and add up what they have found at the end.
//
// Parts are cut on the device, equal for each sequence whatever its length; their number is the
// host's, who knows the capacity alone. With several parts, outputs before their division, maxima
// and sums go to scratch memory, and a second kernel adds them up in order.
#pragma once

#include "attention/cuda_forward.cuh"

namespace fl {

constexpr int kDecodeWarps = 4, kDecodeThreads = 32 * kDecodeWarps;
constexpr int kKeyUnit = 64;  // parts of the keys are multiples of it

// Rows of a block: those that fit into shared memory beside the keys.
constexpr int decode_rows(int size, int64_t head_dim) {
  return size == 4 && head_dim > 128 ? 32 : 16 * kDecodeWarps;
}

// What ForwardWarp is told: a warp works on 16 rows and 16 keys at once.
template <class T_, int kDim_>
struct DecodeShape {
  using T = T_;
  static constexpr int kDim = kDim_, kBlockN = 16, kTilesM = 1;
  static constexpr bool kGeneral = true, kNatural = false, kExact = kDim <= 32,
                        kKeepsQ = kDim <= 128 && sizeof(T) == 2;
  static constexpr int kWarpRows = 16, kTilesN = 2, kTilesD = kDim / 8, kSteps = kDim / kDepth<T>;

  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(T));
  static constexpr int kKeys = kRowBytes <= 256 ? 64 : 16384 / kRowBytes;  // of a tile
  static constexpr int kSlices = kKeys / 16;
  using TileQ = SharedTile<T, 16, kDim>;
  using TileO = SharedTile<float, 16, kDim>;  // the outputs of a warp, at the end
  using TileKv = SharedTile<T, kKeys, kDim>;
  static constexpr int kStageBytes = 2 * TileKv::kBytes;  // keys and values

  // Tiles in shared memory at once. The last but one of them may be on their way while one is used;
  // where copies are not asynchronous and there are 64 KB, one has to do.
  static constexpr __host__ __device__ int stages(bool asynchronous) {
    return kRowBytes <= 128 ? 3 : asynchronous ? 2 : 1;
  }
  // Warps that share each 16 of `tiles` times 16 rows.
  static constexpr __host__ __device__ int key_warps(int tiles) {
    const int warps = tiles == 1 ? 4 : tiles == 2 ? 2 : 1;
    return warps < kSlices ? warps : kSlices;
  }
  // The tiles and q; at the end the outputs of all warps.
  static constexpr int shared_bytes(int tiles, bool asynchronous) {
    const int loop = stages(asynchronous) * kStageBytes + tiles * TileQ::kBytes;
    const int end = tiles * key_warps(tiles) * TileO::kBytes;
    return loop > end ? loop : end;
  }
};

// How the work is split. With one part there is no scratch memory and nothing to add up.
struct DecodePlan {
  int rows, block_rows, row_blocks;  // rows: of a KV head
  int tiles;                         // of 16 rows, in a block
  int parts;                         // of the keys
  int padded_v;                      // columns of an output row in scratch memory
  bool general;  // softcap, ALiBi, or a scale that turns the order of scores around
  float* scratch;
  // Key j is in page j * page_factor >> page_shift of its sequence; without pages the cache of a
  // sequence is one page of kFar keys.
  int page_size, page_shift;
  uint32_t page_factor;

  __device__ __forceinline__ int page_of(int key) const {
    return static_cast<int>(static_cast<uint64_t>(key) * page_factor >> page_shift);
  }
  // Output before its division, (parts, B, Hk, rows, padded_v); then maximum and sum of each row.
  __device__ __forceinline__ int64_t row_at(const AttentionForward& p, int part, int b, int head,
                                            int row) const {
    return ((part * p.batch + b) * p.heads_k + head) * rows + row;
  }
  __device__ __forceinline__ float2* statistics(const AttentionForward& p) const {
    const int64_t outputs = parts * p.batch * p.heads_k * rows * padded_v;
    return reinterpret_cast<float2*>(scratch + outputs);
  }
};

// Which keys [begin, end) of those that the tokens [i0, i1) see belong to one part of `parts`.
struct KeyPart {
  int begin, end;

  __device__ __forceinline__ KeyPart(const Sequence& sequence, int i0, int i1, int part,
                                     int parts) {
    const int first = sequence.begin(i0), last = sequence.end(i1 - 1);
    const int units = (max(last - first, 0) + kKeyUnit - 1) / kKeyUnit;
    const int keys = (units + parts - 1) / parts * kKeyUnit;
    begin = min(first + part * keys, last);
    end = min(begin + keys, last);
  }
  __device__ __forceinline__ bool empty() const { return begin >= end; }
};

// One thread's share of the tiles of keys, or of values, of a KV head: kCount rows, kStep apart.
template <class Tile, class T>
class CacheCopy {
  static constexpr int kPanels = Tile::kColumns / Tile::kPanel, kChunk = 16 / sizeof(T);

 public:
  static constexpr int kStep = kDecodeThreads / Tile::kChunks, kCount = Tile::kRows / kStep;
  static_assert(kStep % 8 == 0);
  struct Pages {
    int number[kCount];
  };

  // The pages of keys `key`, `key` + kStep, ... of sequence b, for keys and values: looked up one
  // tile before they are needed.
  static __device__ __forceinline__ void look_up(const AttentionForward& p, const DecodePlan& plan,
                                                 int b, int key, int end, Pages& pages) {
#pragma unroll
    for (int c = 0; c < kCount; ++c, key += kStep) {
      pages.number[c] = b;
      if (p.page_table && key < end) {
        pages.number[c] = p.page_table[b * p.page_table_stride + plan.page_of(key)];
      }
    }
  }

  __device__ __forceinline__ CacheCopy(const TensorView4& x, int64_t head, int64_t columns,
                                       int thread)
      : page_stride_(x.stride_b), row_stride_(x.stride_s) {
    const int chunk = thread % Tile::kChunks;
    from_ = static_cast<const T*>(x.data) + head * x.stride_h + kChunk * chunk;
    to_ = Tile::at(thread / Tile::kChunks, chunk);
    left_ = static_cast<int>(columns) - kChunk * chunk;
    const auto strides = (x.stride_b | x.stride_h | x.stride_s) * static_cast<int64_t>(sizeof(T));
    aligned_ = (reinterpret_cast<uintptr_t>(x.data) | strides) % 16 == 0;
    whole_ = aligned_ && columns >= Tile::kColumns;
  }

  // Rows from key `end` on are zero.
  __device__ __forceinline__ void operator()(uint32_t tile, const DecodePlan& plan,
                                             const Pages& pages, int key, int end) const {
#if __CUDA_ARCH__ >= 800
    constexpr int kUnroll = kPanels;
#else
    constexpr int kUnroll = 1;  // what is copied passes through registers, of which few are free
#endif
#pragma unroll
    for (int c = 0; c < kCount; ++c, key += kStep) {
      const int row = key - plan.page_of(key) * plan.page_size;
      const T* from = from_ + pages.number[c] * page_stride_ + row * row_stride_;
      const uint32_t to = tile + to_ + c * kStep * Tile::kRowBytes;
      if (!whole_) {
        copy_partial(to, from, key < end ? left_ : 0);
        continue;
      }
#pragma unroll kUnroll
      for (int panel = 0; panel < kPanels; ++panel) {
        copy_async(to + panel * Tile::kPanelBytes, from + panel * Tile::kPanel, key < end ? 16 : 0);
      }
    }
  }

 private:
  // The first `left` columns of a row, counted from the thread's first one.
  __device__ __forceinline__ void copy_partial(uint32_t to, const T* from, int left) const {
#pragma unroll 1
    for (int panel = 0; panel < kPanels; ++panel) {
      copy_chunk(to + panel * Tile::kPanelBytes, from + panel * Tile::kPanel,
                 min(max(left - panel * Tile::kPanel, 0), kChunk), aligned_);
    }
  }

  const T* from_;
  int64_t page_stride_, row_stride_;
  uint32_t to_;
  int left_;  // columns from this thread's first one on
  bool aligned_, whole_;
};

// One row of a lane: its query token, and the ALiBi slope of its head.
struct DecodeRow {
  int token;
  float slope;
};

// 16 rows of a block and one of the warps that they have.
template <class S>
class DecodeWarp : public ForwardWarp<S> {
 public:
  __device__ __forceinline__ DecodeWarp(uint32_t q, uint32_t tile, int lane) {
    this->start(q, tile, tile + S::TileKv::kBytes, lane);
    k_lane_ = this->k_;
    v_lane_ = this->v_;
  }

  // Works on keys 16 `slice` ... of the tile `offset` bytes behind the first.
  __device__ __forceinline__ void aim(int offset, int slice) {
    this->k_ = k_lane_ + offset + slice * 16 * S::TileKv::kRowBytes;
    this->v_ = v_lane_ + offset + slice * 16 * S::TileKv::kRowBytes;
  }

  // Maximum (as a power of 2) and sum of rows lane / 4 and lane / 4 + 8.
  __device__ __forceinline__ float2 statistics(int row) const {
    float sum = this->sum_[row];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    return make_float2(this->shift_[row], sum);
  }

  // The output times a factor per row to shared memory, as a TileO.
  __device__ __forceinline__ void stage(uint32_t tile, const float (&factor)[2], int lane) const {
    const uint32_t to = S::TileO::lane_accumulator(tile, lane);
#pragma unroll
    for (int d = 0; d < S::kTilesD; ++d) {
      Accumulator x = this->output_[0][d];
#pragma unroll
      for (int e = 0; e < 4; ++e) x.r[e] *= factor[e / 2];
      S::TileO::store(to, 0, d, x);
    }
  }

 private:
  uint32_t k_lane_, v_lane_;
};

// Four numbers of an output row, of which `count` exist.
template <class T>
__device__ __forceinline__ void store_four(T* to, const float (&x)[4], int count, bool aligned) {
  if (aligned && count >= 4) {  // in one piece, which the compiler would not see to
    if constexpr (sizeof(T) == 4) {
      asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]),
                   "f"(x[2]), "f"(x[3]));
    } else {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(pack<T>(x[0], x[1])),
                   "r"(pack<T>(x[2], x[3])));
    }
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e < count) to[e] = T(x[e]);
    }
  }
}

// What a row is worth when the terms of all keys and of the sink are together.
struct RowEnd {
  float factor, lse;  // of the output

  // top: a power of 2; sink in natural units, -inf: none.
  __device__ __forceinline__ RowEnd(float top, float sum, float sink) {
    const float all = fmaxf(top, sink * kLog2e);
    const float shrink = top == -INFINITY ? 0.0f : exp2f(top - all);
    if (sink != -INFINITY) sum = sum * shrink + exp2f(sink * kLog2e - all);
    lse = sum == 0.0f ? -INFINITY : (all + log2f(sum)) * kLn2;
    factor = sum > 0.0f ? shrink / sum : sum == 0.0f ? 0.0f : sum;
  }
};

// The kernels of one dtype, in order on the stream. `asynchronous`: whether the GPU has cp.async.
template <class T>
void launch_decode(const AttentionForward& p, const DecodePlan& plan, bool asynchronous,
                   cudaStream_t stream);

}  // namespace fl
