// An opcode such as add means another family per type: add.f32, add.bf16x2, add.s32.
#include "ops_arithmetic.h"

namespace sim {
namespace {

const Decoders& by_family() {
  static const Decoders all = [] {
    Decoders decoders;
    add_float(&decoders);
    add_half(&decoders);
    add_integer(&decoders);
    return decoders;
  }();
  return all;
}

void decode_by_type(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  const std::vector<std::string> types = i.types();
  if (types.empty()) unknown(i);
  const std::string& type = types[0];
  const bool single = type == "f32" || type == "f64";
  const bool half = type == "f16" || type == "f16x2" || type == "bf16" || type == "bf16x2";
  const auto decode = by_family().find(i.opcode + (single ? ".f" : half ? ".h" : ".i"));
  if (decode == by_family().end()) unknown(i);
  decode->second(i, a, instr);
}

}  // namespace

void add_arithmetic(Decoders* decoders) {
  for (const auto& [name, decode] : by_family()) {
    (*decoders)[name.substr(0, name.find('.'))] = decode_by_type;
  }
  add_bits(decoders);
  add_compare(decoders);
  add_convert(decoders);
}

}  // namespace sim
