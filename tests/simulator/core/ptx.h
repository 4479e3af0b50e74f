// PTX as text, parsed: modules, functions, variables, instructions. No meaning is attached here.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace sim::ptx {

enum class Space { kReg, kGlobal, kShared, kConst, kLocal, kParam };

struct Operand {
  enum Form {
    kRegister,  // name: %r1, %tid.x; negated: !%p1
    kInteger,   // integer
    kFloat,     // real, given as 0f or 0d bits or as a decimal
    kSymbol,    // name: variable, label or function; integer: offset added (name+8)
    kAddress,   // [parts[0] + integer]; parts[1..]: further elements, as in [map, {c0, c1}]
    kVector,    // {parts...}
    kPair,      // parts[0]|parts[1]
    kSink,      // _
    kList,      // (parts...) of a call
  };
  Form form;
  std::string name;
  int64_t integer = 0;
  double real = 0;
  bool negated = false;
  std::vector<Operand> parts;
};

struct Instruction {
  std::string opcode;                  // "ld"
  std::vector<std::string> modifiers;  // {"global", "v4", "f32"}, "shared::cta" stays one word
  std::vector<Operand> operands;       // destination first
  std::string guard;                   // predicate register of @%p, or empty
  bool guard_negated = false;
  int line = 0;         // of the PTX text
  int source_file = 0;  // of .loc, 0: unknown
  int source_line = 0;

  bool has(const std::string& modifier) const;
  // The type modifiers in order: ld.global.v4.f32 -> {"f32"}, cvt.rn.f16.f32 -> {"f16", "f32"}.
  std::vector<std::string> types() const;
  std::string text() const;  // opcode with its modifiers, for messages
};

struct Variable {
  Space space = Space::kReg;
  std::string name, type;                                  // type: "b8", "f32", "pred"
  int64_t elements = 1;                                    // 0: extern shared of unknown size
  int64_t alignment = 0;                                   // bytes; 0: natural
  std::vector<uint8_t> data;                               // initial value, empty: none
  std::vector<std::pair<int64_t, std::string>> addresses;  // byte offset -> symbol to put there

  int64_t bytes() const;
};

struct Function {
  std::string name;
  bool is_entry = false, is_declaration = false;
  std::vector<Variable> results, params, variables;  // variables: .reg, .shared, .local
  std::vector<Instruction> body;
  std::map<std::string, int> labels;                       // label -> index into body
  std::map<std::string, std::vector<std::string>> tables;  // .branchtargets
  std::map<std::string, std::vector<int>> limits;  // "maxntid", "reqntid", "minnctapersm", ...
};

struct Module {
  std::string version, target;  // "9.0", "sm_90a"
  std::vector<Variable> variables;
  std::vector<Function> functions;
  std::map<int, std::string> files;
};

// Names that a scope hides ({ .reg .b32 t; }) come out unique. Throws Fault(kUnsupported) naming
// the line of what cannot be read.
Module parse(const std::string& text);

int bytes_of(const std::string& type);  // "f32" -> 4, "pred" -> 0

}  // namespace sim::ptx
