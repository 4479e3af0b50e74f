// Arithmetic of f16, bf16 and their packed pairs: exact in double, rounded once.
#include "ops_arithmetic.h"

namespace sim {
namespace {

constexpr uint64_t kFtz = 1, kSat = 2, kRelu = 4, kNanResult = 8, kXorsign = 16, kAbs = 32;

struct Half {
  static constexpr Format kFormat = kF16;
  static constexpr double kSmallest = 0x1p-14;  // normal number
  static constexpr uint32_t kNan = 0x7fff;
  static float load(uint32_t bits) { return f16_to_f32(bits); }
};
struct Brain {
  static constexpr Format kFormat = kBf16;
  static constexpr double kSmallest = 0x1p-126;
  static constexpr uint32_t kNan = 0x7fff;
  static float load(uint32_t bits) { return bf16_to_f32(bits); }
};

template <class T>
float load_flushed(uint32_t bits, bool ftz) {
  const float x = T::load(bits);
  return ftz && std::fabs(x) < T::kSmallest ? std::copysign(0.0f, x) : x;
}

template <class T>
uint32_t store(double x, uint64_t flags) {
  if (x != x) return flags & (kSat) ? 0 : T::kNan;
  if (flags & kSat) x = x > 0 ? std::fmin(x, 1.0) : 0.0;
  if (flags & kRelu) x = x > 0 ? x : 0.0;
  const double rounded = round_to(x, T::kFormat, Round::kNearest);
  const bool tiny = (flags & kFtz) && std::fabs(rounded) < T::kSmallest;
  return encode(tiny ? std::copysign(0.0, rounded) : rounded, T::kFormat);
}

struct Add {
  static double of(double a, double b, double) { return a + b; }
};
struct Sub {
  static double of(double a, double b, double) { return a - b; }
};
struct Mul {
  static double of(double a, double b, double) { return a * b; }
};
struct Fma {
  static double of(double a, double b, double c) { return odd_fma(a, b, c); }
};
struct Ex2 {
  static double of(double a, double, double) { return std::exp2(a); }
};
struct Tanh {
  static double of(double a, double, double) { return std::tanh(a); }
};
struct Neg {
  static double of(double a, double, double) { return -a; }
};
struct Abs {
  static double of(double a, double, double) { return std::fabs(a); }
};

// f applied to one or two values of 16 bits per lane.
template <int kPack, class F>
void each_half(Warp& w, const Instr& i, uint32_t mask, F f) {
  each_lane<uint32_t, uint32_t>(
      w, i, mask, i.op_count - 1, [&](uint32_t a, uint32_t b, uint32_t c) {
        const uint32_t low = f(a & 0xffff, b & 0xffff, c & 0xffff);
        return kPack == 1 ? low : low | f(a >> 16, b >> 16, c >> 16) << 16;
      });
}

template <class Op, class T, int kPack>
void arithmetic(Warp& w, const Instr& i, uint32_t mask) {
  const uint64_t flags = i.aux;
  each_half<kPack>(w, i, mask, [flags](uint32_t a, uint32_t b, uint32_t c) {
    const bool ftz = flags & kFtz;
    return store<T>(
        Op::of(load_flushed<T>(a, ftz), load_flushed<T>(b, ftz), load_flushed<T>(c, ftz)), flags);
  });
}

template <class T, bool kMax>
struct Extreme {
  static uint32_t of(uint32_t a, uint32_t b, uint64_t flags) {
    float x = load_flushed<T>(a, flags & kFtz), y = load_flushed<T>(b, flags & kFtz);
    const bool negative = std::signbit(x) != std::signbit(y);
    if (flags & kAbs) x = std::fabs(x), y = std::fabs(y);
    if ((x != x && y != y) || ((flags & kNanResult) && (x != x || y != y))) return T::kNan;
    float r = kMax ? ptx_max(x, y) : ptx_min(x, y);
    if (flags & kXorsign) r = negative ? -std::fabs(r) : std::fabs(r);
    return encode(r, T::kFormat);
  }
};

template <class T, int kPack, bool kMax>
void extreme(Warp& w, const Instr& i, uint32_t mask) {
  const uint64_t flags = i.aux;
  const bool three = i.op_count > 3;
  each_half<kPack>(w, i, mask, [=](uint32_t a, uint32_t b, uint32_t c) {
    const uint32_t r = Extreme<T, kMax>::of(a, b, flags);
    return three ? Extreme<T, kMax>::of(r, c, flags) : r;
  });
}

uint64_t flags_of(const ptx::Instruction& i) {
  return (i.has("ftz") ? kFtz : 0) | (i.has("sat") ? kSat : 0) | (i.has("relu") ? kRelu : 0) |
         (i.has("NaN") ? kNanResult : 0) | (i.has("xorsign") ? kXorsign : 0) |
         (i.has("abs") ? kAbs : 0);
}

struct Execs {
  Exec f16, f16x2, bf16, bf16x2;
};

void decode(const ptx::Instruction& i, Assembler& a, Instr* instr, const Execs& execs,
            Class klass) {
  check_modifiers(i, {"rn", "ftz", "sat", "relu", "NaN", "xorsign", "abs", "approx", "f16", "f16x2",
                      "bf16", "bf16x2"});
  const std::string type = i.types().at(0);
  const bool packed = type == "f16x2" || type == "bf16x2";
  instr->exec = type == "f16"     ? execs.f16
                : type == "f16x2" ? execs.f16x2
                : type == "bf16"  ? execs.bf16
                                  : execs.bf16x2;
  instr->klass = klass;
  instr->aux = flags_of(i);
  a.set_ops(instr, lane_refs(i, a, packed ? 32 : 16, packed ? "" : type.c_str()));
}

template <class Op>
void decode_arithmetic(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  constexpr bool kSpecial = std::is_same_v<Op, Ex2> || std::is_same_v<Op, Tanh>;
  decode(i, a, instr,
         {arithmetic<Op, Half, 1>, arithmetic<Op, Half, 2>, arithmetic<Op, Brain, 1>,
          arithmetic<Op, Brain, 2>},
         kSpecial ? Class::kSpecial : Class::kHalf);
}

template <bool kMax>
void decode_extreme(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  decode(i, a, instr,
         {extreme<Half, 1, kMax>, extreme<Half, 2, kMax>, extreme<Brain, 1, kMax>,
          extreme<Brain, 2, kMax>},
         Class::kHalf);
}

}  // namespace

void add_half(Decoders* decoders) {
  Decoders& d = *decoders;
  d["add.h"] = decode_arithmetic<Add>;
  d["sub.h"] = decode_arithmetic<Sub>;
  d["mul.h"] = decode_arithmetic<Mul>;
  d["fma.h"] = decode_arithmetic<Fma>;
  d["ex2.h"] = decode_arithmetic<Ex2>;
  d["tanh.h"] = decode_arithmetic<Tanh>;
  d["neg.h"] = decode_arithmetic<Neg>;
  d["abs.h"] = decode_arithmetic<Abs>;
  d["min.h"] = decode_extreme<false>;
  d["max.h"] = decode_extreme<true>;
}

}  // namespace sim
