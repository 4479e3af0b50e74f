// Parsed PTX to a Kernel: registers get their places, branches their targets and the point where
// their paths meet again.
#include <algorithm>
#include <bit>
#include <cmath>
#include <set>

#include "control_flow.h"
#include "kernel.h"
#include "numbers.h"
#include "warp.h"

namespace sim {
namespace {

const std::map<std::string, Special> kSpecialNames = {{"%tid.x", kTidX},
                                                      {"%tid.y", kTidY},
                                                      {"%tid.z", kTidZ},
                                                      {"%ntid.x", kNtidX},
                                                      {"%ntid.y", kNtidY},
                                                      {"%ntid.z", kNtidZ},
                                                      {"%ctaid.x", kCtaidX},
                                                      {"%ctaid.y", kCtaidY},
                                                      {"%ctaid.z", kCtaidZ},
                                                      {"%nctaid.x", kNctaidX},
                                                      {"%nctaid.y", kNctaidY},
                                                      {"%nctaid.z", kNctaidZ},
                                                      {"%laneid", kLaneid},
                                                      {"%warpid", kWarpid},
                                                      {"%nwarpid", kNwarpid},
                                                      {"%smid", kSmid},
                                                      {"%nsmid", kNsmid},
                                                      {"%lanemask_eq", kLanemaskEq},
                                                      {"%lanemask_le", kLanemaskLe},
                                                      {"%lanemask_lt", kLanemaskLt},
                                                      {"%lanemask_ge", kLanemaskGe},
                                                      {"%lanemask_gt", kLanemaskGt},
                                                      {"%clock", kClock},
                                                      {"%dynamic_smem_size", kDynamicShared},
                                                      {"%total_smem_size", kTotalShared},
                                                      // A cluster is one block.
                                                      {"%clusterid.x", kCtaidX},
                                                      {"%clusterid.y", kCtaidY},
                                                      {"%clusterid.z", kCtaidZ},
                                                      {"%nclusterid.x", kNctaidX},
                                                      {"%nclusterid.y", kNctaidY},
                                                      {"%nclusterid.z", kNctaidZ},
                                                      {"%cluster_ctaid.x", kZero},
                                                      {"%cluster_ctaid.y", kZero},
                                                      {"%cluster_ctaid.z", kZero},
                                                      {"%cluster_nctaid.x", kOne},
                                                      {"%cluster_nctaid.y", kOne},
                                                      {"%cluster_nctaid.z", kOne},
                                                      {"%cluster_ctarank", kZero},
                                                      {"%cluster_nctarank", kOne}};

constexpr uint32_t kSlot32 = kLanes * 4, kSlot64 = kLanes * 8;

uint32_t align(uint32_t at, uint32_t to) { return (at + to - 1) / to * to; }

uint64_t bits_of_real(double value, const std::string& format) {
  if (format == "f64") return std::bit_cast<uint64_t>(value);
  const float single = static_cast<float>(value);
  if (format == "f16") return f32_to_f16(single);
  if (format == "bf16") return f32_to_bf16(single);
  return std::bit_cast<uint32_t>(single);
}

template <class T>
void move_lanes(Warp& w, const Instr& i, uint32_t mask) {
  w.write(i.ops[0], w.lanes<T>(i.ops[1]), mask);
}

class Builder : public Assembler {
 public:
  Builder(const ptx::Module& module, const ModuleMemory& memory, Kernel* kernel)
      : module_(module), memory_(memory), kernel_(*kernel) {
    static const Decoders all = [] {
      Decoders decoders;
      add_arithmetic(&decoders);
      add_memory(&decoders);
      add_async(&decoders);
      add_barriers(&decoders);
      add_tensor(&decoders);
      add_warp(&decoders);
      return decoders;
    }();
    decoders_ = &all;
    kernel_.register_bytes = kSpecials * kSlot32;
  }

  void build(const ptx::Function& entry) {
    place_params(entry);
    function(entry);
    kernel_.entry = starts_.at(entry.name);
    kernel_.static_shared = kernel_.dynamic_shared ? align(shared_, 1024) : shared_;
    for (const auto& [at, bits] : dynamic_) {  // where it begins is known only now
      const auto step = static_cast<uint32_t>(bits == 64 ? 8 : 4);
      for (uint32_t lane = 0; lane < kLanes; ++lane) {
        uint64_t value = 0;
        std::memcpy(&value, &kernel_.constants[at + step * lane], step);
        value += kernel_.static_shared;
        std::memcpy(&kernel_.constants[at + step * lane], &value, step);
      }
    }
  }

