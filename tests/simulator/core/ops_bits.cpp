// Logic, shifts and fields of bits.
#include <type_traits>

#include "ops_arithmetic.h"

namespace sim {
namespace {

struct And {
  template <class T>
  static T of(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T of(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T of(T a, T b) {
    return a ^ b;
  }
};
struct Not {
  template <class T>
  static T of(T a, T) {
    return static_cast<T>(~a);
  }
};
struct Cnot {
  template <class T>
  static T of(T a, T) {
    return a == 0;
  }
};

template <class Op, class T>
void logic(Warp& w, const Instr& i, uint32_t mask) {
  each_lane<T, T>(w, i, mask, i.op_count - 1, [](T a, T b, T) { return Op::of(a, b); });
}

template <class Op>
void logic16(Warp& w, const Instr& i, uint32_t mask) {
  each_lane<uint32_t, uint32_t>(w, i, mask, i.op_count - 1, [](uint32_t a, uint32_t b, uint32_t) {
    return static_cast<uint32_t>(Op::of(a, b)) & 0xffffu;
  });
}

// aux: bit n set: source n is negated (!%p).
template <class Op>
void logic_predicate(Warp& w, const Instr& i, uint32_t mask) {
  uint32_t a = w.predicate(i.ops[1]), b = i.op_count > 2 ? w.predicate(i.ops[2]) : 0;
  if (i.aux & 1) a = ~a;
  if (i.aux & 2) b = ~b;
  w.write_predicate(i.ops[0], Op::of(a, b), mask);
}

int bits_of(const ptx::Instruction& i) { return 8 * ptx::bytes_of(i.types().at(0)); }

template <class Op>
void decode_logic(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"pred", "b16", "b32", "b64"});
  instr->klass = Class::kInteger;
  if (i.has("pred")) {
    std::vector<Ref> refs = {a.write(i.operands[0], 1)};
    for (size_t s = 1; s < i.operands.size(); ++s) {
      ptx::Operand source = i.operands[s];
      instr->aux |= uint64_t{source.negated} << (s - 1);
      source.negated = false;
      refs.push_back(a.read(source, 1));
    }
    instr->exec = logic_predicate<Op>;
    return a.set_ops(instr, refs);
  }
  const int bits = bits_of(i);
  instr->exec = bits == 64 ? logic<Op, uint64_t> : bits == 32 ? logic<Op, uint32_t> : logic16<Op>;
  a.set_ops(instr, lane_refs(i, a, bits));
}

// Shift amounts beyond the width shift everything out.
template <class T, bool kLeft>
void shift(Warp& w, const Instr& i, uint32_t mask) {
  using Slot = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  constexpr uint32_t kBits = 8 * sizeof(T);
  Slot value[kLanes];
  const Slot* a = w.lanes<Slot>(i.ops[1]);
  const uint32_t* by = w.lanes<uint32_t>(i.ops[2]);
  for (int lane = 0; lane < kLanes; ++lane) {
    const T x = static_cast<T>(a[lane]);
    const bool out = by[lane] >= kBits;
    const uint32_t n = out ? kBits - 1 : by[lane];
    T r;
    if constexpr (kLeft) {
      r = static_cast<T>(out ? 0 : static_cast<std::make_unsigned_t<T>>(x) << n);
    } else {
      r = static_cast<T>(out && std::is_unsigned_v<T> ? 0 : x >> n);
    }
    value[lane] = static_cast<Slot>(static_cast<std::make_unsigned_t<T>>(r));
  }
  w.write(i.ops[0], value, mask);
}

template <bool kLeft>
void decode_shift(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"});
  const std::string type = i.types().at(0);
  const bool sign = type[0] == 's';
  const int bits = bits_of(i);
  if (bits == 64) {
    instr->exec = sign ? shift<int64_t, kLeft> : shift<uint64_t, kLeft>;
  } else if (bits == 32) {
    instr->exec = sign ? shift<int32_t, kLeft> : shift<uint32_t, kLeft>;
  } else {
    instr->exec = sign ? shift<int16_t, kLeft> : shift<uint16_t, kLeft>;
  }
  instr->klass = Class::kInteger;
  a.set_ops(instr,
            {a.write(i.operands[0], bits), a.read(i.operands[1], bits), a.read(i.operands[2], 32)});
}

// shf: 32 bits of the 64 in b:a. aux: 1 left, 2 clamps the amount to 32 (else it wraps).
void funnel(Warp& w, const Instr& i, uint32_t mask) {
  each_lane<uint32_t, uint32_t>(w, i, mask, 3, [&](uint32_t a, uint32_t b, uint32_t c) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    const uint32_t n = (i.aux & 2) ? std::min(c, 32u) : c & 31;
    return static_cast<uint32_t>((i.aux & 1) ? (both << n) >> 32 : both >> n);
  });
}

void decode_funnel(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"l", "r", "clamp", "wrap", "b32"});
  instr->aux = (i.has("l") ? 1 : 0) | (i.has("clamp") ? 2 : 0);
  instr->exec = funnel;
  instr->klass = Class::kInteger;
  a.set_ops(instr, lane_refs(i, a, 32));
}

