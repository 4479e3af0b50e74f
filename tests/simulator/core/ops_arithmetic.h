// What the arithmetic families share: reading modifiers, and one loop over the lanes.
#pragma once

#include <initializer_list>
#include <string>

#include "numbers.h"
#include "program.h"
#include "warp.h"

namespace sim {

void add_float(Decoders*);
void add_half(Decoders*);
void add_integer(Decoders*);
void add_bits(Decoders*);
void add_compare(Decoders*);
void add_convert(Decoders*);

[[noreturn]] inline void unknown(const ptx::Instruction& i) {
  fault(Kind::kUnsupported, -1, i.text(), " is not known");
}

// Every modifier has to be among those that a decoder understands.
inline void check_modifiers(const ptx::Instruction& i, std::initializer_list<const char*> known) {
  for (const std::string& modifier : i.modifiers) {
    bool found = false;
    for (const char* word : known) found |= modifier == word;
    if (!found) unknown(i);
  }
}

// d[lane] = f(a[lane], b[lane], c[lane]) with the registers' storage types.
template <class D, class S, class F>
inline void each_lane(Warp& w, const Instr& i, uint32_t mask, int sources, F f) {
  D value[kLanes];
  const S* a = w.lanes<S>(i.ops[1]);
  const S* b = sources > 1 ? w.lanes<S>(i.ops[2]) : a;
  const S* c = sources > 2 ? w.lanes<S>(i.ops[3]) : a;
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = f(a[lane], b[lane], c[lane]);
  w.write(i.ops[0], value, mask);
}

inline std::vector<Ref> lane_refs(const ptx::Instruction& i, Assembler& a, int bits,
                                  const char* real = "") {
  std::vector<Ref> refs = {a.write(i.operands.at(0), bits)};
  for (size_t s = 1; s < i.operands.size(); ++s) refs.push_back(a.read(i.operands[s], bits, real));
  return refs;
}

inline Round rounding(const ptx::Instruction& i) {
  if (i.has("rz") || i.has("rzi")) return Round::kZero;
  if (i.has("rm") || i.has("rmi")) return Round::kDown;
  if (i.has("rp") || i.has("rpi")) return Round::kUp;
  return i.has("rna") ? Round::kAway : Round::kNearest;
}

// Minimum and maximum of PTX: the other operand where one is NaN, -0 below +0.
template <class T>
inline T ptx_min(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T>
inline T ptx_max(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}

// NaN becomes +0. PTX ISA, .sat.
inline float saturate(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }

}  // namespace sim
