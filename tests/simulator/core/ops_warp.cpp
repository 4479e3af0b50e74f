// Moves, and what the lanes of a warp tell each other: shfl, vote, match, redux, elect.
#include <algorithm>

#include "block.h"
#include "ops_arithmetic.h"

namespace sim {
namespace {

template <class T>
void move(Warp& w, const Instr& i, uint32_t mask) {
  w.write(i.ops[0], w.lanes<T>(i.ops[1]), mask);
}

void move_predicate(Warp& w, const Instr& i, uint32_t mask) {
  w.write_predicate(i.ops[0], w.predicate(i.ops[1]), mask);
}

// ops: the whole, then its parts from the lowest; aux: bits of a part.
template <class Whole>
void pack(Warp& w, const Instr& i, uint32_t mask) {
  Whole whole[kLanes] = {};
  const Whole part_mask = (Whole{1} << i.aux) - 1;
  for (int part = 1; part < i.op_count; ++part) {
    const uint32_t* from = w.lanes<uint32_t>(i.ops[part]);
    const auto shift = i.aux * static_cast<uint64_t>(part - 1);
    for (int lane = 0; lane < kLanes; ++lane) {
      whole[lane] |= (static_cast<Whole>(from[lane]) & part_mask) << shift;
    }
  }
  w.write(i.ops[0], whole, mask);
}

template <class Whole>
void unpack(Warp& w, const Instr& i, uint32_t mask) {
  Whole whole[kLanes];
  std::copy_n(w.lanes<Whole>(i.ops[0]), kLanes, whole);  // a part may be the whole's own register
  const Whole part_mask = (Whole{1} << i.aux) - 1;
  for (int part = 1; part < i.op_count; ++part) {
    uint32_t value[kLanes];
    const auto shift = i.aux * static_cast<uint64_t>(part - 1);
    for (int lane = 0; lane < kLanes; ++lane) {
      value[lane] = static_cast<uint32_t>(whole[lane] >> shift & part_mask);
    }
    w.write(i.ops[part], value, mask);
  }
}

int bits_of(const std::string& type) {
  return type == "pred" ? 1 : std::max(16, 8 * ptx::bytes_of(type));
}

void decode_mov(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  const std::vector<std::string> types = i.types();
  if (types.size() != 1 || i.modifiers.size() != 1 || types[0] == "b128") unknown(i);
  const int bits = bits_of(types[0]);
  const ptx::Operand &to = i.operands[0], &from = i.operands[1];
  const bool packs = from.form == ptx::Operand::kVector;
  if (packs || to.form == ptx::Operand::kVector) {
    const ptx::Operand& vector = packs ? from : to;
    const int part = bits / static_cast<int>(vector.parts.size());
    if (part < 16) unknown(i);
    std::vector<Ref> refs = {packs ? a.write(to, bits) : a.read(from, bits)};
    for (const ptx::Operand& p : vector.parts) {
      refs.push_back(packs ? a.read(p, part) : a.write(p, part));
    }
    instr->aux = static_cast<uint64_t>(part);
    instr->exec = bits == 64 ? packs ? pack<uint64_t> : unpack<uint64_t>
                             : (packs ? pack<uint32_t> : unpack<uint32_t>);
    return a.set_ops(instr, refs);
  }
  const char* real = types[0][0] == 'f' ? types[0].c_str() : "";
  instr->exec = bits == 1 ? move_predicate : bits == 64 ? move<uint64_t> : move<uint32_t>;
  a.set_ops(instr, {a.write(to, bits), a.read(from, bits, real)});
}

// The lanes that a .sync instruction names; all of them have to be here.
uint32_t members(Warp& w, Ref ref, uint32_t mask) {
  const uint32_t* lanes = w.lanes<uint32_t>(ref);
  const uint32_t named = lanes[first_lane(mask)];
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (lanes[lane] != named) fault(Kind::kDivergence, lane, "lanes with different member masks");
    if (!(named >> lane & 1)) fault(Kind::kDivergence, lane, "a lane that its member mask omits");
  }
  if (const uint32_t absent = named & w.alive & ~mask) {
    fault(Kind::kDivergence, first_lane(absent), "member mask ", std::hex, named,
          " names lanes that are not here: ", absent);
  }
  return named;
}

enum Shuffle : uint64_t { kUp, kDown, kBfly, kIdx };

// ops: d, p, a, b, c, members. PTX ISA, shfl.sync.
void shuffle(Warp& w, const Instr& i, uint32_t mask) {
  members(w, i.ops[5], mask);
  const uint32_t *a = w.lanes<uint32_t>(i.ops[2]), *b = w.lanes<uint32_t>(i.ops[3]),
                 *c = w.lanes<uint32_t>(i.ops[4]);
  uint32_t value[kLanes], valid = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int by = static_cast<int>(b[lane] & 31), clamp = static_cast<int>(c[lane] & 31);
    const int segment = static_cast<int>(c[lane] >> 8 & 31);
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int from = 0;
    bool in = false;
    switch (static_cast<Shuffle>(i.aux)) {
      case kUp:
        in = (from = lane - by) >= last;
        break;
      case kDown:
        in = (from = lane + by) <= last;
        break;
      case kBfly:
        in = (from = lane ^ by) <= last;
        break;
      case kIdx:
        in = (from = first | (by & ~segment)) <= last;
        break;
    }
    if (!in) from = lane;
    valid |= uint32_t{in} << lane;
    if ((mask >> lane & 1) && !(mask >> from & 1)) {
      fault(Kind::kDivergence, lane, "reads lane ", from, ", which does not take part");
    }
    value[lane] = a[from];
  }
  w.write(i.ops[0], value, mask);
  w.write_predicate(i.ops[1], valid, mask);
}