// aux: the table of the eight combinations.
uint32_t lop3_of(uint32_t a, uint32_t b, uint32_t c, uint64_t table) {
  uint32_t r = 0;
  for (int n = 0; n < 8; ++n) {
    if (!(table >> n & 1)) continue;
    r |= ((n & 4) ? a : ~a) & ((n & 2) ? b : ~b) & ((n & 1) ? c : ~c);
  }
  return r;
}

void lop3(Warp& w, const Instr& i, uint32_t mask) {
  const uint64_t table = i.aux;
  each_lane<uint32_t, uint32_t>(w, i, mask, 3, [table](uint32_t a, uint32_t b, uint32_t c) {
    return lop3_of(a, b, c, table);
  });
}

void decode_lop3(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"b32"});
  int64_t table;
  if (!a.is_immediate(i.operands.at(4), &table)) unknown(i);
  instr->aux = static_cast<uint64_t>(table);
  instr->exec = lop3;
  instr->klass = Class::kInteger;
  a.set_ops(instr, {a.write(i.operands[0], 32), a.read(i.operands[1], 32),
                    a.read(i.operands[2], 32), a.read(i.operands[3], 32)});
}

enum Permute : uint64_t { kDefault, kF4e, kB4e, kRc8, kEcl, kEcr, kRc16 };

// Which byte of b:a each byte of the result is; bit 3: its sign, spread. PTX ISA, prmt.
uint32_t permute_of(uint32_t a, uint32_t b, uint32_t c, Permute mode) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t r = 0;
  for (uint32_t n = 0; n < 4; ++n) {
    uint32_t from = 0;
    const uint32_t s = c & 3;
    switch (mode) {
      case kDefault:
        from = c >> (4 * n) & 15;
        break;
      case kF4e:
        from = (s + n) & 7;
        break;
      case kB4e:
        from = (s - n) & 7;
        break;
      case kRc8:
        from = s;
        break;
      case kEcl:
        from = std::max(s, n);
        break;
      case kEcr:
        from = std::min(s, n);
        break;
      case kRc16:
        from = 2 * (s & 1) + (n & 1);
        break;
    }
    const auto byte = static_cast<uint8_t>(both >> (8 * (from & 7)));
    const uint32_t out = (from & 8) ? ((byte & 0x80) ? 0xffu : 0u) : byte;
    r |= out << (8 * n);
  }
  return r;
}

template <Permute kMode>
void permute(Warp& w, const Instr& i, uint32_t mask) {
  each_lane<uint32_t, uint32_t>(
      w, i, mask, 3, [](uint32_t a, uint32_t b, uint32_t c) { return permute_of(a, b, c, kMode); });
}

void decode_permute(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"b32", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"});
  instr->exec = i.has("f4e")    ? permute<kF4e>
                : i.has("b4e")  ? permute<kB4e>
                : i.has("rc8")  ? permute<kRc8>
                : i.has("ecl")  ? permute<kEcl>
                : i.has("ecr")  ? permute<kEcr>
                : i.has("rc16") ? permute<kRc16>
                                : permute<kDefault>;
  instr->klass = Class::kInteger;
  a.set_ops(instr, lane_refs(i, a, 32));
}

// bfe d, a, position, length: zero- or sign-extended.
template <class T>
void extract(Warp& w, const Instr& i, uint32_t mask) {
  using U = std::make_unsigned_t<T>;
  constexpr uint32_t kBits = 8 * sizeof(T);
  U value[kLanes];
  const U* a = w.lanes<U>(i.ops[1]);
  const uint32_t *at = w.lanes<uint32_t>(i.ops[2]), *size = w.lanes<uint32_t>(i.ops[3]);
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t position = at[lane] & 0xff, length = size[lane] & 0xff;
    U r = position >= kBits ? 0 : a[lane] >> position;
    const U field = length >= kBits ? ~U{0} : (U{1} << length) - 1;
    const uint32_t last = std::min(position + length - 1, kBits - 1);
    const bool negative = std::is_signed_v<T> && length && (a[lane] >> last & 1);
    r &= field;
    const uint32_t kept = position >= kBits ? 0 : std::min(length, kBits - position);
    if (negative) r |= kept >= kBits ? 0 : ~U{0} << kept;
    value[lane] = r;
  }
  w.write(i.ops[0], value, mask);
}

