// Comparisons and what chooses by them: setp, set, selp, slct.
#include <array>
#include <type_traits>

#include "ops_arithmetic.h"

namespace sim {
namespace {

enum Comparison {
  kEq,
  kNe,
  kLt,
  kLe,
  kGt,
  kGe,
  kEqu,
  kNeu,
  kLtu,
  kLeu,
  kGtu,
  kGeu,
  kNum,
  kNan,
  kComparisons
};

constexpr const char* kNames[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                  "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};

// The names of unsigned comparisons: lo, ls, hi, hs.
int comparison_of(const std::string& word) {
  static const std::pair<const char*, Comparison> kUnsigned[] = {
      {"lo", kLt}, {"ls", kLe}, {"hi", kGt}, {"hs", kGe}};
  for (const auto& [name, comparison] : kUnsigned) {
    if (word == name) return comparison;
  }
  for (int c = 0; c < kComparisons; ++c) {
    if (word == kNames[c]) return c;
  }
  return -1;
}

template <int kComparison, class T>
bool holds(T a, T b) {
  const bool unordered = a != a || b != b;
  switch (kComparison) {
    case kEq:
      return a == b;
    case kNe:
      return a != b && !unordered;
    case kLt:
      return a < b;
    case kLe:
      return a <= b;
    case kGt:
      return a > b;
    case kGe:
      return a >= b;
    case kEqu:
      return a == b || unordered;
    case kNeu:
      return a != b;
    case kLtu:
      return !(a >= b);
    case kLeu:
      return !(a > b);
    case kGtu:
      return !(a <= b);
    case kGeu:
      return !(a < b);
    case kNum:
      return !unordered;
    default:
      return unordered;
  }
}

struct F16 {
  using Slot = uint32_t;
  static float load(Slot x) { return f16_to_f32(x); }
};
struct Bf16 {
  using Slot = uint32_t;
  static float load(Slot x) { return bf16_to_f32(x); }
};
struct F32 {
  using Slot = uint32_t;
  static float load(Slot x) { return f32_of_bits(x); }
};
struct F32Flushed {
  using Slot = uint32_t;
  static float load(Slot x) { return flush(f32_of_bits(x)); }
};
struct F64 {
  using Slot = uint64_t;
  static double load(Slot x) { return std::bit_cast<double>(x); }
};
template <class T>
struct Int {
  using Slot = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static T load(Slot x) { return static_cast<T>(x); }
};

using Compare = uint32_t (*)(Warp&, Ref, Ref);

template <int kComparison, class T>
uint32_t compare(Warp& w, Ref a, Ref b) {
  const auto *x = w.lanes<typename T::Slot>(a), *y = w.lanes<typename T::Slot>(b);
  uint32_t lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    lanes[lane] = holds<kComparison>(T::load(x[lane]), T::load(y[lane]));
  }
  uint32_t result = 0;
  for (int lane = 0; lane < kLanes; ++lane) result |= lanes[lane] << lane;
  return result;
}

template <class T, size_t... kAll>
Compare pick(int comparison, std::index_sequence<kAll...>) {
  static constexpr Compare kCompares[] = {compare<static_cast<int>(kAll), T>...};
  return kCompares[comparison];
}

template <class T>
Compare pick(int comparison) {
  return pick<T>(comparison, std::make_index_sequence<kComparisons>());
}

Compare compare_for(const std::string& type, int comparison, bool ftz) {
  if (type == "f16") return pick<F16>(comparison);
  if (type == "bf16") return pick<Bf16>(comparison);
  if (type == "f32") return ftz ? pick<F32Flushed>(comparison) : pick<F32>(comparison);
  if (type == "f64") return pick<F64>(comparison);
  if (type == "s16") return pick<Int<int16_t>>(comparison);
  if (type == "u16" || type == "b16") return pick<Int<uint16_t>>(comparison);
  if (type == "s32") return pick<Int<int32_t>>(comparison);
  if (type == "u32" || type == "b32") return pick<Int<uint32_t>>(comparison);
  if (type == "s64") return pick<Int<int64_t>>(comparison);
  if (type == "u64" || type == "b64") return pick<Int<uint64_t>>(comparison);
  return nullptr;
}

enum Combine : uint64_t { kPlain, kAnd, kOr, kXor };

uint32_t combined(uint32_t a, uint32_t b, uint64_t how) {
  return how == kAnd ? a & b : how == kOr ? a | b : how == kXor ? a ^ b : a;
}

// What a comparison needs besides its operands.
struct Plan {
  Compare compare;
  uint64_t combine = kPlain;
  bool negated = false;  // the predicate it is combined with
};

// ops: p, q, a, b, c.
void setp(Warp& w, const Instr& i, uint32_t mask) {
  const Plan& plan = *static_cast<const Plan*>(i.extra);
  const uint32_t t = plan.compare(w, i.ops[2], i.ops[3]);
  uint32_t c = plan.combine ? w.predicate(i.ops[4]) : 0;
  if (plan.negated) c = ~c;
  w.write_predicate(i.ops[0], combined(t, c, plan.combine), mask);
  w.write_predicate(i.ops[1], combined(~t, c, plan.combine), mask);
}

// ops: d, a, b, c; aux: what is written for true.
void set(Warp& w, const Instr& i, uint32_t mask) {
  const Plan& plan = *static_cast<const Plan*>(i.extra);
  uint32_t t = plan.compare(w, i.ops[1], i.ops[2]);
  if (plan.combine)
    t = combined(t, plan.negated ? ~w.predicate(i.ops[3]) : w.predicate(i.ops[3]), plan.combine);
  uint32_t value[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    value[lane] = t >> lane & 1 ? static_cast<uint32_t>(i.aux) : 0;
  }
  w.write(i.ops[0], value, mask);
}

ptx::Operand sink() {
  ptx::Operand o;
  o.form = ptx::Operand::kSink;
  return o;
}

Plan plan_of(const ptx::Instruction& i, const std::string& type) {
  Plan plan;
  const int comparison = comparison_of(i.modifiers.at(0));
  if (comparison < 0) unknown(i);
  plan.compare = compare_for(type, comparison, i.has("ftz"));
  plan.combine = i.has("and") ? kAnd : i.has("or") ? kOr : i.has("xor") ? kXor : kPlain;
  if (plan.compare == nullptr) unknown(i);
  return plan;
}

void check_compare(const ptx::Instruction& i) {
  const std::vector<std::string> types = i.types();
  for (size_t m = 1; m < i.modifiers.size(); ++m) {
    const std::string& word = i.modifiers[m];
    const bool known = word == "and" || word == "or" || word == "xor" || word == "ftz";
    if (!known && std::find(types.begin(), types.end(), word) == types.end()) unknown(i);
  }
}

Class class_of(const std::string& type) {
  return type == "f64"                      ? Class::kFp64
         : type == "f32"                    ? Class::kFp32
         : type[0] == 'f' || type == "bf16" ? Class::kHalf
                                            : Class::kInteger;
}

// The operands, and the predicate that the comparison is joined with.
void finish(const ptx::Instruction& i, Assembler& a, Instr* instr, Plan plan,
            std::vector<Ref> refs) {
  if (plan.combine) {
    ptx::Operand c = i.operands.at(3);
    plan.negated = c.negated;
    c.negated = false;
    refs.push_back(a.read(c, 1));
  }
  instr->extra = a.own(std::make_shared<Plan>(plan));
  a.set_ops(instr, refs);
}

void decode_setp(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_compare(i);
  const std::string type = i.types().at(0);
  const Plan plan = plan_of(i, type);
  const int bits = 8 * ptx::bytes_of(type);
  const bool pair = i.operands[0].form == ptx::Operand::kPair;
  const char* real = type[0] == 'f' || type == "bf16" ? type.c_str() : "";
  std::vector<Ref> refs = {a.write(pair ? i.operands[0].parts[0] : i.operands[0], 1),
                           a.write(pair ? i.operands[0].parts[1] : sink(), 1),
                           a.read(i.operands[1], bits, real), a.read(i.operands[2], bits, real)};
  finish(i, a, instr, plan, refs);
  instr->exec = setp;
  instr->klass = class_of(type);
}

void decode_set(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_compare(i);
  const std::vector<std::string> types = i.types();
  const std::string type = types.at(1);
  const Plan plan = plan_of(i, type);
  const int bits = 8 * ptx::bytes_of(type);
  if (types[0] != "f32" && types[0] != "u32" && types[0] != "s32") unknown(i);
  instr->aux = types[0] == "f32" ? bits_of_f32(1.0f) : 0xffffffffu;
  const char* real = type[0] == 'f' || type == "bf16" ? type.c_str() : "";
  std::vector<Ref> refs = {a.write(i.operands[0], 32), a.read(i.operands[1], bits, real),
                           a.read(i.operands[2], bits, real)};
  finish(i, a, instr, plan, refs);
  instr->exec = set;
  instr->klass = class_of(type);
}

// ops: d, a, b, p.
template <class T>
void select(Warp& w, const Instr& i, uint32_t mask) {
  T value[kLanes];
  const T *a = w.lanes<T>(i.ops[1]), *b = w.lanes<T>(i.ops[2]);
  const uint32_t p = w.predicate(i.ops[3]);
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = p >> lane & 1 ? a[lane] : b[lane];
  w.write(i.ops[0], value, mask);
}

void decode_selp(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  if (i.modifiers.size() != 1) unknown(i);
  const std::string type = i.types().at(0);
  const int bits = 8 * ptx::bytes_of(type);
  const char* real = type[0] == 'f' ? type.c_str() : "";
  if (bits < 16 || bits > 64) unknown(i);
  instr->exec = bits == 64 ? select<uint64_t> : select<uint32_t>;
  instr->klass = Class::kMove;
  a.set_ops(instr, {a.write(i.operands[0], bits), a.read(i.operands[1], bits, real),
                    a.read(i.operands[2], bits, real), a.read(i.operands[3], 1)});
}

// slct: a where c >= 0, else b. aux: 1 c is f32.
template <class T>
void slct(Warp& w, const Instr& i, uint32_t mask) {
  T value[kLanes];
  const T *a = w.lanes<T>(i.ops[1]), *b = w.lanes<T>(i.ops[2]);
  const uint32_t* c = w.lanes<uint32_t>(i.ops[3]);
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool first = i.aux ? f32_of_bits(c[lane]) >= 0 : static_cast<int32_t>(c[lane]) >= 0;
    value[lane] = first ? a[lane] : b[lane];
  }
  w.write(i.ops[0], value, mask);
}

void decode_slct(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  if (i.modifiers.size() != 2) unknown(i);
  const std::vector<std::string> types = i.types();
  const int bits = 8 * ptx::bytes_of(types.at(0));
  const char* real = types[0][0] == 'f' ? types[0].c_str() : "";
  instr->aux = types.at(1) == "f32";
  instr->exec = bits == 64 ? slct<uint64_t> : slct<uint32_t>;
  instr->klass = Class::kMove;
  a.set_ops(instr, {a.write(i.operands[0], bits), a.read(i.operands[1], bits, real),
                    a.read(i.operands[2], bits, real), a.read(i.operands[3], 32)});
}

}  // namespace

void add_compare(Decoders* decoders) {
  Decoders& d = *decoders;
  d["setp"] = decode_setp;
  d["set"] = decode_set;
  d["selp"] = decode_selp;
  d["slct"] = decode_slct;
}

}  // namespace sim