  Ref read(const ptx::Operand& o, int bits, const char* real) override {
    switch (o.form) {
      case ptx::Operand::kRegister:
        return reg(o, bits);
      case ptx::Operand::kInteger:
        if (*real && std::string(real) != "f16" && std::string(real) != "bf16") {
          return constant(bits_of_real(static_cast<double>(o.integer), real), bits);
        }
        return constant(static_cast<uint64_t>(o.integer), bits);
      case ptx::Operand::kFloat:
        return constant(bits_of_real(o.real, *real ? real : bits == 64 ? "f64" : "f32"), bits);
      case ptx::Operand::kSymbol:
        return symbol(o, bits);
      default:
        fault(Kind::kUnsupported, -1, "an operand of ", current_->text(), " cannot be read");
    }
  }

  Ref write(const ptx::Operand& o, int bits) override {
    if (o.form == ptx::Operand::kSink) return allocate(bits);
    if (o.form != ptx::Operand::kRegister) {
      fault(Kind::kUnsupported, -1, "the destination of ", current_->text(), " is no register");
    }
    return reg(o, bits);
  }

  int bits_of(const ptx::Operand& o) override {
    if (o.form != ptx::Operand::kRegister) return o.form == ptx::Operand::kSymbol ? 64 : 0;
    return find(o).bits;
  }

  bool is_immediate(const ptx::Operand& o, int64_t* value) override {
    if (o.form != ptx::Operand::kInteger) return false;
    *value = o.integer;
    return true;
  }

  Ref address(const ptx::Operand& o, int64_t* offset) override {
    if (o.form != ptx::Operand::kAddress) {
      fault(Kind::kUnsupported, -1, "expected an address in ", current_->text());
    }
    *offset = o.integer;
    const ptx::Operand& base = o.parts[0];
    if (base.form != ptx::Operand::kRegister) return read(base, 64, "");
    const Register r = find(base);
    return r.bits == 64 ? r.ref : widened(r.ref);
  }

  void set_ops(Instr* instr, std::vector<Ref> refs) override {
    auto owned = std::make_shared<std::vector<Ref>>(std::move(refs));
    instr->ops = owned->data();
    instr->op_count = static_cast<uint8_t>(std::min<size_t>(owned->size(), 255));
    kernel_.owned.push_back(owned);
  }

  void* own(std::shared_ptr<void> extra) override {
    kernel_.owned.push_back(extra);
    return extra.get();
  }

  int target() const override { return kernel_.target; }

 private:
  struct Register {
    Ref ref;
    int bits;
  };

  void place_params(const ptx::Function& entry) {
    uint32_t at = 0;
    for (const ptx::Variable& v : entry.params) {
      const auto bytes = static_cast<uint32_t>(v.bytes());
      const auto natural = static_cast<uint32_t>(ptx::bytes_of(v.type));
      at = align(at, std::max(static_cast<uint32_t>(v.alignment), natural));
      kernel_.params.push_back({v.name, at, bytes});
      at += bytes;
    }
    kernel_.param_bytes = at;
    for (const auto& [limit, values] : entry.limits) {
      int product = 1;
      for (int value : values) product *= value;
      if (limit == "maxntid") kernel_.max_threads = product;
      if (limit == "reqntid") kernel_.required_threads = product;
    }
  }

  Ref allocate(int bits) {
    const uint32_t at = kernel_.register_bytes;
    kernel_.register_bytes += bits == 1 ? 64 : bits == 64 ? kSlot64 : kSlot32;
    return Ref{at, 0};
  }

  static int width(const std::string& type) {
    return type == "pred" ? 1 : std::max(16, 8 * ptx::bytes_of(type));
  }

  void declare(const ptx::Function& f) {
    uint32_t at = align(kernel_.local_bytes, 16);
    families_[f.name];
    for (const ptx::Variable& v : f.variables) {
      const auto bytes = static_cast<uint32_t>(v.bytes());
      const auto alignment = static_cast<uint32_t>(std::max<int64_t>(v.alignment, 1));
      if (v.space == ptx::Space::kReg) {
        families_[f.name][v.name] = width(v.type);
      } else if (v.space == ptx::Space::kLocal) {
        at = align(at, std::max(alignment, 8u));
        symbols_[f.name + ":" + v.name] = at;
        at += bytes;
      } else if (v.space == ptx::Space::kShared) {
        place_shared(f.name + ":" + v.name, v);
      }
    }
    kernel_.local_bytes = at;
  }