void decode_shfl(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  if (!i.has("sync") || !i.has("b32") || i.modifiers.size() != 3) unknown(i);
  instr->aux = i.has("up") ? kUp : i.has("down") ? kDown : i.has("bfly") ? kBfly : kIdx;
  if (instr->aux == kIdx && !i.has("idx")) unknown(i);
  ptx::Operand sink;
  sink.form = ptx::Operand::kSink;
  const ptx::Operand& to = i.operands[0];
  const bool pair = to.form == ptx::Operand::kPair;
  instr->exec = shuffle;
  instr->klass = Class::kShuffle;
  a.set_ops(instr, {a.write(pair ? to.parts[0] : to, 32), a.write(pair ? to.parts[1] : sink, 1),
                    a.read(i.operands[1], 32), a.read(i.operands[2], 32), a.read(i.operands[3], 32),
                    a.read(i.operands[4], 32)});
}

enum Vote : uint64_t { kVoteAll, kVoteAny, kVoteUni, kBallot };

// ops: d, predicate, members; bit 2 of aux: the predicate is negated.
void vote(Warp& w, const Instr& i, uint32_t mask) {
  const uint32_t named = members(w, i.ops[2], mask) & mask;
  const uint32_t p = w.predicate(i.ops[1]);
  const uint32_t yes = ((i.aux & 4) ? ~p : p) & named;
  const auto kind = static_cast<Vote>(i.aux & 3);
  if (kind == kBallot) {
    uint32_t value[kLanes];
    std::fill_n(value, kLanes, yes);
    return w.write(i.ops[0], value, mask);
  }
  const bool result = kind == kVoteAny ? yes != 0 : yes == named || (kind == kVoteUni && yes == 0);
  w.write_predicate(i.ops[0], result ? kAll : 0, mask);
}

void decode_vote(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  if (!i.has("sync") || i.modifiers.size() != 3) unknown(i);
  const bool ballot = i.has("ballot");
  instr->aux = ballot ? kBallot : i.has("all") ? kVoteAll : i.has("any") ? kVoteAny : kVoteUni;
  if (instr->aux == kVoteUni && !i.has("uni")) unknown(i);
  ptx::Operand p = i.operands[1];
  if (p.negated) instr->aux |= 4;
  p.negated = false;
  instr->exec = vote;
  instr->klass = Class::kShuffle;
  a.set_ops(instr,
            {a.write(i.operands[0], ballot ? 32 : 1), a.read(p, 1), a.read(i.operands[2], 32)});
}

// ops: d, all-equal predicate, value, members; aux: 1 for .all.
template <class T>
void match(Warp& w, const Instr& i, uint32_t mask) {
  const uint32_t named = members(w, i.ops[3], mask) & mask;
  const T* from = w.lanes<T>(i.ops[2]);
  uint32_t value[kLanes], same = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t equal = 0;
    for (int other = 0; other < kLanes; ++other) {
      equal |= uint32_t{from[other] == from[lane]} << other;
    }
    equal &= named;
    same |= uint32_t{equal == named} << lane;
    value[lane] = i.aux && equal != named ? 0 : equal;
  }
  w.write(i.ops[0], value, mask);
  w.write_predicate(i.ops[1], same, mask);
}

void decode_match(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  if (!i.has("sync") || !(i.has("all") || i.has("any"))) unknown(i);
  const int bits = bits_of(i.types().at(0));
  ptx::Operand sink;
  sink.form = ptx::Operand::kSink;
  const ptx::Operand& to = i.operands[0];
  const bool pair = to.form == ptx::Operand::kPair;
  instr->aux = i.has("all");
  instr->exec = bits == 64 ? match<uint64_t> : match<uint32_t>;
  instr->klass = Class::kShuffle;
  a.set_ops(instr, {a.write(pair ? to.parts[0] : to, 32), a.write(pair ? to.parts[1] : sink, 1),
                    a.read(i.operands[1], bits), a.read(i.operands[2], 32)});
}

