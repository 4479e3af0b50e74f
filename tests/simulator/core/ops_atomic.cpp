// atom and red. Blocks run in parallel, so that global memory is updated by compare and swap.
#include <atomic>
#include <cstring>

#include "address.h"
#include "ops_arithmetic.h"
#include "ops_memory.h"

namespace sim {
namespace {

struct Atomic {
  Where where;
  uint32_t bytes, count;     // of an element; elements
  Update update, in_shared;  // what it does to shared memory
  bool returns, swaps;       // atom; cas has an operand more
};

template <class T>
T as(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
uint64_t bits(T value) {
  uint64_t all = 0;
  std::memcpy(&all, &value, sizeof value);
  return all;
}

template <class T>
Update integer_update(const ptx::Instruction& i) {
  if (i.has("add")) {
    return [](uint64_t a, uint64_t b, uint64_t) { return bits<T>(static_cast<T>(a + b)); };
  }
  if (i.has("min")) {
    return [](uint64_t a, uint64_t b, uint64_t) { return bits(std::min(as<T>(a), as<T>(b))); };
  }
  if (i.has("max")) {
    return [](uint64_t a, uint64_t b, uint64_t) { return bits(std::max(as<T>(a), as<T>(b))); };
  }
  if (i.has("inc")) {
    return [](uint64_t a, uint64_t b, uint64_t) { return as<T>(a) >= as<T>(b) ? 0 : a + 1; };
  }
  if (i.has("dec")) {
    return [](uint64_t a, uint64_t b, uint64_t) {
      return a == 0 || as<T>(a) > as<T>(b) ? bits(as<T>(b)) : a - 1;
    };
  }
  unknown(i);
}

Update bit_update(const ptx::Instruction& i) {
  if (i.has("and")) return [](uint64_t a, uint64_t b, uint64_t) { return a & b; };
  if (i.has("or")) return [](uint64_t a, uint64_t b, uint64_t) { return a | b; };
  if (i.has("xor")) return [](uint64_t a, uint64_t b, uint64_t) { return a ^ b; };
  if (i.has("exch")) return [](uint64_t, uint64_t b, uint64_t) { return b; };
  if (i.has("cas")) return [](uint64_t a, uint64_t b, uint64_t c) { return a == b ? c : a; };
  unknown(i);
}

template <class T>
T flushed(T x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(T{0}, x) : x;
}

// Sums of f32 in global memory flush subnormal numbers; those in shared memory keep them.
uint64_t add_flushing(uint64_t a, uint64_t b, uint64_t) {
  return bits(flushed(flushed(as<float>(a)) + flushed(as<float>(b))));
}

template <class T>
uint64_t add_real(uint64_t a, uint64_t b, uint64_t) {
  return bits(as<T>(a) + as<T>(b));
}

float sum(float a, float b) { return a + b; }

// 16-bit numbers, one or two of them side by side.
template <float (*kWiden)(uint32_t), uint32_t (*kNarrow)(float), float (*kJoin)(float, float)>
uint64_t halves(uint64_t a, uint64_t b, uint64_t) {
  const auto part = [&](int shift) {
    return kNarrow(kJoin(kWiden(a >> shift & 0xffff), kWiden(b >> shift & 0xffff))) & 0xffff;
  };
  return part(0) | part(16) << 16;
}

template <float (*kWiden)(uint32_t), uint32_t (*kNarrow)(float)>
Update half_update(const ptx::Instruction& i) {
  if (i.has("add")) return halves<kWiden, kNarrow, sum>;
  if (i.has("min")) return halves<kWiden, kNarrow, ptx_min<float>>;
  if (i.has("max")) return halves<kWiden, kNarrow, ptx_max<float>>;
  unknown(i);
}

template <class T>
uint64_t exchange(uint8_t* at, Update update, uint64_t b, uint64_t c) {
  std::atomic_ref<T> word(*reinterpret_cast<T*>(at));
  T old = word.load();
  while (!word.compare_exchange_weak(old, static_cast<T>(update(old, b, c)))) {
  }
  return old;
}

uint64_t operand(Warp& w, Ref ref, uint32_t bytes, int lane) {
  return bytes == 8 ? w.lanes<uint64_t>(ref)[lane] : w.lanes<uint32_t>(ref)[lane];
}

// ops: destinations, sources, the new value of cas, address.
void run(Warp& w, const Instr& i, uint32_t mask) {
  const Atomic& atomic = *static_cast<const Atomic*>(i.extra);
  uint8_t* at[kLanes];
  const uint64_t* address = w.lanes<uint64_t>(i.ops[i.op_count - 1]);
  resolve(w, i, address, atomic.where, atomic.bytes * atomic.count, Use::kAtomic, mask, at);
  const auto is_shared = [&](int lane) {
    const uint64_t generic = address[lane] + static_cast<uint64_t>(i.imm);
    return atomic.where == Where::kShared || (generic & kWindowMask) == kSharedWindow;
  };
  const uint32_t first = atomic.returns ? atomic.count : 0;
  for (uint32_t e = 0; e < atomic.count; ++e) {
    uint64_t old[kLanes] = {};
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const uint64_t b = operand(w, i.ops[first + e], atomic.bytes, lane);
      const uint64_t c = atomic.swaps ? operand(w, i.ops[first + 1], atomic.bytes, lane) : 0;
      const Update update = is_shared(lane) ? atomic.in_shared : atomic.update;
      old[lane] = apply_update(at[lane] + e * atomic.bytes, atomic.bytes, update, b, c);
    }
    if (!atomic.returns) continue;
    if (atomic.bytes == 8) {
      w.write(i.ops[e], old, mask);
    } else {
      uint32_t narrow[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) narrow[lane] = static_cast<uint32_t>(old[lane]);
      w.write(i.ops[e], narrow, mask);
    }
  }
}

void decode(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_memory_modifiers(i, {"add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas",
                             "noftz", "v2", "v4", "v8"});
  const std::vector<std::string> types = i.types();
  if (types.size() != 1) unknown(i);
  Atomic atomic{};
  atomic.where = space_of(i);
  atomic.bytes = static_cast<uint32_t>(ptx::bytes_of(types[0]));
  atomic.returns = i.opcode == "atom";
  atomic.swaps = i.has("cas");
  atomic.update = update_of(i, types[0], false);
  atomic.in_shared = update_of(i, types[0], true);
  const size_t at = atomic.returns ? 1 : 0;
  const std::vector<ptx::Operand> sources = elements(i.operands.at(at + 1));
  atomic.count = static_cast<uint32_t>(sources.size());
  if (atomic.bytes * atomic.count > 16 || atomic.bytes < 2) unknown(i);
  if (atomic.count > 1 && a.target() < 90) fault(Kind::kUnsupported, -1, i.text(), " needs sm_90");
  const size_t expected = at + 2 + atomic.swaps + i.has("L2::cache_hint");
  if (i.operands.size() != expected) unknown(i);
  const int width = static_cast<int>(8 * atomic.bytes);
  const char* real =
      types[0][0] == 'f' && width >= 32 && !types[0].ends_with("x2") ? types[0].c_str() : "";
  std::vector<Ref> refs;
  if (atomic.returns) {
    for (const ptx::Operand& o : elements(i.operands[0])) refs.push_back(a.write(o, width));
    if (refs.size() != atomic.count) unknown(i);
  }
  for (const ptx::Operand& o : sources) refs.push_back(a.read(o, width, real));
  if (atomic.swaps) refs.push_back(a.read(i.operands[at + 2], width));
  refs.push_back(a.address(i.operands[at], &instr->imm));
  instr->klass = atomic.where == Where::kShared ? Class::kShared : Class::kGlobal;
  instr->extra = a.own(std::make_shared<Atomic>(atomic));
  instr->exec = run;
  a.set_ops(instr, refs);
}

}  // namespace

Update update_of(const ptx::Instruction& i, const std::string& type, bool in_shared) {
  if (type == "u32") return integer_update<uint32_t>(i);
  if (type == "s32") return integer_update<int32_t>(i);
  if (type == "u64") return integer_update<uint64_t>(i);
  if (type == "s64") return integer_update<int64_t>(i);
  if (type[0] == 'b' && type[1] != 'f') return bit_update(i);
  if (type.rfind("f16", 0) == 0) return half_update<f16_to_f32, f32_to_f16>(i);
  if (type.rfind("bf16", 0) == 0) return half_update<bf16_to_f32, f32_to_bf16>(i);
  if (!i.has("add")) unknown(i);
  if (type == "f64") return add_real<double>;
  if (type == "f32") return in_shared ? add_real<float> : add_flushing;
  unknown(i);
}

uint64_t apply_update(uint8_t* at, uint32_t bytes, Update update, uint64_t b, uint64_t c) {
  if (bytes == 2) return exchange<uint16_t>(at, update, b, c);
  if (bytes == 4) return exchange<uint32_t>(at, update, b, c);
  return exchange<uint64_t>(at, update, b, c);
}

void add_atomics(Decoders* decoders) {
  (*decoders)["atom"] = decode;
  (*decoders)["red"] = decode;
}

}  // namespace sim