  void place_shared(const std::string& name, const ptx::Variable& v) {
    const auto natural = static_cast<int64_t>(ptx::bytes_of(v.type));
    shared_ = align(shared_, static_cast<uint32_t>(std::max(v.alignment, natural)));
    symbols_[name] = shared_;
    shared_ += static_cast<uint32_t>(v.bytes());
  }

  // Callees come before the code that calls them, so that what they return is known there.
  void function(const ptx::Function& f) {
    if (!visiting_.insert(f.name).second) {
      fault(Kind::kUnsupported, -1, "recursion of ", f.name);
    }
    for (const ptx::Instruction& i : f.body) {
      if (i.opcode == "call") callee(call_name(i));
    }
    function_ = &f;
    declare(f);
    starts_[f.name] = static_cast<int32_t>(kernel_.code.size());
    body(f);
  }

  void callee(const std::string& name) {
    if (starts_.count(name)) return;
    for (const ptx::Function& f : module_.functions) {
      if (f.name == name && !f.is_declaration) return function(f);
    }
    fault(Kind::kUnsupported, -1, "function ", name, " has no body in this module");
  }

  static const std::string& call_name(const ptx::Instruction& i) {
    for (const ptx::Operand& o : i.operands) {
      if (o.form == ptx::Operand::kSymbol) return o.name;
      if (o.form == ptx::Operand::kRegister) break;
    }
    fault(Kind::kUnsupported, -1, "line ", i.line, ": an indirect call");
  }

  void body(const ptx::Function& f) {
    const std::vector<int> meet = reconvergence(f);
    const auto end = static_cast<int>(f.body.size());
    std::vector<bool> is_join(end + 1, false);
    for (int at : meet) {
      if (at >= 0) is_join[at] = true;
    }
    is_join[end] = true;
    std::vector<int32_t> place(end + 1);
    std::vector<std::pair<int32_t, int>> branches;  // code index, body index
    for (int at = 0; at <= end; ++at) {
      place[at] = static_cast<int32_t>(kernel_.code.size());
      if (is_join[at]) plain(Flow::kJoin, at < end ? f.body[at].line : 0);
      if (at < end) instruction(f.body[at], at, &branches);
    }
    plain(f.is_entry ? Flow::kExit : Flow::kReturn, f.body.empty() ? 0 : f.body.back().line);
    const auto label = [&](const std::string& name) { return place[f.labels.at(name)]; };
    for (const auto& [code, at] : branches) {
      Instr& instr = kernel_.code[code];
      const ptx::Instruction& i = f.body[at];
      instr.reconverge = meet[at] >= 0 ? place[meet[at]] : -1;
      if (instr.flow == Flow::kBranch) {
        instr.target = i.opcode == "ret" ? place[end] : label(i.operands[0].name);
      } else if (instr.flow == Flow::kBranchTable) {
        auto table = std::make_shared<std::vector<int32_t>>();
        for (const std::string& name : f.tables.at(i.operands[1].name)) {
          table->push_back(label(name));
        }
        instr.extra = own(table);
        instr.aux = table->size();
      }
    }
  }

  void plain(Flow flow, int line) {
    Instr instr;
    instr.flow = flow;
    instr.klass = Class::kControl;
    instr.line = static_cast<uint32_t>(line);
    instr.source = kNoSource;
    kernel_.code.push_back(instr);
  }

