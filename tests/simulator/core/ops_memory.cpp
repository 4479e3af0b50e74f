// ld, st and addresses: cvta, isspacep, mapa, prefetch. PTX ISA, "Data Movement and Conversion".
#include "ops_memory.h"

#include <algorithm>
#include <cstring>

#include "address.h"
#include "ops_arithmetic.h"

namespace sim {
namespace {

// What a load or store moves per lane.
struct Move {
  Where where;
  uint32_t bytes;  // of one element
  uint32_t count;  // elements
  bool is_signed;
};

Class class_of(Where where) {
  switch (where) {
    case Where::kShared:
      return Class::kShared;
    case Where::kLocal:
      return Class::kLocal;
    case Where::kConst:
      return Class::kMove;
    default:
      return Class::kGlobal;
  }
}

template <class T>
uint64_t read_as(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return static_cast<uint64_t>(static_cast<int64_t>(value));
}

uint64_t read_element(const uint8_t* from, const Move& move) {
  switch (move.bytes) {
    case 1:
      return move.is_signed ? read_as<int8_t>(from) : read_as<uint8_t>(from);
    case 2:
      return move.is_signed ? read_as<int16_t>(from) : read_as<uint16_t>(from);
    case 4:
      return move.is_signed ? read_as<int32_t>(from) : read_as<uint32_t>(from);
    default:
      return read_as<uint64_t>(from);
  }
}

// aux: bit e is set where destination e has 64 bits, bit 8 + e where it has 16.
void load(Warp& w, const Instr& i, uint32_t mask) {
  const Move& move = *static_cast<const Move*>(i.extra);
  uint8_t* from[kLanes];
  resolve(w, i, w.lanes<uint64_t>(i.ops[move.count]), move.where, move.bytes * move.count,
          Use::kLoad, mask, from);
  for (uint32_t e = 0; e < move.count; ++e) {
    uint64_t value[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      if (mask >> lane & 1) value[lane] = read_element(from[lane] + e * move.bytes, move);
    }
    if (i.aux >> e & 1) {
      w.write(i.ops[e], value, mask);
      continue;
    }
    const auto kept = static_cast<uint32_t>((i.aux >> 8 >> e & 1) ? 0xffff : kAll);
    uint32_t narrow[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      if (mask >> lane & 1) narrow[lane] = static_cast<uint32_t>(value[lane]) & kept;
    }
    w.write(i.ops[e], narrow, mask);
  }
}

// aux: bit e is set where source e has 64 bits.
void store(Warp& w, const Instr& i, uint32_t mask) {
  const Move& move = *static_cast<const Move*>(i.extra);
  uint8_t* to[kLanes];
  resolve(w, i, w.lanes<uint64_t>(i.ops[move.count]), move.where, move.bytes * move.count,
          Use::kStore, mask, to);
  for (uint32_t e = 0; e < move.count; ++e) {
    const bool wide = i.aux >> e & 1;
    const auto* source = w.lanes<uint8_t>(i.ops[e]);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      std::memcpy(to[lane] + e * move.bytes, source + lane * (wide ? 8 : 4), move.bytes);
    }
  }
}

Move decode_move(const ptx::Instruction& i, size_t count) {
  Move move{};
  const std::vector<std::string> types = i.types();
  if (types.size() != 1) unknown(i);
  move.where = space_of(i);
  move.bytes = static_cast<uint32_t>(ptx::bytes_of(types[0]));
  move.count = static_cast<uint32_t>(count);
  move.is_signed = types[0][0] == 's';
  const uint32_t vector = i.has("v8") ? 8 : i.has("v4") ? 4 : i.has("v2") ? 2 : 1;
  if (move.bytes == 0 || move.bytes > 8 || vector != move.count) unknown(i);
  if (move.bytes * move.count > 16) unknown(i);
  return move;
}

int register_bits(const ptx::Operand& operand, const Move& move, Assembler& a) {
  const int bits = a.bits_of(operand);
  if (bits >= 16) return bits;
  return std::max(16, static_cast<int>(8 * move.bytes));  // an immediate, or a sink
}

void finish(const ptx::Instruction& i, Assembler& a, Instr* instr, const Move& move,
            std::vector<Ref> refs, const ptx::Operand& address) {
  // A cache policy may follow, and says nothing about what is moved.
  if (i.operands.size() > (i.has("L2::cache_hint") ? 3u : 2u)) unknown(i);
  refs.push_back(a.address(address, &instr->imm));
  instr->klass = class_of(move.where);
  instr->extra = a.own(std::make_shared<Move>(move));
  a.set_ops(instr, refs);
}

void decode_ld(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_memory_modifiers(i, {"nc", "v2", "v4", "v8"});
  const std::vector<ptx::Operand> to = elements(i.operands.at(0));
  const Move move = decode_move(i, to.size());
  std::vector<Ref> refs;
  for (size_t e = 0; e < to.size(); ++e) {
    const int bits = register_bits(to[e], move, a);
    if (bits < static_cast<int>(8 * move.bytes)) unknown(i);
    if (bits == 64) instr->aux |= uint64_t{1} << e;
    if (bits == 16) instr->aux |= uint64_t{0x100} << e;
    refs.push_back(a.write(to[e], bits));
  }
  instr->exec = load;
  finish(i, a, instr, move, refs, i.operands.at(1));
}

void decode_st(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_memory_modifiers(i, {"v2", "v4", "v8"});
  const std::vector<ptx::Operand> from = elements(i.operands.at(1));
  const Move move = decode_move(i, from.size());
  const std::string type = i.types()[0];
  const char* real = type[0] == 'f' ? type.c_str() : "";
  std::vector<Ref> refs;
  for (size_t e = 0; e < from.size(); ++e) {
    const int bits = register_bits(from[e], move, a);
    if (bits < static_cast<int>(8 * move.bytes)) unknown(i);
    if (bits == 64) instr->aux |= uint64_t{1} << e;
    refs.push_back(a.read(from[e], bits, real));
  }
  instr->exec = store;
  finish(i, a, instr, move, refs, i.operands.at(0));
}

uint64_t window_of(const ptx::Instruction& i) {
  for (const std::string& m : i.modifiers) {
    if (m.rfind("shared", 0) == 0) return kSharedWindow;
    if (m == "local") return kLocalWindow;
  }
  return 0;
}

// d = a with the window of a state space added, or (aux: 1) taken away.
void convert_address(Warp& w, const Instr& i, uint32_t mask) {
  const uint64_t* from = w.lanes<uint64_t>(i.ops[1]);
  const auto window = static_cast<uint64_t>(i.imm);
  uint64_t value[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool leaves = i.aux && window && (from[lane] & kWindowMask) == window;
    value[lane] = i.aux ? leaves ? from[lane] & ~kWindowMask : from[lane] : from[lane] | window;
  }
  w.write(i.ops[0], value, mask);
}

void decode_cvta(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"to", "global", "const", "param", "shared", "shared::cta", "shared::cluster",
                      "local", "u64"});
  instr->imm = static_cast<int64_t>(window_of(i));
  instr->aux = i.has("to");
  instr->exec = convert_address;
  a.set_ops(instr, {a.write(i.operands.at(0), 64), a.read(i.operands.at(1), 64)});
}

