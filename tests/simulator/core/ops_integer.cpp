// Integer arithmetic of 16, 32 and 64 bits.
#include <type_traits>

#include "ops_arithmetic.h"

namespace sim {
namespace {

// The registers of a type: 16 and 32 bits share a width.
template <class T>
using Slot = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
template <class T>
using Unsigned = std::make_unsigned_t<T>;

template <class T>
Slot<T> slot(T x) {
  return static_cast<Slot<T>>(static_cast<Unsigned<T>>(x));
}

template <class Op, class T>
void integer(Warp& w, const Instr& i, uint32_t mask) {
  each_lane<Slot<T>, Slot<T>>(w, i, mask, i.op_count - 1, [](Slot<T> a, Slot<T> b, Slot<T> c) {
    return slot<T>(Op::template of<T>(static_cast<T>(a), static_cast<T>(b), static_cast<T>(c)));
  });
}

struct Add {
  template <class T>
  static T of(T a, T b, T) {
    return static_cast<T>(Unsigned<T>(a) + Unsigned<T>(b));
  }
};
struct Sub {
  template <class T>
  static T of(T a, T b, T) {
    return static_cast<T>(Unsigned<T>(a) - Unsigned<T>(b));
  }
};
struct MulLo {
  template <class T>
  static T of(T a, T b, T) {
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
  }
};
struct MadLo {
  template <class T>
  static T of(T a, T b, T c) {
    return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b) +
                          static_cast<uint64_t>(c));
  }
};
template <class T>
T high_product(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> (8 * sizeof(T)));
}
struct MulHi {
  template <class T>
  static T of(T a, T b, T) {
    return high_product(a, b);
  }
};
struct MadHi {
  template <class T>
  static T of(T a, T b, T c) {
    return static_cast<T>(Unsigned<T>(high_product(a, b)) + Unsigned<T>(c));
  }
};
// A division by zero is undefined in PTX; GPUs give all ones, and the dividend as remainder.
struct Div {
  template <class T>
  static T of(T a, T b, T) {
    if (b == 0) return static_cast<T>(-1);
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(-Unsigned<T>(a));
    return static_cast<T>(a / b);
  }
};
struct Rem {
  template <class T>
  static T of(T a, T b, T) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
struct Min {
  template <class T>
  static T of(T a, T b, T) {
    return a < b ? a : b;
  }
};
struct Max {
  template <class T>
  static T of(T a, T b, T) {
    return a > b ? a : b;
  }
};
// The larger of Op and 0.
template <class Op>
struct Relu {
  template <class T>
  static T of(T a, T b, T c) {
    return Max::of<T>(Op::template of<T>(a, b, c), T(0), c);
  }
};
struct Neg {
  template <class T>
  static T of(T a, T, T) {
    return static_cast<T>(-Unsigned<T>(a));
  }
};
struct Abs {
  template <class T>
  static T of(T a, T, T) {
    return a < 0 ? static_cast<T>(-Unsigned<T>(a)) : a;
  }
};
struct Sad {
  template <class T>
  static T of(T a, T b, T c) {
    const Unsigned<T> distance =
        a < b ? Unsigned<T>(b) - Unsigned<T>(a) : Unsigned<T>(a) - Unsigned<T>(b);
    return static_cast<T>(Unsigned<T>(c) + distance);
  }
};

template <class Op>
Exec for_type(const std::string& type) {
  if (type == "u16" || type == "b16") return integer<Op, uint16_t>;
  if (type == "s16") return integer<Op, int16_t>;
  if (type == "u32" || type == "b32") return integer<Op, uint32_t>;
  if (type == "s32") return integer<Op, int32_t>;
  if (type == "u64" || type == "b64") return integer<Op, uint64_t>;
  if (type == "s64") return integer<Op, int64_t>;
  return nullptr;
}

int bits_of(const std::string& type) { return 8 * ptx::bytes_of(type); }

template <class Op>
void decode(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"u16", "s16", "u32", "s32", "u64", "s64", "lo", "hi"});
  const std::string type = i.types().at(0);
  instr->exec = for_type<Op>(type);
  instr->klass = Class::kInteger;
  if (instr->exec == nullptr) unknown(i);
  a.set_ops(instr, lane_refs(i, a, bits_of(type)));
}

