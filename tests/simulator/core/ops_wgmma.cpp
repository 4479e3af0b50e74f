// wgmma: four warps multiply from shared memory, asynchronously. PTX ISA, "Asynchronous
// warpgroup-level matrix instructions".
//
// Each warp computes its own 16 of the 64 rows when it issues the instruction. Until the group is
// waited for, the registers are guarded: using them is an error. A wait ends when the four warps
// have come to it, so that what one of them says afterwards holds for the reads of all.
#include <algorithm>

#include "checker.h"
#include "launch.h"
#include "ops_arithmetic.h"
#include "ops_tensor.h"

namespace sim {
namespace {

constexpr int kGroupWarps = 4;

// Where a matrix lies in shared memory, in units of rows or columns of 16 bytes ("chunks").
struct Descriptor {
  uint64_t start, leading, stride;  // bytes
  uint32_t width;                   // chunks that the swizzle mixes: 1 (none), 2, 4, 8

  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4) {
    constexpr uint64_t kReserved = 0x3ff1'c000'c000'c000;
    if (bits & kReserved) {
      fault(Kind::kUnsupported, -1, "descriptor 0x", std::hex, bits, " has reserved bits");
    }
    if (bits >> 49 & 7) fault(Kind::kUnsupported, -1, "a descriptor with a base offset");
    const uint32_t mode = bits >> 62;
    width = mode == 0 ? 1 : 16u >> mode;
  }

  // Swizzles are functions of the address itself: bits 4.. are XORed with bits 7...
  uint64_t swizzled(uint64_t address) const { return address ^ (address >> 7 & (width - 1)) << 4; }

  // Row mn, chunk c of two along k. The 8 rows of a core matrix are one swizzle width apart.
  uint64_t k_major(uint32_t mn, uint32_t c) const {
    const uint64_t along_k = width == 1 ? leading : 16;
    return swizzled(start + mn / 8 * stride + mn % 8 * width * 16 + c * along_k);
  }