  void instruction(const ptx::Instruction& i, int at,
                   std::vector<std::pair<int32_t, int>>* branches) {
    current_ = &i;
    try {
      Instr instr;
      instr.line = static_cast<uint32_t>(i.line);
      instr.source = static_cast<uint32_t>(kernel_.sources.size());
      kernel_.sources.push_back(i);
      if (!i.guard.empty()) {
        ptx::Operand guard;
        guard.form = ptx::Operand::kRegister;
        guard.name = i.guard;
        instr.guard = reg(guard, 1);
        instr.guarded = true;
        instr.guard_negated = i.guard_negated;
      }
      if (control(i, &instr)) {
        branches->emplace_back(static_cast<int32_t>(kernel_.code.size()), at);
        kernel_.code.push_back(instr);
      } else if (i.opcode == "call") {
        call(i, instr);
      } else if ((i.opcode == "ld" || i.opcode == "st") && function_param(i)) {
        param_move(i, instr);
      } else {
        const auto decode = decoders_->find(i.opcode);
        if (decode == decoders_->end()) fault(Kind::kUnsupported, -1, i.text(), " is not known");
        decode->second(i, *this, &instr);
        kernel_.code.push_back(instr);
      }
    } catch (const Fault& reason) {
      if (reason.kind != Kind::kUnsupported) throw;
      fault(Kind::kUnsupported, -1, kernel_.name, ", PTX line ", i.line, ": ", reason.what());
    } catch (const std::exception& reason) {
      fault(Kind::kUnsupported, -1, kernel_.name, ", PTX line ", i.line, ": ", i.text(),
            " cannot be decoded: ", reason.what());
    }
  }

  bool control(const ptx::Instruction& i, Instr* instr) {
    if (i.opcode == "bra") {
      instr->flow = Flow::kBranch;
    } else if (i.opcode == "ret") {
      instr->flow = function_->is_entry ? Flow::kExit : Flow::kBranch;
    } else if (i.opcode == "exit") {
      instr->flow = Flow::kExit;
    } else if (i.opcode == "brx") {
      instr->flow = Flow::kBranchTable;
      set_ops(instr, {read(i.operands[0], 32, "")});
    } else {
      return false;
    }
    instr->klass = Class::kControl;
    return true;
  }

  // Arguments and results of device functions are registers named (variable, byte offset).
  bool function_param(const ptx::Instruction& i) const {
    if (std::none_of(i.modifiers.begin(), i.modifiers.end(),
                     [](const std::string& m) { return m.rfind("param", 0) == 0; })) {
      return false;
    }
    const ptx::Operand& address = i.operands[i.opcode == "ld" ? 1 : 0];
    return address.parts[0].form == ptx::Operand::kSymbol &&
           !is_kernel_param(address.parts[0].name);
  }

  bool is_kernel_param(const std::string& name) const {
    return std::any_of(kernel_.params.begin(), kernel_.params.end(),
                       [&](const Param& p) { return p.name == name; });
  }

  using Slots = std::map<int64_t, Register>;

  void move(const Register& to, const Register& from, Instr instr) {
    instr.exec = to.bits == 64 ? move_lanes<uint64_t> : move_lanes<uint32_t>;
    instr.klass = Class::kMove;
    set_ops(&instr, {to.ref, from.ref});
    kernel_.code.push_back(instr);
  }

  Register slot(const std::string& variable, int64_t offset, int bits) {
    Slots& slots = slots_[function_->name + ":" + variable];
    const auto found = slots.find(offset);
    if (found == slots.end()) return slots[offset] = Register{allocate(bits), bits};
    if (found->second.bits != bits) {
      fault(Kind::kUnsupported, -1, "a function's argument accessed in two widths");
    }
    return found->second;
  }

  void param_move(const ptx::Instruction& i, const Instr& instr) {
    const bool load = i.opcode == "ld";
    const std::string type = i.types().at(0);
    const int bytes = ptx::bytes_of(type), bits = bytes == 8 ? 64 : 32;
    const ptx::Operand& address = i.operands[load ? 1 : 0];
    const ptx::Operand& value = i.operands[load ? 0 : 1];
    const bool vector = value.form == ptx::Operand::kVector;
    const size_t count = vector ? value.parts.size() : 1;
    for (size_t e = 0; e < count; ++e) {
      const Register place = slot(address.parts[0].name, address.integer + bytes * e, bits);
      const ptx::Operand& one = vector ? value.parts[e] : value;
      const Register mine{load ? write(one, bits) : read(one, bits, type.c_str()), bits};
      load ? move(mine, place, instr) : move(place, mine, instr);
    }
  }