template <class Op>
void decode_extreme(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  if (!i.has("relu")) return decode<Op>(i, a, instr);
  check_modifiers(i, {"relu", "s32"});
  instr->exec = integer<Relu<Op>, int32_t>;
  instr->klass = Class::kInteger;
  a.set_ops(instr, lane_refs(i, a, 32));
}

// d (twice as wide) = a * b (+ c, as wide as d).
template <class T, class Wide>
void wide_product(Warp& w, const Instr& i, uint32_t mask) {
  Slot<Wide> value[kLanes];
  const Slot<T>*a = w.lanes<Slot<T>>(i.ops[1]), *b = w.lanes<Slot<T>>(i.ops[2]);
  for (int lane = 0; lane < kLanes; ++lane) {
    value[lane] = slot<Wide>(static_cast<Wide>(static_cast<Wide>(static_cast<T>(a[lane])) *
                                               static_cast<Wide>(static_cast<T>(b[lane]))));
  }
  if (i.op_count > 3) {
    const Slot<Wide>* c = w.lanes<Slot<Wide>>(i.ops[3]);
    for (int lane = 0; lane < kLanes; ++lane) value[lane] += c[lane];
  }
  w.write(i.ops[0], value, mask);
}

void decode_wide(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"wide", "u16", "s16", "u32", "s32"});
  const std::string type = i.types().at(0);
  const int bits = bits_of(type);
  instr->exec = type == "u16"   ? wide_product<uint16_t, uint32_t>
                : type == "s16" ? wide_product<int16_t, int32_t>
                : type == "u32" ? wide_product<uint32_t, uint64_t>
                                : wide_product<int32_t, int64_t>;
  instr->klass = Class::kInteger;
  std::vector<Ref> refs = {a.write(i.operands[0], 2 * bits), a.read(i.operands[1], bits),
                           a.read(i.operands[2], bits)};
  if (i.operands.size() > 3) refs.push_back(a.read(i.operands[3], 2 * bits));
  a.set_ops(instr, refs);
}

template <class Low, class High>
void decode_product(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  if (i.has("wide")) return decode_wide(i, a, instr);
  i.has("hi") ? decode<High>(i, a, instr) : decode<Low>(i, a, instr);
}

// Chains of extended precision: the carry of each lane lies in a register of its own.
ptx::Operand carry_register() {
  ptx::Operand carry;
  carry.form = ptx::Operand::kRegister;
  carry.name = "%carry";
  return carry;
}

// ops: d, a, b, c, carry; aux: 1 reads it, 2 writes it, 4 subtracts, 8 a * b low, 16 a * b high.
template <class T>
void chain(Warp& w, const Instr& i, uint32_t mask) {
  using Wide = unsigned __int128;
  const T *a = w.lanes<T>(i.ops[1]), *b = w.lanes<T>(i.ops[2]), *c = w.lanes<T>(i.ops[3]);
  uint32_t& carry = w.predicate(i.ops[4]);
  T value[kLanes];
  uint32_t out = 0;
  constexpr int kBits = 8 * sizeof(T);
  for (int lane = 0; lane < kLanes; ++lane) {
    Wide x = a[lane], y = b[lane];
    if (i.aux & 8) x = static_cast<T>(a[lane] * b[lane]), y = c[lane];
    if (i.aux & 16) x = static_cast<T>(static_cast<Wide>(a[lane]) * b[lane] >> kBits), y = c[lane];
    const Wide in = (i.aux & 1) ? carry >> lane & 1 : 0;
    const Wide sum = (i.aux & 4) ? x - y - in : x + y + in;
    value[lane] = static_cast<T>(sum);
    out |= static_cast<uint32_t>(sum >> kBits & 1) << lane;
  }
  w.write(i.ops[0], value, mask);
  if (i.aux & 2) carry = (carry & ~mask) | (out & mask);
}

