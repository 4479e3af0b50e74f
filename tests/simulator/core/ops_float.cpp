// Arithmetic of f32 and f64.
#include <cfenv>

#include "ops_arithmetic.h"

namespace sim {
namespace {

constexpr uint64_t kFtz = 1, kSat = 2, kNanResult = 4, kXorsign = 8, kAbs = 16;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The canonical NaN of the GPU's f32 arithmetic.
inline uint32_t result(float x) { return x != x ? 0x7fffffffu : bits_of_f32(x); }

inline bool plus_zero(double x) { return x == 0 && !std::signbit(x); }

struct Add {
  static float of(float a, float b, float) { return a + b; }
  static double exact(double a, double b, double) { return odd_sum(a, b); }
  static bool keeps_plus_zero(float a, float b, float) { return plus_zero(a) && plus_zero(b); }
  static double of(double a, double b, double) { return a + b; }
};
struct Sub {
  static float of(float a, float b, float) { return a - b; }
  static double exact(double a, double b, double) { return odd_sum(a, -b); }
  static bool keeps_plus_zero(float a, float b, float) { return plus_zero(a) && plus_zero(-b); }
  static double of(double a, double b, double) { return a - b; }
};
struct Mul {
  static float of(float a, float b, float) { return a * b; }
  static double exact(double a, double b, double) { return a * b; }
  static bool keeps_plus_zero(float, float, float) { return true; }
  static double of(double a, double b, double) { return a * b; }
};
struct Fma {
  static float of(float a, float b, float c) { return std::fma(a, b, c); }
  static double exact(double a, double b, double c) { return odd_fma(a, b, c); }
  static bool keeps_plus_zero(float a, float b, float c) {
    return plus_zero(static_cast<double>(a) * b) && plus_zero(c);
  }
  static double of(double a, double b, double c) { return std::fma(a, b, c); }
};
struct Div {
  static float of(float a, float b, float) { return a / b; }
  static double exact(double a, double b, double) {
    const double q = a / b;
    return made_odd(q, std::copysign(1.0, b) * std::fma(-q, b, a));
  }
  static bool keeps_plus_zero(float, float, float) { return true; }
  static double of(double a, double b, double) { return a / b; }
};

// a times the reciprocal of b, which is no normal number where b is very large. PTX ISA,
// div.approx.
struct DivApprox {
  static float of(float a, float b, float) {
    const bool beyond = std::fabs(b) > 0x1p126f && std::isfinite(b);
    return beyond ? a * std::copysign(0.0f, b) : a / b;
  }
};

// 2^x. |error| < 2^-30: a polynomial of degree 7 (Taylor) on [-1/2, 1/2], in double.
inline float exp2_f32(float x) {
  const float clamped = x < -200.0f ? -200.0f : x > 200.0f ? 200.0f : x;
  const double whole = std::nearbyint(static_cast<double>(clamped));
  const double r = (clamped - whole) * 0.693147180559945309417;
  double p = 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const auto exponent = static_cast<int64_t>(static_cast<int32_t>(whole)) + 1023;
  const double scaled = p * std::bit_cast<double>(exponent << 52);
  return x != x ? x : static_cast<float>(scaled);
}

struct Ex2 {
  static float of(float a, float, float) { return exp2_f32(a); }
};
struct Lg2 {
  static float of(float a, float, float) {
    return static_cast<float>(std::log2(static_cast<double>(a)));
  }
};
struct Rcp {
  static float of(float a, float, float) { return 1.0f / a; }
  static double exact(double a, double, double) { return Div::exact(1.0, a, 0.0); }
  static bool keeps_plus_zero(float, float, float) { return true; }
  static double of(double a, double, double) { return 1.0 / a; }
};
struct Sqrt {
  static float of(float a, float, float) { return std::sqrt(a); }
  static double exact(double a, double, double) {
    const double q = std::sqrt(a);
    return made_odd(q, std::fma(-q, q, a));
  }
  static bool keeps_plus_zero(float, float, float) { return true; }
  static double of(double a, double, double) { return std::sqrt(a); }
};
struct Rsqrt {
  static float of(float a, float, float) {
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a)));
  }
  static double of(double a, double, double) { return 1.0 / std::sqrt(a); }
};
struct Sin {
  static float of(float a, float, float) {
    return static_cast<float>(std::sin(static_cast<double>(a)));
  }
};
struct Cos {
  static float of(float a, float, float) {
    return static_cast<float>(std::cos(static_cast<double>(a)));
  }
};
struct Tanh {
  static float of(float a, float, float) {
    return static_cast<float>(std::tanh(static_cast<double>(a)));
  }
};
struct Neg {
  static uint32_t bits(uint32_t a, uint32_t) { return a ^ 0x80000000u; }
  static uint64_t bits(uint64_t a, uint64_t) { return a ^ 0x8000000000000000u; }
};
struct Abs {
  static uint32_t bits(uint32_t a, uint32_t) { return a & 0x7fffffffu; }
  static uint64_t bits(uint64_t a, uint64_t) { return a & 0x7fffffffffffffffu; }
};
// copysign.f32 d, a, b: the magnitude of b with the sign of a.
struct Copysign {
  static uint32_t bits(uint32_t a, uint32_t b) { return (a & 0x80000000u) | (b & 0x7fffffffu); }
  static uint64_t bits(uint64_t a, uint64_t b) {
    return (a & 0x8000000000000000u) | (b & 0x7fffffffffffffffu);
  }
};