  void call(const ptx::Instruction& i, Instr instr) {
    const std::string& name = call_name(i);
    const ptx::Function& f =
        *std::find_if(module_.functions.begin(), module_.functions.end(),
                      [&](const ptx::Function& g) { return g.name == name && !g.is_declaration; });
    size_t operand = 0;
    const auto names = [&]() -> std::vector<std::string> {
      std::vector<std::string> list;
      if (operand < i.operands.size() && i.operands[operand].form == ptx::Operand::kList) {
        for (const ptx::Operand& part : i.operands[operand].parts) list.push_back(part.name);
        ++operand;
      }
      return list;
    };
    const std::vector<std::string> results = names();
    ++operand;  // the function's name
    const std::vector<std::string> arguments = names();
    const std::string mine = function_->name + ":", theirs = f.name + ":";
    for (size_t a = 0; a < arguments.size(); ++a) {
      copy_slots(slots_[theirs + f.params.at(a).name], slots_[mine + arguments[a]], instr);
    }
    Instr jump = instr;
    jump.flow = Flow::kCall;
    jump.klass = Class::kControl;
    jump.target = starts_.at(name);
    kernel_.code.push_back(jump);
    for (size_t r = 0; r < results.size(); ++r) {
      copy_slots(slots_[mine + results[r]], slots_[theirs + f.results.at(r).name], instr);
    }
  }

  void copy_slots(Slots& to, const Slots& from, const Instr& instr) {
    for (const auto& [offset, source] : from) {
      if (!to.count(offset)) to[offset] = Register{allocate(source.bits), source.bits};
      move(to[offset], source, instr);
    }
  }

  Register find(const ptx::Operand& o) {
    if (const auto special = kSpecialNames.find(o.name); special != kSpecialNames.end()) {
      return {Ref{special->second * kSlot32, 0}, 32};
    }
    if (o.name == "%clock64" || o.name == "%globaltimer") {
      return {widened(Ref{kClock * kSlot32, 0}), 64};
    }
    const std::string key = function_->name + ":" + o.name;
    if (const auto found = registers_.find(key); found != registers_.end()) return found->second;
    const Register made{{}, o.name == "%carry" ? 1 : declared_bits(o.name)};
    Register& placed = registers_[key] = made;
    placed.ref = allocate(made.bits);
    return placed;
  }

  int declared_bits(const std::string& name) const {
    const auto& families = families_.at(function_->name);
    if (const auto found = families.find(name); found != families.end()) return found->second;
    const size_t digits = name.find_last_not_of("0123456789") + 1;
    const auto found = families.find(name.substr(0, digits));
    if (found == families.end()) {
      fault(Kind::kUnsupported, -1, "register ", name, " is not known");
    }
    return found->second;
  }

  Ref reg(const ptx::Operand& o, int bits) {
    const Register r = find(o);
    const bool fits = bits == 1 ? r.bits == 1 : bits == 64 ? r.bits == 64 : r.bits <= 32;
    if (!fits || (bits != 1 && r.bits == 1)) {
      fault(Kind::kUnsupported, -1, "register ", o.name, " has ", r.bits, " bits where ",
            current_->text(), " takes ", bits);
    }
    if (bits == 1 && o.negated) fault(Kind::kUnsupported, -1, "a negated predicate here");
    return r.ref;
  }

  // A constant lies in the kernel's bank, once per lane.
  Ref constant(uint64_t value, int bits) {
    if (bits == 1) value = value ? kAll : 0;
    if (bits == 16) value &= 0xffff;
    if (bits < 64) value &= kAll;
    const auto key = std::make_pair(value, bits == 64);
    if (const auto found = constants_.find(key); found != constants_.end()) return found->second;
    return constants_[key] = new_constant(value, bits);
  }

  Ref new_constant(uint64_t value, int bits) {
    const auto at = static_cast<uint32_t>(kernel_.constants.size());
    kernel_.constants.resize(at + (bits == 64 ? kSlot64 : kSlot32));
    for (int lane = 0; lane < kLanes; ++lane) {
      if (bits == 64) {
        std::memcpy(&kernel_.constants[at + 8 * lane], &value, 8);
      } else {
        std::memcpy(&kernel_.constants[at + 4 * lane], &value, 4);
      }
    }
    return Ref{at, 1};
  }