  // Chunk c of 8 elements along m or n, line k.
  uint64_t mn_major(uint32_t c, uint32_t k) const {
    const uint64_t across = width == 1 ? stride : leading, along_k = width == 1 ? leading : stride;
    return swizzled(start + c % width * 16 + c / width * across + k % 8 * width * 16 +
                    k / 8 * along_k);
  }
};

template <class T>
double element(const uint8_t* bytes) {
  uint32_t word = 0;
  std::memcpy(&word, bytes, T::kBytes);
  return T::value(word);
}

// put(mn, k, value) for 8 rows (of A) or columns (of B): block 8 * block .. 8 * block + 7.
template <class T, class Put>
void read_block(Warp& w, const Descriptor& d, [[maybe_unused]] bool mn_major, uint32_t block,
                Event event, Put put) {
  constexpr uint32_t kChunk = 16 / T::kBytes, kK = 2 * kChunk;
  if constexpr (T::kBytes == 2) {  // only these may be transposed
    for (uint32_t k = 0; mn_major && k < kK; ++k) {
      const uint8_t* chunk = shared_read_async(w, -1, d.mn_major(block, k), 16, event);
      for (uint32_t e = 0; e < kChunk; ++e) put(e, k, element<T>(chunk + e * T::kBytes));
    }
    if (mn_major) return;
  }
  for (uint32_t row = 0; row < 8; ++row) {
    for (uint32_t c = 0; c < 2; ++c) {
      const uint8_t* chunk = shared_read_async(w, -1, d.k_major(8 * block + row, c), 16, event);
      for (uint32_t e = 0; e < kChunk; ++e) {
        put(row, c * kChunk + e, element<T>(chunk + e * T::kBytes));
      }
    }
  }
}

// ops: accumulators, A (a descriptor or four registers), descriptor of B, scale-d.
struct Operation {
  uint32_t n = 0, accumulators = 0;
  bool a_shared = false, a_transposed = false, b_transposed = false, saturate = false;
  double scale = 1;
  const Ref* a(const Instr& i) const { return i.ops + accumulators; }
  const Ref* b(const Instr& i) const { return a(i) + (a_shared ? 1 : 4); }
  const Ref* scale_d(const Instr& i) const { return b(i) + 1; }
};

uint64_t uniform(Warp& w, Ref ref) {
  const uint64_t* lanes = w.lanes<uint64_t>(ref);
  for (int lane = 1; lane < kLanes; ++lane) {
    if (lanes[lane] != lanes[0]) fault(Kind::kDivergence, lane, "lanes with different descriptors");
  }
  return lanes[0];
}

bool uniform_predicate(Warp& w, Ref ref) {
  const uint32_t p = w.predicate(ref);
  if (p != 0 && p != kAll) fault(Kind::kDivergence, -1, "lanes with different scale-d");
  return p != 0;
}

// Whether a register belongs to an operation that was not waited for: 0, kInput or kSum.
enum Claim : uint32_t { kFree, kInput, kSum };

Claim claim(const WgmmaState& s, Ref ref) {
  if (ref.bank != 0) return kFree;
  const uint32_t entry = s.slots[ref.offset / 64];
  return entry / 2 <= s.done ? kFree : entry % 2 ? kSum : kInput;
}

void mix(WgmmaState* s, uint64_t value) {
  s->digest = (s->digest ^ value) * 0x100000001b3u;
  s->digest ^= s->digest >> 29;
}

void check_group(Warp& w, uint32_t mask) {
  need_whole_warp(mask);
  const size_t last = static_cast<size_t>(w.index / kGroupWarps + 1) * kGroupWarps;
  if (w.block->warps.size() < last) {
    fault(Kind::kDivergence, -1, "a warpgroup has four warps, this one fewer");
  }
}

void claim_registers(Warp& w, const Instr& i, const Operation& o) {
  WgmmaState& s = w.wgmma;
  s.slots.resize(w.block->launch->kernel->register_bytes / 64 + 1);
  for (uint32_t d = 0; d < o.accumulators; ++d) {
    if (claim(s, i.ops[d]) == kInput) {
      fault(Kind::kAsync, -1, "accumulates where a wgmma that was not waited for reads A");
    }
  }
  for (int r = 0; !o.a_shared && r < 4; ++r) {
    if (claim(s, o.a(i)[r]) == kSum) {
      fault(Kind::kAsync, -1, "reads A where a wgmma that was not waited for accumulates");
    }
  }
  for (uint32_t d = 0; d < o.accumulators; ++d) s.slots[i.ops[d].offset / 64] = 2 * s.group + 1;
  for (int r = 0; !o.a_shared && r < 4; ++r) s.slots[o.a(i)[r].offset / 64] = 2 * s.group;
  s.last = s.group;
  s.pending = true;
}

template <class T, int K>
void read_rows(Warp& w, const Instr& i, const Operation& o, Event event, TileA<K>& a) {
  if (o.a_shared) {
    const uint64_t bits = uniform(w, *o.a(i));
    mix(&w.wgmma, bits);
    const auto first = static_cast<uint32_t>(w.index % kGroupWarps * 2);
    for (uint32_t half = 0; half < 2; ++half) {
      read_block<T>(w, Descriptor(bits), o.a_transposed, first + half, event,
                    [&](uint32_t m, uint32_t k, double value) { a[8 * half + m][k] = value; });
    }
  } else {
    read_a<T, K>(w, o.a(i), a);
  }
  for (auto& row : a) {
    for (double& value : row) value *= o.scale;
  }
}

template <class A, class B, class Sum>
void mma_async(Warp& w, const Instr& i, uint32_t mask) {
  constexpr int kK = 32 / A::kBytes;
  check_group(w, mask);
  const auto& o = *static_cast<const Operation*>(i.extra);
  if (!w.wgmma.fenced) fault(Kind::kAsync, -1, "no wgmma.fence before the first wgmma");
  const bool adds = uniform_predicate(w, *o.scale_d(i));
  const uint64_t bits = uniform(w, *o.b(i));
  mix(&w.wgmma, w.pc * 2 + adds);
  mix(&w.wgmma, bits);
  const Descriptor b_matrix(bits);
  const Event event = w.block->checker->event(Actor::kWgmma, w.index, w.wgmma.group);
  claim_registers(w, i, o);
  TileA<kK> a;
  read_rows<A, kK>(w, i, o, event, a);
  for (uint32_t block = 0; block < o.n / 8; ++block) {
    TileB<kK> b;
    read_block<B>(w, b_matrix, o.b_transposed, block, event,
                  [&](uint32_t n, uint32_t k, double value) { b[k][n] = value; });
    const Ref* d = i.ops + block * Sum::kRegisters;
    TileC c = {};
    if (adds) Sum::read(w, d, c);
    Sum::template multiply<kK, kK>(a, b, c);
    Sum::write(w, d, c, o.saturate);
  }
}

struct Variant {
  const char *k, *d, *a, *b;
  Exec exec;
  int sums;  // accumulator registers per 8 columns
};

const Variant kVariants[] = {
    {"16", "f32", "f16", "f16", mma_async<F16, F16, SumF32>, 4},
    {"16", "f16", "f16", "f16", mma_async<F16, F16, SumF16>, 2},
    {"16", "f32", "bf16", "bf16", mma_async<Bf16, Bf16, SumF32>, 4},
    {"8", "f32", "tf32", "tf32", mma_async<Tf32, Tf32, SumF32>, 4},
    {"32", "f32", "e4m3", "e4m3", mma_async<E4m3, E4m3, SumF32>, 4},
    {"32", "f32", "e4m3", "e5m2", mma_async<E4m3, E5m2, SumF32>, 4},
    {"32", "f32", "e5m2", "e4m3", mma_async<E5m2, E4m3, SumF32>, 4},
    {"32", "f32", "e5m2", "e5m2", mma_async<E5m2, E5m2, SumF32>, 4},
    {"32", "f16", "e4m3", "e4m3", mma_async<E4m3, E4m3, SumF16>, 2},
    {"32", "f16", "e4m3", "e5m2", mma_async<E4m3, E5m2, SumF16>, 2},
    {"32", "f16", "e5m2", "e4m3", mma_async<E5m2, E4m3, SumF16>, 2},
    {"32", "f16", "e5m2", "e5m2", mma_async<E5m2, E5m2, SumF16>, 2},
    {"32", "s32", "s8", "s8", mma_async<S8, S8, SumS32>, 4},
    {"32", "s32", "s8", "u8", mma_async<S8, U8, SumS32>, 4},
    {"32", "s32", "u8", "s8", mma_async<U8, S8, SumS32>, 4},
    {"32", "s32", "u8", "u8", mma_async<U8, U8, SumS32>, 4},
};

// wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16
const Variant& variant(const ptx::Instruction& i, uint32_t* n) {
  std::vector<std::string> m = i.modifiers;
  std::erase(m, "satfinite");
  if (m.size() != 7 || m[1] != "sync" || m[2] != "aligned" || m[3].rfind("m64n", 0) != 0) {
    unknown(i);
  }
  const size_t k = m[3].find('k');
  if (k == std::string::npos) unknown(i);
  *n = static_cast<uint32_t>(std::stoul(m[3].substr(4, k - 4)));
  const bool integer = m[4] == "s32";
  const uint32_t step = integer && *n > 32 ? 16 : 8;
  if (*n == 0 || *n > 256 || *n % step != 0 || (i.has("satfinite") && !integer)) unknown(i);
  for (const Variant& v : kVariants) {
    if (m[3].substr(k + 1) == v.k && m[4] == v.d && m[5] == v.a && m[6] == v.b) return v;
  }
  unknown(i);
}

int64_t immediate(const ptx::Instruction& i, Assembler& a, size_t operand, int64_t low,
                  int64_t high) {
  int64_t value = 0;
  if (!a.is_immediate(i.operands.at(operand), &value) || (value != low && value != high)) {
    fault(Kind::kUnsupported, -1, i.text(), ": operand ", operand, " has to be ", low, " or ",
          high);
  }
  return value;
}

// scale-a, scale-b; for 16-bit elements trans-a (if A is in shared memory) and trans-b.
void decode_options(const ptx::Instruction& i, Assembler& a, const Variant& v, Operation* o) {
  const bool integer = v.d == std::string("s32"), wide = v.k == std::string("16");
  const size_t trans = wide ? (o->a_shared ? 2 : 1) : 0;
  if (i.operands.size() != (integer ? 4 : 6 + trans)) unknown(i);
  if (integer) return;
  o->scale = static_cast<double>(immediate(i, a, 4, -1, 1) * immediate(i, a, 5, -1, 1));
  if (trans == 2) o->a_transposed = immediate(i, a, 6, 0, 1) != 0;
  if (trans > 0) o->b_transposed = immediate(i, a, 5 + trans, 0, 1) != 0;
}

void decode_mma_async(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  auto o = std::make_shared<Operation>();
  const Variant& v = variant(i, &o->n);
  o->accumulators = o->n / 8 * static_cast<uint32_t>(v.sums);
  o->a_shared = i.operands.at(1).form != ptx::Operand::kVector;
  o->saturate = i.has("satfinite");
  decode_options(i, a, v, o.get());
  std::vector<Ref> refs;
  for (const ptx::Operand& p : i.operands[0].parts) refs.push_back(a.write(p, 32));
  if (refs.size() != o->accumulators || (!o->a_shared && i.operands[1].parts.size() != 4)) {
    unknown(i);
  }
  if (o->a_shared) refs.push_back(a.read(i.operands[1], 64));
  for (const ptx::Operand& p : i.operands[1].parts) refs.push_back(a.read(p, 32));
  refs.push_back(a.read(i.operands.at(2), 64));
  refs.push_back(a.read(i.operands.at(3), 1));
  instr->klass = Class::kTensor;
  instr->mma_flops = 2 * 16 * o->n * static_cast<uint32_t>(std::stoul(v.k));
  instr->exec = v.exec;
  instr->extra = a.own(o);
  a.set_ops(instr, refs);
}

void fence(Warp& w, const Instr&, uint32_t mask) {
  check_group(w, mask);
  w.wgmma.fenced = true;
}

void commit(Warp& w, const Instr&, uint32_t mask) {
  check_group(w, mask);
  mix(&w.wgmma, w.wgmma.group++);
}

// True: the other three warps are here, too, and have done the same as this one.
bool meet(Warp& w, uint64_t groups_left) {
  Warp* warps = &w.block->warps[static_cast<size_t>(w.index / kGroupWarps * kGroupWarps)];
  WgmmaState& mine = w.wgmma;
  if (!mine.waiting) {
    mix(&mine, groups_left);
    mine.waiting = true;
    ++mine.waits;
    const bool last = std::all_of(warps, warps + kGroupWarps,
                                  [&](const Warp& o) { return o.wgmma.waits == mine.waits; });
    for (int o = 0; last && o < kGroupWarps; ++o) {
      if (warps[o].wgmma.digest == mine.digest) continue;
      fault(Kind::kDivergence, -1, "warps ", warps[o].index, " and ", w.index,
            " of a warpgroup issued different wgmma");
    }
    if (last) ++w.block->progress;
  }
  return std::all_of(warps, warps + kGroupWarps,
                     [&](const Warp& o) { return o.wgmma.waits >= mine.waits; });
}

// imm: groups that may still be pending.
void wait(Warp& w, const Instr& i, uint32_t mask) {
  check_group(w, mask);
  const auto left = static_cast<uint64_t>(i.imm);
  if (!meet(w, left)) {  // this instruction runs again when the others had their turn
    --w.profile->issued[w.pc];
    --w.pc;
    w.yield = true;
    return;
  }
  WgmmaState& s = w.wgmma;
  s.waiting = false;
  const uint32_t committed = s.group - 1;
  if (committed > left) s.done = std::max(s.done, static_cast<uint32_t>(committed - left));
  s.pending = s.last > s.done;
  const int first = w.index / kGroupWarps * kGroupWarps;
  for (int o = first; o < first + kGroupWarps; ++o) {
    w.block->checker->learn(w.index, w.block->checker->event(Actor::kWgmma, o, s.done));
  }
}

void decode_wgmma(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  if (a.target() != 90) fault(Kind::kUnsupported, -1, i.text(), " needs sm_90a");
  const std::string what = i.modifiers.at(0);
  if (what == "mma_async") return decode_mma_async(i, a, instr);
  check_modifiers(i, {"fence", "commit_group", "wait_group", "sync", "aligned"});
  if (i.modifiers.size() != 3 || !i.has("sync") || !i.has("aligned")) unknown(i);
  instr->klass = Class::kTensor;
  instr->exec = what == "fence" ? fence : what == "commit_group" ? commit : wait;
  if (instr->exec != wait) return;
  if (!a.is_immediate(i.operands.at(0), &instr->imm) || instr->imm < 0) unknown(i);
}

}  // namespace

void guard_wgmma_registers(Warp& w, const Instr& i, uint32_t mask) {
  WgmmaState& s = w.wgmma;
  const Kernel& kernel = *w.block->launch->kernel;
  const auto claimed = [&](const Ref& ref) { return claim(s, ref) != kFree; };
  if (std::none_of(i.ops, i.ops + i.op_count, claimed)) return;
  const std::string& opcode = i.source == kNoSource ? "" : kernel.sources[i.source].opcode;
  if (opcode == "wgmma") return;
  if (opcode != "mov" || i.op_count != 2) {
    fault(Kind::kAsync, -1, "uses a register of a wgmma that was not waited for");
  }
  // Compilers copy operands of inline assembly about: the copy is as pending as its source.
  uint32_t& to = s.slots[i.ops[0].offset / 64];
  const uint32_t from = claimed(i.ops[1]) ? s.slots[i.ops[1].offset / 64] : 0;
  to = mask == kAll ? from : std::max(to, from);
}

void add_wgmma(Decoders* decoders) { (*decoders)["wgmma"] = decode_wgmma; }

}  // namespace sim