void decode_isspacep(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"global", "shared", "shared::cta", "shared::cluster", "local"});
  instr->imm = static_cast<int64_t>(window_of(i));
  instr->exec = [](Warp& w, const Instr& i, uint32_t mask) {
    const uint64_t* address = w.lanes<uint64_t>(i.ops[1]);
    uint32_t inside = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t window = address[lane] & kWindowMask;
      inside |= uint32_t{window == static_cast<uint64_t>(i.imm)} << lane;
    }
    w.write_predicate(i.ops[0], inside, mask);
  };
  a.set_ops(instr, {a.write(i.operands.at(0), 1), a.read(i.operands.at(1), 64)});
}

// An address in the shared memory of another block of the cluster, which has only this one.
template <class T>
void map_address(Warp& w, const Instr& i, uint32_t mask) {
  const uint32_t* rank = w.lanes<uint32_t>(i.ops[2]);
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((mask >> lane & 1) && rank[lane] != 0) {
      fault(Kind::kUnsupported, lane, "block ", rank[lane], " of a cluster, which has one here");
    }
  }
  w.write(i.ops[0], w.lanes<T>(i.ops[1]), mask);
}

void decode_mapa(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"shared::cluster", "u32", "u64"});
  if (a.target() < 90) fault(Kind::kUnsupported, -1, i.text(), " needs sm_90");
  const int bits = i.has("u64") ? 64 : 32;
  instr->exec = bits == 64 ? map_address<uint64_t> : map_address<uint32_t>;
  a.set_ops(instr, {a.write(i.operands.at(0), bits), a.read(i.operands.at(1), bits),
                    a.read(i.operands.at(2), 32)});
}

// Hints fetch nothing that a kernel could see.
void decode_prefetch(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  check_modifiers(i, {"global", "local", "L1", "L2", "L2::evict_last", "L2::evict_normal"});
  instr->klass = Class::kGlobal;
  instr->exec = [](Warp&, const Instr&, uint32_t) {};
  a.set_ops(instr, {a.address(i.operands.at(0), &instr->imm)});
}

void decode_createpolicy(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  if (a.target() < 80) fault(Kind::kUnsupported, -1, i.text(), " needs sm_80");
  if (!i.has("b64")) unknown(i);
  instr->exec = [](Warp& w, const Instr& i, uint32_t mask) {
    const uint64_t policy[kLanes] = {};
    w.write(i.ops[0], policy, mask);
  };
  a.set_ops(instr, {a.write(i.operands.at(0), 64)});
}

}  // namespace

void check_memory_modifiers(const ptx::Instruction& i, std::initializer_list<const char*> more) {
  static const std::vector<std::string> kKnown = {"weak",        "volatile",
                                                  "relaxed",     "acquire",
                                                  "release",     "acq_rel",
                                                  "cta",         "cluster",
                                                  "gpu",         "sys",
                                                  "global",      "shared",
                                                  "shared::cta", "shared::cluster",
                                                  "local",       "const",
                                                  "param",       "param::entry",
                                                  "param::func", "ca",
                                                  "cg",          "cs",
                                                  "cv",          "lu",
                                                  "wb",          "wt"};
  const std::vector<std::string> types = i.types();
  for (const std::string& m : i.modifiers) {
    const auto listed = [&](const auto& words) {
      return std::any_of(words.begin(), words.end(), [&](const auto& word) { return m == word; });
    };
    const bool hint = m.rfind("L1::", 0) == 0 || m.rfind("L2::", 0) == 0;
    if (!hint && !listed(types) && !listed(kKnown) && !listed(more)) unknown(i);
  }
}

void add_memory(Decoders* decoders) {
  (*decoders)["ld"] = decode_ld;
  (*decoders)["ldu"] = decode_ld;
  (*decoders)["st"] = decode_st;
  (*decoders)["cvta"] = decode_cvta;
  (*decoders)["isspacep"] = decode_isspacep;
  (*decoders)["mapa"] = decode_mapa;
  (*decoders)["prefetch"] = decode_prefetch;
  (*decoders)["prefetchu"] = decode_prefetch;
  (*decoders)["createpolicy"] = decode_createpolicy;
  add_atomics(decoders);
}

}  // namespace sim