  // The address of a variable, in its own state space; a kernel's parameters lie in host memory.
  Ref symbol(const ptx::Operand& o, int bits) {
    for (const Param& param : kernel_.params) {
      if (param.name != o.name) continue;
      const Ref ref = new_constant(0, 64);
      kernel_.param_addresses.emplace_back(ref.offset,
                                           param.offset + static_cast<uint32_t>(o.integer));
      return ref;
    }
    if (const auto local = symbols_.find(function_->name + ":" + o.name); local != symbols_.end()) {
      return constant(local->second + o.integer, bits);
    }
    if (const auto global = memory_.storage.find(o.name); global != memory_.storage.end()) {
      return constant(reinterpret_cast<uint64_t>(global->second.data()) + o.integer, bits);
    }
    for (const ptx::Variable& v : module_.variables) {
      if (v.name != o.name || v.space != ptx::Space::kShared) continue;
      if (v.elements == 0) {
        kernel_.dynamic_shared = true;
        const Ref ref = new_constant(static_cast<uint64_t>(o.integer), bits);
        dynamic_.emplace_back(ref.offset, bits);
        return ref;
      }
      if (!symbols_.count(":" + o.name)) place_shared(":" + o.name, v);
      return constant(symbols_.at(":" + o.name) + o.integer, bits);
    }
    fault(Kind::kUnsupported, -1, "symbol ", o.name, " is not known");
  }

  // A 32-bit register where an address of 64 bits is needed: shared and local addresses.
  Ref widened(Ref narrow) {
    Instr instr;
    instr.exec = [](Warp& w, const Instr& i, uint32_t mask) {
      uint64_t wide[kLanes];
      const uint32_t* from = w.lanes<uint32_t>(i.ops[1]);
      for (int lane = 0; lane < kLanes; ++lane) wide[lane] = from[lane];
      w.write(i.ops[0], wide, mask);
    };
    instr.source = kNoSource;  // no instruction of the program: not counted
    const Ref wide = allocate(64);
    set_ops(&instr, {wide, narrow});
    kernel_.code.push_back(instr);
    return wide;
  }

  const ptx::Module& module_;
  const ModuleMemory& memory_;
  Kernel& kernel_;
  const Decoders* decoders_;
  const ptx::Function* function_ = nullptr;
  const ptx::Instruction* current_ = nullptr;
  uint32_t shared_ = 0;
  std::set<std::string> visiting_;
  std::map<std::string, int32_t> starts_;                       // function -> code index
  std::map<std::string, std::map<std::string, int>> families_;  // function -> name -> bits
  std::map<std::string, Register> registers_;                   // "function:name"
  std::map<std::string, Slots> slots_;                          // "function:variable"
  std::map<std::string, uint32_t> symbols_;  // "function:name", ":name": shared or local offset
  std::map<std::pair<uint64_t, bool>, Ref> constants_;
  std::vector<std::pair<uint32_t, int>> dynamic_;  // constants that dynamic shared memory moves
};

}  // namespace

std::unique_ptr<ModuleMemory> place_variables(const ptx::Module& module) {
  auto memory = std::make_unique<ModuleMemory>();
  for (const ptx::Variable& v : module.variables) {
    if (v.space != ptx::Space::kGlobal && v.space != ptx::Space::kConst) continue;
    std::vector<Line>& words = memory->storage[v.name];
    words = lines_for(static_cast<uint64_t>(v.bytes()));
    std::memcpy(words.data(), v.data.data(), v.data.size());
    memory->allocations.add(reinterpret_cast<uint64_t>(words.data()),
                            static_cast<uint64_t>(v.bytes()), v.space == ptx::Space::kGlobal);
  }
  for (const ptx::Variable& v : module.variables) {
    for (const auto& [offset, name] : v.addresses) {
      const auto found = memory->storage.find(name);
      if (found == memory->storage.end()) {
        fault(Kind::kUnsupported, -1, v.name, " holds the address of ", name);
      }
      auto* bytes = reinterpret_cast<std::byte*>(memory->storage[v.name].data());
      const auto address = reinterpret_cast<uint64_t>(found->second.data());
      std::memcpy(bytes + offset, &address, sizeof address);
    }
  }
  return memory;
}

std::unique_ptr<Kernel> assemble(const ptx::Module& module, const ModuleMemory& memory,
                                 const std::string& entry) {
  for (const ptx::Function& f : module.functions) {
    if (f.name != entry || !f.is_entry || f.is_declaration) continue;
    auto kernel = std::make_unique<Kernel>();
    kernel->name = entry;
    kernel->files = module.files;
    kernel->target = std::atoi(module.target.c_str() + 3);
    Builder(module, memory, kernel.get()).build(f);
    return kernel;
  }
  fault(Kind::kArguments, -1, "the module has no kernel ", entry);
}

}  // namespace sim