template <class Op, uint64_t kFlags>
void f32(Warp& w, const Instr& i, uint32_t mask) {
  each_lane<uint32_t, uint32_t>(w, i, mask, i.op_count - 1, [](uint32_t a, uint32_t b, uint32_t c) {
    float x = f32_of_bits(a), y = f32_of_bits(b), z = f32_of_bits(c);
    if constexpr ((kFlags & kFtz) != 0) x = flush(x), y = flush(y), z = flush(z);
    float r = Op::of(x, y, z);
    if constexpr ((kFlags & kFtz) != 0) r = flush(r);
    if constexpr ((kFlags & kSat) != 0) r = saturate(r);
    return result(r);
  });
}

template <class Op>
Exec f32_with(uint64_t flags) {
  static constexpr Exec kExecs[] = {f32<Op, 0>, f32<Op, 1>, f32<Op, 2>, f32<Op, 3>};
  return kExecs[flags & 3];
}

// Rounding other than to nearest: the exact result in double, rounded once. aux: flags, mode << 8.
template <class Op>
void f32_directed(Warp& w, const Instr& i, uint32_t mask) {
  const auto mode = static_cast<Round>(i.aux >> 8);
  const bool ftz = i.aux & kFtz, sat = i.aux & kSat;
  each_lane<uint32_t, uint32_t>(
      w, i, mask, i.op_count - 1, [&](uint32_t a, uint32_t b, uint32_t c) {
        float x = f32_of_bits(a), y = f32_of_bits(b), z = f32_of_bits(c);
        if (ftz) x = flush(x), y = flush(y), z = flush(z);
        float r = to_f32(Op::exact(x, y, z), mode);
        // A sum of two signs that is exactly zero: -0 rounding down.
        const bool negative = mode == Round::kDown && plus_zero(r) && !Op::keeps_plus_zero(x, y, z);
        if (negative) r = -0.0f;
        if (ftz) r = flush(r);
        return result(sat ? saturate(r) : r);
      });
}

template <class Op>
void f64(Warp& w, const Instr& i, uint32_t mask) {
  each_lane<uint64_t, uint64_t>(w, i, mask, i.op_count - 1, [](uint64_t a, uint64_t b, uint64_t c) {
    return std::bit_cast<uint64_t>(
        Op::of(std::bit_cast<double>(a), std::bit_cast<double>(b), std::bit_cast<double>(c)));
  });
}

// The operands are read and the result is written after and before a change of the mode: volatile.
template <class Op>
void f64_directed(Warp& w, const Instr& i, uint32_t mask) {
  const auto mode = static_cast<Round>(i.aux >> 8);
  std::fesetround(mode == Round::kZero   ? FE_TOWARDZERO
                  : mode == Round::kDown ? FE_DOWNWARD
                                         : FE_UPWARD);
  each_lane<uint64_t, uint64_t>(w, i, mask, i.op_count - 1, [](uint64_t a, uint64_t b, uint64_t c) {
    const volatile double x = std::bit_cast<double>(a), y = std::bit_cast<double>(b),
                          z = std::bit_cast<double>(c);
    const volatile double r = Op::of(x, y, z);
    const double value = r;
    return std::bit_cast<uint64_t>(value);
  });
  std::fesetround(FE_TONEAREST);
}