void decode_chain(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"cc", "lo", "hi", "u32", "s32", "u64", "s64", "b32", "b64"});
  const std::string& name = i.opcode;
  const bool product = name == "mad" || name == "madc";
  instr->aux = (name.back() == 'c' ? 1 : 0) | (i.has("cc") ? 2 : 0) |
               (name.rfind("sub", 0) == 0 ? 4 : 0) | (product ? (i.has("hi") ? 16 : 8) : 0);
  const int bits = bits_of(i.types().at(0));
  if (i.has("hi") && i.types()[0][0] == 's') unknown(i);
  instr->exec = bits == 64 ? chain<uint64_t> : chain<uint32_t>;
  instr->klass = Class::kInteger;
  std::vector<Ref> refs = lane_refs(i, a, bits);
  if (refs.size() == 3) refs.push_back(refs[2]);
  refs.push_back(a.write(carry_register(), 1));
  a.set_ops(instr, refs);
}

template <Decode kPlain>
void decode_maybe_chain(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  i.has("cc") ? decode_chain(i, a, instr) : kPlain(i, a, instr);
}

template <class T>
int64_t byte_of(uint32_t x, int n) {
  return static_cast<T>(x >> (8 * n));
}

// dp4a: d = c + the four products of bytes. aux: 1 a signed, 2 b signed.
void dp4a(Warp& w, const Instr& i, uint32_t mask) {
  each_lane<uint32_t, uint32_t>(w, i, mask, 3, [&](uint32_t a, uint32_t b, uint32_t c) {
    int64_t sum = c;
    for (int n = 0; n < 4; ++n) {
      sum += ((i.aux & 1) ? byte_of<int8_t>(a, n) : byte_of<uint8_t>(a, n)) *
             ((i.aux & 2) ? byte_of<int8_t>(b, n) : byte_of<uint8_t>(b, n));
    }
    return static_cast<uint32_t>(sum);
  });
}

void decode_dp4a(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"u32", "s32"});
  const std::vector<std::string> types = i.types();
  instr->aux = (types.at(0) == "s32" ? 1 : 0) | (types.at(1) == "s32" ? 2 : 0);
  instr->exec = dp4a;
  instr->klass = Class::kInteger;
  a.set_ops(instr, lane_refs(i, a, 32));
}

// The product of the lower 24 bits of two numbers, 48 bits of it. aux: 1 signed, 2 its upper 32.
void product_of_24(Warp& w, const Instr& i, uint32_t mask) {
  const bool is_signed = i.aux & 1, high = i.aux & 2, adds = i.op_count > 3;
  each_lane<uint32_t, uint32_t>(
      w, i, mask, i.op_count - 1, [=](uint32_t a, uint32_t b, uint32_t c) {
        const auto part = [is_signed](uint32_t x) {
          const auto left = static_cast<int32_t>(x << 8);
          return is_signed ? int64_t{left >> 8} : static_cast<int64_t>(x & 0xffffff);
        };
        const int64_t product = part(a) * part(b);
        return static_cast<uint32_t>(high ? product >> 16 : product) + (adds ? c : 0);
      });
}

void decode_24(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"lo", "hi", "u32", "s32"});
  instr->aux = (i.has("s32") ? 1 : 0) | (i.has("hi") ? 2 : 0);
  instr->exec = product_of_24;
  instr->klass = Class::kInteger;
  a.set_ops(instr, lane_refs(i, a, 32));
}

}  // namespace

void add_integer(Decoders* decoders) {
  Decoders& d = *decoders;
  d["add.i"] = decode_maybe_chain<decode<Add>>;
  d["sub.i"] = decode_maybe_chain<decode<Sub>>;
  d["mad.i"] = decode_maybe_chain<decode_product<MadLo, MadHi>>;
  d["mul.i"] = decode_product<MulLo, MulHi>;
  d["addc.i"] = d["subc.i"] = d["madc.i"] = decode_chain;
  d["div.i"] = decode<Div>;
  d["rem.i"] = decode<Rem>;
  d["min.i"] = decode_extreme<Min>;
  d["max.i"] = decode_extreme<Max>;
  d["neg.i"] = decode<Neg>;
  d["abs.i"] = decode<Abs>;
  d["sad.i"] = decode<Sad>;
  d["dp4a.i"] = decode_dp4a;
  d["mul24.i"] = d["mad24.i"] = decode_24;
}

}  // namespace sim