template <class T>
uint32_t reduce(const std::string& how, T a, T b) {
  if (how == "add") return static_cast<uint32_t>(a) + static_cast<uint32_t>(b);
  if (how == "min") return static_cast<uint32_t>(std::min(a, b));
  if (how == "max") return static_cast<uint32_t>(std::max(a, b));
  if (how == "and") return static_cast<uint32_t>(a) & static_cast<uint32_t>(b);
  if (how == "or") return static_cast<uint32_t>(a) | static_cast<uint32_t>(b);
  return static_cast<uint32_t>(a) ^ static_cast<uint32_t>(b);
}

// ops: d, a, members; extra: the operation's name.
template <class T>
void redux(Warp& w, const Instr& i, uint32_t mask) {
  const uint32_t named = members(w, i.ops[2], mask) & mask;
  const auto& how = *static_cast<const std::string*>(i.extra);
  const uint32_t* a = w.lanes<uint32_t>(i.ops[1]);
  uint32_t result = a[first_lane(named)];
  for (int lane = first_lane(named) + 1; lane < kLanes; ++lane) {
    if (named >> lane & 1) {
      result = reduce<T>(how, static_cast<T>(result), static_cast<T>(a[lane]));
    }
  }
  uint32_t value[kLanes];
  std::fill_n(value, kLanes, result);
  w.write(i.ops[0], value, mask);
}

void decode_redux(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  static const std::string kKnown[] = {"add", "min", "max", "and", "or", "xor"};
  const bool known =
      std::find(std::begin(kKnown), std::end(kKnown), i.modifiers.at(1)) != std::end(kKnown);
  if (!i.has("sync") || !known || i.modifiers.size() != 3) unknown(i);
  if (!i.has("s32") && !i.has("u32") && !i.has("b32")) unknown(i);
  if (a.target() < 80) fault(Kind::kUnsupported, -1, "redux needs sm_80");
  instr->extra = a.own(std::make_shared<std::string>(i.modifiers[1]));
  instr->exec = i.has("s32") ? redux<int32_t> : redux<uint32_t>;
  instr->klass = Class::kShuffle;
  a.set_ops(instr,
            {a.write(i.operands[0], 32), a.read(i.operands[1], 32), a.read(i.operands[2], 32)});
}

void decode_activemask(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  instr->klass = Class::kShuffle;
  instr->exec = [](Warp& w, const Instr& instr, uint32_t mask) {
    uint32_t value[kLanes];
    std::fill_n(value, kLanes, mask);
    w.write(instr.ops[0], value, mask);
  };
  a.set_ops(instr, {a.write(i.operands[0], 32)});
}

// ops: d, p, members.
void decode_elect(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  if (!i.has("sync") || a.target() < 90) unknown(i);
  instr->klass = Class::kShuffle;
  instr->exec = [](Warp& w, const Instr& instr, uint32_t mask) {
    const int leader = first_lane(members(w, instr.ops[2], mask) & mask);
    uint32_t value[kLanes];
    std::fill_n(value, kLanes, static_cast<uint32_t>(leader));
    w.write(instr.ops[0], value, mask);
    w.write_predicate(instr.ops[1], 1u << leader, mask);
  };
  const ptx::Operand& to = i.operands[0];
  if (to.form != ptx::Operand::kPair) unknown(i);
  a.set_ops(instr, {a.write(to.parts[0], 32), a.write(to.parts[1], 1), a.read(i.operands[1], 32)});
}

void decode_trap(const ptx::Instruction&, Assembler&, Instr* instr) {
  instr->klass = Class::kControl;
  instr->exec = [](Warp&, const Instr&, uint32_t mask) {
    fault(Kind::kTrap, first_lane(mask), "the kernel ran into a trap");
  };
}

// Sleeping is letting others run.
void decode_nanosleep(const ptx::Instruction&, Assembler&, Instr* instr) {
  instr->klass = Class::kControl;
  instr->exec = [](Warp& w, const Instr&, uint32_t) { w.yield = true; };
}

// Without effect on what a kernel computes: setmaxnreg, griddepcontrol.
void decode_hint(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  if (a.target() < 90) fault(Kind::kUnsupported, -1, i.text(), " needs sm_90");
  instr->klass = Class::kControl;
  instr->exec = [](Warp&, const Instr&, uint32_t) {};
}

}  // namespace

void add_warp(Decoders* decoders) {
  (*decoders)["mov"] = decode_mov;
  (*decoders)["shfl"] = decode_shfl;
  (*decoders)["vote"] = decode_vote;
  (*decoders)["match"] = decode_match;
  (*decoders)["redux"] = decode_redux;
  (*decoders)["activemask"] = decode_activemask;
  (*decoders)["elect"] = decode_elect;
  (*decoders)["trap"] = decode_trap;
  (*decoders)["nanosleep"] = decode_nanosleep;
  (*decoders)["setmaxnreg"] = decode_hint;
  (*decoders)["griddepcontrol"] = decode_hint;
}

}  // namespace sim