// The upper 32 bits of the result, the lower ones 0. PTX ISA, rcp.approx.ftz.f64.
template <class Op>
void f64_upper(Warp& w, const Instr& i, uint32_t mask) {
  const auto flushed = [](double x) {
    return std::fabs(x) < std::numeric_limits<double>::min() ? std::copysign(0.0, x) : x;
  };
  each_lane<uint64_t, uint64_t>(w, i, mask, 1, [&](uint64_t a, uint64_t, uint64_t) {
    const double r = flushed(Op::of(flushed(std::bit_cast<double>(a)), 0.0, 0.0));
    const uint64_t upper = std::bit_cast<uint64_t>(r) >> 32 << 32;
    return r != r ? uint64_t{0x7fffffff} << 32 : upper;
  });
}

template <class Op, class T>
void sign_bits(Warp& w, const Instr& i, uint32_t mask) {
  const bool ftz = i.aux & kFtz;
  each_lane<T, T>(w, i, mask, i.op_count - 1, [ftz](T a, T b, T) {
    const T bits = Op::bits(a, b);
    if constexpr (sizeof(T) == 4) return ftz ? bits_of_f32(flush(f32_of_bits(bits))) : bits;
    return bits;
  });
}

uint64_t flags_of(const ptx::Instruction& i) {
  return (i.has("ftz") ? kFtz : 0) | (i.has("sat") ? kSat : 0) | (i.has("NaN") ? kNanResult : 0) |
         (i.has("xorsign") ? kXorsign : 0) | (i.has("abs") ? kAbs : 0);
}

template <class Op>
void decode_arithmetic(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"rn", "rz", "rm", "rp", "ftz", "sat", "f32", "f64"});
  const bool wide = i.has("f64");
  const Round mode = rounding(i);
  instr->klass = wide ? Class::kFp64 : Class::kFp32;
  instr->aux = flags_of(i) | static_cast<uint64_t>(mode) << 8;
  const bool nearest = mode == Round::kNearest;
  if (wide && (instr->aux & (kFtz | kSat))) unknown(i);
  instr->exec = wide ? (nearest ? f64<Op> : f64_directed<Op>)
                     : (nearest ? f32_with<Op>(instr->aux) : f32_directed<Op>);
  a.set_ops(instr, lane_refs(i, a, wide ? 64 : 32, wide ? "f64" : "f32"));
}

// Results are the exact ones, which is within every documented error of the approximate forms.
template <class Op, bool kHasF64>
void decode_special(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"approx", "full", "rn", "rz", "rm", "rp", "ftz", "f32", "f64"});
  const bool wide = i.has("f64");
  const Round mode = rounding(i);
  instr->klass = wide ? Class::kFp64 : Class::kSpecial;
  instr->aux = flags_of(i) | static_cast<uint64_t>(mode) << 8;
  instr->exec = nullptr;
  if (mode != Round::kNearest) {
    if constexpr (requires { Op::exact(1.0, 1.0, 1.0); }) {
      instr->exec = wide ? f64_directed<Op> : f32_directed<Op>;
    }
  } else if (!wide) {
    instr->exec = f32_with<Op>(instr->aux);
  } else if constexpr (kHasF64) {
    instr->exec = i.has("ftz") ? f64_upper<Op> : f64<Op>;
  }
  const bool upper = i.opcode == "rcp" || i.opcode == "rsqrt";
  if (instr->exec == nullptr || (wide && i.has("ftz") && !upper)) unknown(i);
  a.set_ops(instr, lane_refs(i, a, wide ? 64 : 32, wide ? "f64" : "f32"));
}

void decode_div(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  if (i.has("approx")) return decode_special<DivApprox, false>(i, a, instr);
  decode_special<Div, true>(i, a, instr);
}

template <class Op>
void decode_sign(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"ftz", "f32", "f64"});
  const bool wide = i.has("f64");
  instr->klass = wide ? Class::kFp64 : Class::kFp32;
  instr->aux = flags_of(i);
  instr->exec = wide ? sign_bits<Op, uint64_t> : sign_bits<Op, uint32_t>;
  a.set_ops(instr, lane_refs(i, a, wide ? 64 : 32, wide ? "f64" : "f32"));
}

