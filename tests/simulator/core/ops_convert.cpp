// cvt: between integers and floats of every width.
#include <type_traits>

#include "ops_arithmetic.h"

namespace sim {
namespace {

constexpr uint64_t kFtz = 1, kSat = 2, kRelu = 4, kWhole = 8, kSatfinite = 16;

bool is_float(const std::string& type) {
  return type[0] == 'f' || type == "bf16" || type == "tf32";
}

// Reading a lane of a type as the number it is. A source register may be wider than the type.
using LoadInt = int64_t (*)(uint64_t);
using LoadReal = double (*)(uint64_t);

template <class T>
int64_t load_int(uint64_t bits) {
  return static_cast<int64_t>(static_cast<T>(bits));
}

LoadInt int_loader(const std::string& type) {
  if (type == "s8") return load_int<int8_t>;
  if (type == "u8") return load_int<uint8_t>;
  if (type == "s16") return load_int<int16_t>;
  if (type == "u16") return load_int<uint16_t>;
  if (type == "s32") return load_int<int32_t>;
  if (type == "u32") return load_int<uint32_t>;
  if (type == "s64" || type == "u64") return load_int<int64_t>;
  return nullptr;
}

LoadReal real_loader(const std::string& type) {
  if (type == "f16") {
    return [](uint64_t x) -> double { return f16_to_f32(static_cast<uint32_t>(x) & 0xffff); };
  }
  if (type == "bf16") {
    return [](uint64_t x) -> double { return bf16_to_f32(static_cast<uint32_t>(x) & 0xffff); };
  }
  if (type == "f32") {
    return [](uint64_t x) -> double { return f32_of_bits(static_cast<uint32_t>(x)); };
  }
  if (type == "f64") return [](uint64_t x) { return std::bit_cast<double>(x); };
  return nullptr;
}

struct Conversion {
  std::string to, from;
  LoadInt load_int = nullptr;
  LoadReal load_real = nullptr;
  int from_bits = 32, to_bits = 32;  // of the registers
  int width = 32;                    // of the type converted to
  bool to_signed = false;
  Round mode = Round::kNearest;
  uint64_t flags = 0;
};

double whole_of(double x, Round mode) {
  switch (mode) {
    case Round::kZero:
      return std::trunc(x);
    case Round::kDown:
      return std::floor(x);
    case Round::kUp:
      return std::ceil(x);
    default:
      return std::nearbyint(x);
  }
}

// Out of range goes to the nearest end, NaN to 0 (64 bits: the top bit alone). PTX ISA, cvt.
uint64_t int_of_real(double x, const Conversion& c) {
  if (x != x) return c.width == 64 ? uint64_t{1} << 63 : 0;
  x = whole_of(x, c.mode);
  const double low = c.to_signed ? -std::ldexp(1.0, c.width - 1) : 0;
  const double end = std::ldexp(1.0, c.to_signed ? c.width - 1 : c.width);
  if (x < low) return c.to_signed ? ~uint64_t{0} << (c.width - 1) : 0;
  if (x >= end) {
    return c.to_signed     ? (uint64_t{1} << (c.width - 1)) - 1
           : c.width == 64 ? ~uint64_t{0}
                           : (uint64_t{1} << c.width) - 1;
  }
  return c.to_signed ? static_cast<uint64_t>(static_cast<int64_t>(x)) : static_cast<uint64_t>(x);
}

uint64_t int_of_int(int64_t x, const Conversion& c) {
  if (!(c.flags & kSat)) return static_cast<uint64_t>(x);
  using Wide = __int128;
  const Wide value = c.from == "u64" ? static_cast<Wide>(static_cast<uint64_t>(x)) : Wide{x};
  const Wide high = (Wide{1} << (c.to_signed ? c.width - 1 : c.width)) - 1;
  const Wide low = c.to_signed ? -high - 1 : 0;
  return static_cast<uint64_t>(value < low ? low : value > high ? high : value);
}

// The register's bits of an integer of a narrower type: extended by its sign, or zeros.
uint64_t extended(uint64_t bits, const Conversion& c) {
  if (c.width == 64) return bits;
  const uint64_t field = (uint64_t{1} << c.width) - 1;
  bits &= field;
  if (c.to_signed && bits >> (c.width - 1) & 1) bits |= ~field;
  return c.to_bits == 64 ? bits : c.to_bits == 32 ? bits & 0xffffffffu : bits & 0xffffu;
}

Format format_of(const std::string& type) {
  return type == "f16" ? kF16 : type == "bf16" ? kBf16 : kTf32;
}

uint64_t nan_of(const std::string& type) {
  if (type == "f64") return 0x7ff8000000000000u;
  return type == "f32" || type == "tf32" ? 0x7fffffffu : 0x7fffu;
}

double largest_of(const std::string& type) {
  return type == "f16" ? 65504.0 : type == "bf16" ? 0x1.fep127 : 0x1.ffcp127;
}

uint64_t real_of_real(double x, const Conversion& c) {
  if (x != x) return c.flags & kSat ? 0 : nan_of(c.to);
  if (c.flags & kWhole) x = whole_of(x, c.mode);
  if (c.flags & kSat) x = std::fmin(std::fmax(x, 0.0), 1.0) + 0.0;
  if (c.flags & kRelu) x = x > 0 ? x : 0.0;
  if (c.to == "f64") return std::bit_cast<uint64_t>(x);
  if (c.to == "f32") {
    const float r = to_f32(x, c.mode);
    return bits_of_f32((c.flags & kFtz) ? flush(r) : r);
  }
  double rounded = round_to(x, format_of(c.to), c.mode);
  if ((c.flags & kSatfinite) && std::isinf(rounded)) {
    rounded = std::copysign(largest_of(c.to), rounded);
  }
  if (c.to == "tf32") return bits_of_f32(static_cast<float>(rounded));
  return encode(rounded, format_of(c.to));
}

// An integer of 64 bits does not fit a double; it is rounded to odd first.
double odd_double(int64_t x, bool is_unsigned) {
  const bool negative = !is_unsigned && x < 0;
  const uint64_t a = negative ? -static_cast<uint64_t>(x) : static_cast<uint64_t>(x);
  const int extra = std::max(0, 64 - std::countl_zero(a) - 53);
  uint64_t kept = a >> extra;
  if (extra && a & ((uint64_t{1} << extra) - 1)) kept |= 1;
  const double value = std::ldexp(static_cast<double>(kept), extra);
  return negative ? -value : value;
}

uint64_t real_of_int(int64_t x, const Conversion& c) {
  const bool is_unsigned = c.from == "u64";
  if (c.to != "f64") return real_of_real(odd_double(x, is_unsigned), c);
  const bool negative = !is_unsigned && x < 0;
  const uint64_t a = negative ? -static_cast<uint64_t>(x) : static_cast<uint64_t>(x);
  const int extra = std::max(0, 64 - std::countl_zero(a) - 53);
  const uint64_t rest = a & ((uint64_t{1} << extra) - 1), half = uint64_t{1} << extra >> 1;
  const uint64_t kept = a >> extra;
  const bool nearest = c.mode == Round::kNearest;
  const bool up = nearest ? rest > half || (extra && rest == half && kept & 1)
                          : rest && c.mode == (negative ? Round::kDown : Round::kUp);
  const double value = std::ldexp(static_cast<double>(kept + up), extra);
  return std::bit_cast<uint64_t>(negative ? -value : value);
}

template <class From, class To>
void general(Warp& w, const Instr& i, uint32_t mask) {
  const Conversion& c = *static_cast<const Conversion*>(i.extra);
  const From* a = w.lanes<From>(i.ops[1]);
  const bool to_real = is_float(c.to);
  To value[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    uint64_t bits;
    if (c.load_real) {
      double x = c.load_real(a[lane]);
      if ((c.flags & kFtz) && c.from == "f32") x = flush(static_cast<float>(x));
      bits = to_real ? real_of_real(x, c) : extended(int_of_real(x, c), c);
    } else {
      const int64_t x = c.load_int(a[lane]);
      bits = to_real ? real_of_int(x, c) : extended(int_of_int(x, c), c);
    }
    value[lane] = static_cast<To>(bits);
  }
  w.write(i.ops[0], value, mask);
}

// The conversions of inner loops, so that they vectorise.
template <float (*kLoad)(uint32_t)>
void widen(Warp& w, const Instr& i, uint32_t mask) {
  each_lane<uint32_t, uint32_t>(w, i, mask, 1, [](uint32_t a, uint32_t, uint32_t) {
    const float x = kLoad(a & 0xffff);
    return x != x ? 0x7fffffffu : bits_of_f32(x);
  });
}

template <uint32_t (*kStore)(float)>
void narrow(Warp& w, const Instr& i, uint32_t mask) {
  each_lane<uint32_t, uint32_t>(
      w, i, mask, 1, [](uint32_t a, uint32_t, uint32_t) { return kStore(f32_of_bits(a)); });
}

// Two f32 into a pair: the first source is the upper half.
template <uint32_t (*kStore)(float)>
void narrow_pair(Warp& w, const Instr& i, uint32_t mask) {
  each_lane<uint32_t, uint32_t>(w, i, mask, 2, [](uint32_t a, uint32_t b, uint32_t) {
    return kStore(f32_of_bits(a)) << 16 | kStore(f32_of_bits(b));
  });
}

template <class From, class To>
void copy_int(Warp& w, const Instr& i, uint32_t mask) {
  To value[kLanes];
  using Slot = std::conditional_t<sizeof(From) == 8, uint64_t, uint32_t>;
  const Slot* a = w.lanes<Slot>(i.ops[1]);
  for (int lane = 0; lane < kLanes; ++lane)
    value[lane] = static_cast<To>(static_cast<From>(a[lane]));
  w.write(i.ops[0], value, mask);
}

// A conversion of a pair: f applied to both sources, packed into `bits` each.
struct Pair {
  Conversion each;
  uint32_t (*eight)(float) = nullptr;
};

void general_pair(Warp& w, const Instr& i, uint32_t mask) {
  const Pair& pair = *static_cast<const Pair*>(i.extra);
  const bool relu = pair.each.flags & kRelu;
  each_lane<uint32_t, uint32_t>(w, i, mask, 2, [&](uint32_t a, uint32_t b, uint32_t) {
    float x = f32_of_bits(a), y = f32_of_bits(b);
    if (pair.eight == nullptr) {
      return static_cast<uint32_t>(real_of_real(x, pair.each) << 16 | real_of_real(y, pair.each));
    }
    if (relu) x = x < 0 ? 0 : x, y = y < 0 ? 0 : y;
    return pair.eight(x) << 8 | pair.eight(y);
  });
}

// Two 8-bit floats to two f16.
template <float (*kLoad)(uint32_t)>
void widen_eight(Warp& w, const Instr& i, uint32_t mask) {
  const bool relu = i.aux & kRelu;
  each_lane<uint32_t, uint32_t>(w, i, mask, 1, [relu](uint32_t a, uint32_t, uint32_t) {
    float low = kLoad(a & 0xff), high = kLoad(a >> 8 & 0xff);
    if (relu) low = low < 0 ? 0 : low, high = high < 0 ? 0 : high;
    return f32_to_f16(high) << 16 | f32_to_f16(low);
  });
}

// Two f16 to two 8-bit floats.
template <uint32_t (*kStore)(float)>
void narrow_eight(Warp& w, const Instr& i, uint32_t mask) {
  const bool relu = i.aux & kRelu;
  each_lane<uint32_t, uint32_t>(w, i, mask, 1, [relu](uint32_t a, uint32_t, uint32_t) {
    float low = f16_to_f32(a & 0xffff), high = f16_to_f32(a >> 16);
    if (relu) low = low < 0 ? 0 : low, high = high < 0 ? 0 : high;
    return kStore(high) << 8 | kStore(low);
  });
}

uint64_t flags_of(const ptx::Instruction& i) {
  const bool whole = i.has("rni") || i.has("rzi") || i.has("rmi") || i.has("rpi");
  return (i.has("ftz") ? kFtz : 0) | (i.has("sat") ? kSat : 0) | (i.has("relu") ? kRelu : 0) |
         (whole ? kWhole : 0) | (i.has("satfinite") ? kSatfinite : 0);
}

void decode_pair(const ptx::Instruction& i, Assembler& a, Instr* instr, const std::string& to,
                 const std::string& from) {
  instr->aux = flags_of(i);
  if (from == "e4m3x2" || from == "e5m2x2") {
    if (to != "f16x2") unknown(i);
    instr->exec = from == "e4m3x2" ? widen_eight<e4m3_to_f32> : widen_eight<e5m2_to_f32>;
    return a.set_ops(instr, {a.write(i.operands[0], 32), a.read(i.operands[1], 16)});
  }
  const bool eight = to == "e4m3x2" || to == "e5m2x2";
  if (eight && from == "f16x2" && i.has("satfinite")) {
    instr->exec =
        to == "e4m3x2" ? narrow_eight<f32_to_e4m3_saturated> : narrow_eight<f32_to_e5m2_saturated>;
    return a.set_ops(instr, {a.write(i.operands[0], 16), a.read(i.operands[1], 32)});
  }
  if (from != "f32") unknown(i);
  const std::vector<Ref> refs = {a.write(i.operands[0], eight ? 16 : 32),
                                 a.read(i.operands[1], 32, "f32"),
                                 a.read(i.operands[2], 32, "f32")};
  const bool plain = instr->aux == 0 && rounding(i) == Round::kNearest;
  if (plain && to == "f16x2") {
    instr->exec = narrow_pair<f32_to_f16>;
  } else if (plain && to == "bf16x2") {
    instr->exec = narrow_pair<f32_to_bf16>;
  } else {
    auto pair = std::make_shared<Pair>();
    pair->each.to = to.substr(0, to.size() - 2);
    pair->each.from = from;
    pair->each.mode = rounding(i);
    pair->each.flags = instr->aux;
    if (eight) pair->eight = to == "e4m3x2" ? f32_to_e4m3_saturated : f32_to_e5m2_saturated;
    if (eight && !i.has("satfinite")) unknown(i);
    instr->extra = a.own(pair);
    instr->exec = general_pair;
  }
  a.set_ops(instr, refs);
}

Exec quick(const Conversion& c) {
  if (c.flags != 0) return nullptr;
  if (c.from == "f16" && c.to == "f32") return widen<f16_to_f32>;
  if (c.from == "bf16" && c.to == "f32") return widen<bf16_to_f32>;
  if (c.mode == Round::kNearest && c.from == "f32" && c.to == "f16") return narrow<f32_to_f16>;
  if (c.mode == Round::kNearest && c.from == "f32" && c.to == "bf16") return narrow<f32_to_bf16>;
  if (c.from_bits == 32 && c.to_bits == 64 && c.width == 64) {
    if (c.from == "u32" && !is_float(c.to)) return copy_int<uint32_t, uint64_t>;
    if (c.from == "s32" && !is_float(c.to)) return copy_int<int32_t, uint64_t>;
  }
  const bool to_32 = c.to == "u32" || c.to == "s32";
  if (c.from_bits == 64 && to_32 && !is_float(c.from)) return copy_int<uint64_t, uint32_t>;
  return nullptr;
}

void decode_cvt(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(
      i, {"rn",  "rz",   "rm",        "rp",  "rni", "rzi",  "rmi",   "rpi",    "rna",    "ftz",
          "sat", "relu", "satfinite", "s8",  "u8",  "s16",  "u16",   "s32",    "u32",    "s64",
          "u64", "f16",  "bf16",      "f32", "f64", "tf32", "f16x2", "bf16x2", "e4m3x2", "e5m2x2"});
  const std::vector<std::string> types = i.types();
  const std::string &to = types.at(0), &from = types.at(1);
  instr->klass = Class::kConvert;
  if (to.size() > 2 && to.substr(to.size() - 2) == "x2") return decode_pair(i, a, instr, to, from);
  auto c = std::make_shared<Conversion>();
  c->to = to;
  c->from = from;
  c->load_int = int_loader(from);
  c->load_real = real_loader(from);
  c->width = 8 * ptx::bytes_of(to);
  c->to_signed = to[0] == 's';
  c->mode = rounding(i);
  c->flags = flags_of(i);
  if (c->load_int == nullptr && c->load_real == nullptr) unknown(i);
  const int declared_from = a.bits_of(i.operands[1]);
  c->from_bits = declared_from ? declared_from : std::max(16, 8 * ptx::bytes_of(from));
  c->to_bits =
      i.operands[0].form == ptx::Operand::kSink ? std::max(16, c->width) : a.bits_of(i.operands[0]);
  const bool wide_from = c->from_bits == 64, wide_to = c->to_bits == 64;
  instr->exec = quick(*c);
  if (instr->exec == nullptr) {
    instr->exec = wide_from ? (wide_to ? general<uint64_t, uint64_t> : general<uint64_t, uint32_t>)
                            : (wide_to ? general<uint32_t, uint64_t> : general<uint32_t, uint32_t>);
  }
  instr->extra = a.own(c);
  a.set_ops(instr, {a.write(i.operands[0], c->to_bits),
                    a.read(i.operands[1], c->from_bits, is_float(from) ? from.c_str() : "")});
}

}  // namespace

void add_convert(Decoders* decoders) { (*decoders)["cvt"] = decode_cvt; }

}  // namespace sim