void decode_extract(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"u32", "s32", "u64", "s64"});
  const std::string type = i.types().at(0);
  const int bits = bits_of(i);
  instr->exec = type == "u32"   ? extract<uint32_t>
                : type == "s32" ? extract<int32_t>
                : type == "u64" ? extract<uint64_t>
                                : extract<int64_t>;
  instr->klass = Class::kInteger;
  a.set_ops(instr, {a.write(i.operands[0], bits), a.read(i.operands[1], bits),
                    a.read(i.operands[2], 32), a.read(i.operands[3], 32)});
}

// bfi d, a, b, position, length: the low bits of a put into b.
template <class T>
void insert(Warp& w, const Instr& i, uint32_t mask) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  T value[kLanes];
  const T *a = w.lanes<T>(i.ops[1]), *b = w.lanes<T>(i.ops[2]);
  const uint32_t *at = w.lanes<uint32_t>(i.ops[3]), *size = w.lanes<uint32_t>(i.ops[4]);
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t position = at[lane] & 0xff, length = size[lane] & 0xff;
    const T ones = length >= kBits ? ~T{0} : (T{1} << length) - 1;
    const T field = position >= kBits ? 0 : ones << position;
    const T moved = position >= kBits ? 0 : a[lane] << position;
    value[lane] = (b[lane] & ~field) | (moved & field);
  }
  w.write(i.ops[0], value, mask);
}

void decode_insert(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"b32", "b64"});
  const int bits = bits_of(i);
  instr->exec = bits == 64 ? insert<uint64_t> : insert<uint32_t>;
  instr->klass = Class::kInteger;
  a.set_ops(instr,
            {a.write(i.operands[0], bits), a.read(i.operands[1], bits), a.read(i.operands[2], bits),
             a.read(i.operands[3], 32), a.read(i.operands[4], 32)});
}

struct Popc {
  template <class T>
  static uint64_t of(T x, uint64_t) {
    return static_cast<uint64_t>(std::popcount(x));
  }
};
struct Clz {
  template <class T>
  static uint64_t of(T x, uint64_t) {
    return static_cast<uint64_t>(std::countl_zero(x));
  }
};
// aux: 1 signed, 2 the distance from the top instead of the position.
struct Bfind {
  template <class T>
  static uint64_t of(T x, uint64_t aux) {
    if ((aux & 1) && x >> (8 * sizeof(T) - 1)) x = ~x;
    if (x == 0) return 0xffffffffu;
    const auto top = static_cast<uint64_t>(std::countl_zero(x));
    return (aux & 2) ? top : 8 * sizeof(T) - 1 - top;
  }
};

template <class Op, class T>
void count(Warp& w, const Instr& i, uint32_t mask) {
  uint32_t value[kLanes];
  const T* a = w.lanes<T>(i.ops[1]);
  for (int lane = 0; lane < kLanes; ++lane) {
    value[lane] = static_cast<uint32_t>(Op::of(a[lane], i.aux));
  }
  w.write(i.ops[0], value, mask);
}

template <class Op>
void decode_count(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"b32", "b64", "u32", "s32", "u64", "s64", "shiftamt"});
  const int bits = bits_of(i);
  instr->aux = (i.types()[0][0] == 's' ? 1 : 0) | (i.has("shiftamt") ? 2 : 0);
  instr->exec = bits == 64 ? count<Op, uint64_t> : count<Op, uint32_t>;
  instr->klass = Class::kInteger;
  a.set_ops(instr, {a.write(i.operands[0], 32), a.read(i.operands[1], bits)});
}

template <class T>
void reverse(Warp& w, const Instr& i, uint32_t mask) {
  each_lane<T, T>(w, i, mask, 1, [](T a, T, T) {
    T r = 0;
    for (size_t n = 0; n < 8 * sizeof(T); ++n) r |= (a >> n & 1) << (8 * sizeof(T) - 1 - n);
    return r;
  });
}

void decode_reverse(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"b32", "b64"});
  const int bits = bits_of(i);
  instr->exec = bits == 64 ? reverse<uint64_t> : reverse<uint32_t>;
  instr->klass = Class::kInteger;
  a.set_ops(instr, lane_refs(i, a, bits));
}

}  // namespace

void add_bits(Decoders* decoders) {
  Decoders& d = *decoders;
  d["and"] = decode_logic<And>;
  d["or"] = decode_logic<Or>;
  d["xor"] = decode_logic<Xor>;
  d["not"] = decode_logic<Not>;
  d["cnot"] = decode_logic<Cnot>;
  d["shl"] = decode_shift<true>;
  d["shr"] = decode_shift<false>;
  d["shf"] = decode_funnel;
  d["lop3"] = decode_lop3;
  d["prmt"] = decode_permute;
  d["bfe"] = decode_extract;
  d["bfi"] = decode_insert;
  d["popc"] = decode_count<Popc>;
  d["clz"] = decode_count<Clz>;
  d["bfind"] = decode_count<Bfind>;
  d["brev"] = decode_reverse;
}

}  // namespace sim