template <bool kMax>
void extreme_f32(Warp& w, const Instr& i, uint32_t mask) {
  const uint64_t flags = i.aux;
  each_lane<uint32_t, uint32_t>(
      w, i, mask, i.op_count - 1, [flags, count = i.op_count](uint32_t a, uint32_t b, uint32_t c) {
        float x = f32_of_bits(a), y = f32_of_bits(b), z = f32_of_bits(c);
        if (flags & kFtz) x = flush(x), y = flush(y), z = flush(z);
        const uint32_t sign = (bits_of_f32(x) ^ bits_of_f32(y)) & 0x80000000u;
        if (flags & kAbs) x = std::fabs(x), y = std::fabs(y);
        if ((flags & kNanResult) && (x != x || y != y || (count > 3 && z != z)))
          return result(kNan);
        float r = kMax ? ptx_max(x, y) : ptx_min(x, y);
        if (count > 3) r = kMax ? ptx_max(r, z) : ptx_min(r, z);
        if (flags & kXorsign) r = f32_of_bits((bits_of_f32(r) & 0x7fffffffu) | sign);
        return result(r);
      });
}

template <bool kMax>
void extreme_f64(Warp& w, const Instr& i, uint32_t mask) {
  each_lane<uint64_t, uint64_t>(w, i, mask, 2, [](uint64_t a, uint64_t b, uint64_t) {
    const double x = std::bit_cast<double>(a), y = std::bit_cast<double>(b);
    return std::bit_cast<uint64_t>(kMax ? ptx_max(x, y) : ptx_min(x, y));
  });
}

template <bool kMax>
void decode_extreme(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"ftz", "NaN", "xorsign", "abs", "f32", "f64"});
  const bool wide = i.has("f64");
  if (wide && i.modifiers.size() != 1) unknown(i);
  instr->klass = wide ? Class::kFp64 : Class::kFp32;
  instr->aux = flags_of(i);
  instr->exec = wide ? extreme_f64<kMax> : extreme_f32<kMax>;
  a.set_ops(instr, lane_refs(i, a, wide ? 64 : 32, wide ? "f64" : "f32"));
}

enum Test : uint64_t { kFinite, kInfinite, kNumber, kNotNumber, kNormal, kSubnormal };

template <class T, class Bits>
void testp(Warp& w, const Instr& i, uint32_t mask) {
  const Bits* a = w.lanes<Bits>(i.ops[1]);
  uint32_t value = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const T x = std::bit_cast<T>(a[lane]);
    const int kind = std::fpclassify(x);
    const bool normal = kind == FP_NORMAL || kind == FP_ZERO;  // zeros are considered normal
    const bool is[] = {std::isfinite(x), std::isinf(x), !std::isnan(x),
                       std::isnan(x),    normal,        kind == FP_SUBNORMAL};
    value |= uint32_t{is[i.aux]} << lane;
  }
  w.write_predicate(i.ops[0], value, mask);
}

void decode_testp(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  static const char* const kTests[] = {"finite",     "infinite", "number",
                                       "notanumber", "normal",   "subnormal"};
  const bool wide = i.has("f64");
  for (uint64_t t = kFinite; t <= kSubnormal; ++t) {
    if (i.modifiers.at(0) != kTests[t]) continue;
    instr->aux = t;
    instr->klass = wide ? Class::kFp64 : Class::kFp32;
    instr->exec = wide ? testp<double, uint64_t> : testp<float, uint32_t>;
    return a.set_ops(instr, {a.write(i.operands[0], 1),
                             a.read(i.operands[1], wide ? 64 : 32, wide ? "f64" : "f32")});
  }
  unknown(i);
}

}  // namespace

// Keys "name.f" are reached through dispatch by type, in ops_arithmetic.cpp.
void add_float(Decoders* decoders) {
  Decoders& d = *decoders;
  d["add.f"] = decode_arithmetic<Add>;
  d["sub.f"] = decode_arithmetic<Sub>;
  d["mul.f"] = decode_arithmetic<Mul>;
  d["fma.f"] = d["mad.f"] = decode_arithmetic<Fma>;
  d["div.f"] = decode_div;
  d["rcp.f"] = decode_special<Rcp, true>;
  d["sqrt.f"] = decode_special<Sqrt, true>;
  d["rsqrt.f"] = decode_special<Rsqrt, true>;
  d["ex2.f"] = decode_special<Ex2, false>;
  d["lg2.f"] = decode_special<Lg2, false>;
  d["sin.f"] = decode_special<Sin, false>;
  d["cos.f"] = decode_special<Cos, false>;
  d["tanh.f"] = decode_special<Tanh, false>;
  d["neg.f"] = decode_sign<Neg>;
  d["abs.f"] = decode_sign<Abs>;
  d["copysign.f"] = decode_sign<Copysign>;
  d["min.f"] = decode_extreme<false>;
  d["max.f"] = decode_extreme<true>;
  d["testp.f"] = decode_testp;
}

}  // namespace sim
