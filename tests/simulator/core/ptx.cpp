#include "ptx.h"

#include <algorithm>
#include <bit>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <set>

#include "error.h"

namespace sim::ptx {
namespace {

const std::map<std::string, int> kTypeBytes = {
    {"b8", 1},     {"u8", 1},     {"s8", 1},    {"b16", 2},   {"u16", 2},    {"s16", 2},
    {"f16", 2},    {"bf16", 2},   {"b32", 4},   {"u32", 4},   {"s32", 4},    {"f32", 4},
    {"f16x2", 4},  {"bf16x2", 4}, {"tf32", 4},  {"b64", 8},   {"u64", 8},    {"s64", 8},
    {"f64", 8},    {"b128", 16},  {"pred", 0},  {"e4m3", 1},  {"e5m2", 1},   {"e4m3x2", 2},
    {"e5m2x2", 2}, {"u16x2", 4},  {"s16x2", 4}, {"f32x2", 8}, {"texref", 8}, {"u8x4", 4},
    {"s8x4", 4}};

struct Token {
  enum Kind { kWord, kNumber, kFloat, kString, kPunctuation, kEnd } kind;
  std::string text;
  int64_t integer = 0;
  double real = 0;
  int line = 0;
};

bool is_word_start(char c) {
  return std::isalpha(static_cast<unsigned char>(c)) || strchr("_$%.", c);
}
bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || strchr("_$%.", c); }

class Lexer {
 public:
  explicit Lexer(const std::string& text) : at_(text.data()), end_(at_ + text.size()) {}

  Token next() {
    skip_space();
    Token token;
    token.line = line_;
    if (at_ == end_) {
      token.kind = Token::kEnd;
    } else if (*at_ == '"') {
      token.kind = Token::kString;
      const char* from = ++at_;
      while (at_ < end_ && *at_ != '"') ++at_;
      token.text.assign(from, at_++);
    } else if (std::isdigit(static_cast<unsigned char>(*at_))) {
      number(&token);
    } else if (is_word_start(*at_)) {
      word(&token);
    } else {
      token.kind = Token::kPunctuation;
      token.text = *at_++;
    }
    return token;
  }

 private:
  void skip_space() {
    while (at_ < end_) {
      if (*at_ == '\n') {
        ++line_;
        ++at_;
      } else if (std::isspace(static_cast<unsigned char>(*at_))) {
        ++at_;
      } else if (end_ - at_ > 1 && at_[0] == '/' && at_[1] == '/') {
        while (at_ < end_ && *at_ != '\n') ++at_;
      } else if (end_ - at_ > 1 && at_[0] == '/' && at_[1] == '*') {
        while (at_ < end_ && !(at_[0] == '*' && at_[1] == '/')) line_ += *at_++ == '\n';
        at_ += 2;
      } else {
        break;
      }
    }
  }

  // Words hold the dots of an opcode; "::" joins too (shared::cta).
  void word(Token* token) {
    token->kind = Token::kWord;
    const char* from = at_;
    while (at_ < end_ && (is_word(*at_) || (end_ - at_ > 2 && at_[0] == ':' && at_[1] == ':'))) {
      at_ += *at_ == ':' ? 2 : 1;
    }
    token->text.assign(from, at_);
  }

  void number(Token* token) {
    token->kind = Token::kNumber;
    const char* from = at_;
    if (end_ - at_ > 2 && *at_ == '0' && strchr("fFdD", at_[1])) {
      const bool is_double = at_[1] == 'd' || at_[1] == 'D';
      const int digits = is_double ? 16 : 8;
      const uint64_t bits = std::stoull(std::string(at_ + 2, digits), nullptr, 16);
      token->kind = Token::kFloat;
      token->real = is_double ? std::bit_cast<double>(bits)
                              : std::bit_cast<float>(static_cast<uint32_t>(bits));
      at_ += 2 + digits;
      token->text.assign(from, at_);
      return;
    }
    char* stop = nullptr;
    if (end_ - at_ > 2 && at_[0] == '0' && strchr("bB", at_[1])) {
      token->integer = static_cast<int64_t>(std::strtoull(at_ + 2, &stop, 2));
    } else {
      token->integer = static_cast<int64_t>(std::strtoull(at_, &stop, 0));
    }
    const bool hexadecimal = at_[0] == '0' && strchr("xXbB", at_[1]);
    if (!hexadecimal && stop < end_ && (*stop == '.' || *stop == 'e' || *stop == 'E')) {
      token->kind = Token::kFloat;
      token->real = std::strtod(at_, &stop);
    }
    at_ = stop;
    token->text.assign(from, at_);
    if (at_ < end_ && *at_ == 'U') ++at_;
  }

  const char* at_;
  const char* end_;
  int line_ = 1;
};

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  size_t from = 0;
  while (from <= text.size()) {
    const size_t dot = std::min(text.find('.', from), text.size());
    if (dot > from) parts.push_back(text.substr(from, dot - from));
    from = dot + 1;
  }
  return parts;
}

class Parser {
 public:
  explicit Parser(const std::string& text) : lexer_(text) { take(); }

  Module parse() {
    while (token_.kind != Token::kEnd) top_level();
    return std::move(module_);
  }

 private:
  Token take() {
    Token taken = std::move(token_);
    token_ = lexer_.next();
    return taken;
  }
  bool at(const char* text) const { return token_.text == text && token_.kind != Token::kString; }
  bool accept(const char* text) { return at(text) && (take(), true); }
  void expect(const char* text) {
    if (!accept(text)) wrong(std::string("expected '") + text + "'");
  }
  [[noreturn]] void wrong(const std::string& what) const {
    fault(Kind::kUnsupported, -1, "PTX line ", token_.line, ": ", what, ", found '", token_.text,
          "'");
  }
  int64_t integer() {
    const bool negative = accept("-");
    if (token_.kind != Token::kNumber) wrong("expected a number");
    const int64_t value = take().integer;
    return negative ? -value : value;
  }

  void top_level() {
    if (accept(".version")) {
      module_.version = take().text;
    } else if (accept(".target")) {
      module_.target = take().text;
      while (accept(",")) take();
    } else if (accept(".address_size")) {
      if (integer() != 64) wrong("expected 64-bit addresses");
    } else if (accept(".file")) {
      const int64_t number = integer();
      module_.files[static_cast<int>(number)] = take().text;
      while (accept(",")) integer();
    } else if (accept(".section")) {
      take();
      skip_braces();
    } else if (at(".func") || at(".entry")) {
      function(false);
    } else if (at(".visible") || at(".weak") || at(".common")) {
      take();
    } else if (accept(".extern")) {
      if (at(".func") || at(".entry")) {
        function(true);
      } else {
        variable(&module_.variables);
      }
    } else if (accept(".pragma")) {
      while (!accept(";")) take();
    } else {
      variable(&module_.variables);
    }
  }

  void skip_braces() {
    expect("{");
    while (!accept("}")) {
      if (token_.kind == Token::kEnd) wrong("expected '}'");
      take();
    }
  }

  static bool is_space(const std::string& word) {
    return word == ".reg" || word == ".global" || word == ".shared" || word == ".const" ||
           word == ".local" || word == ".param";
  }

  // .shared .align 16 .b8 name[N][M] = {...}, other; one Variable per name.
  void variable(std::vector<Variable>* out) {
    Variable base = variable_head();
    do {
      Variable v = base;
      variable_name(&v);
      if (accept("=")) initial_value(&v);
      out->push_back(std::move(v));
    } while (accept(","));
    expect(";");
  }

  Variable variable_head() {
    Variable v;
    const std::string space = take().text;
    if (!is_space(space)) wrong("expected a state space, not " + space);
    v.space = space == ".reg"      ? Space::kReg
              : space == ".global" ? Space::kGlobal
              : space == ".shared" ? Space::kShared
              : space == ".const"  ? Space::kConst
              : space == ".local"  ? Space::kLocal
                                   : Space::kParam;
    while (token_.kind == Token::kWord && token_.text[0] == '.') {
      const std::string word = take().text;
      if (word == ".align") {
        v.alignment = integer();
      } else if (word == ".ptr" || is_space(word)) {
        continue;  // what a pointer parameter points to
      } else if (word == ".v2" || word == ".v4") {
        v.elements = word[2] - '0';
      } else {
        v.type = word.substr(1);
        if (!kTypeBytes.count(v.type)) wrong("type " + v.type + " is not known");
      }
    }
    return v;
  }

  void variable_name(Variable* v) {
    if (token_.kind != Token::kWord) wrong("expected a name");
    const std::string written = take().text;
    v->name = written;
    if (v->space == Space::kReg) {
      v->name = declare(written);
      if (accept("<")) {
        v->elements = integer();  // a family: name0 .. name(n-1)
        expect(">");
        for (int64_t i = 0; depth_ > 1 && i < v->elements; ++i) {
          scopes_.back()[written + std::to_string(i)] = v->name + std::to_string(i);
        }
      }
      registers_.insert(v->name);
      return;
    }
    if (v->space != Space::kGlobal && depth_ > 1) v->name = declare(v->name);
    while (accept("[")) {
      v->elements *= at("]") ? 0 : integer();
      expect("]");
    }
  }

  void initial_value(Variable* v) {
    const int size = bytes_of(v->type);
    const bool list = accept("{");
    v->data.reserve(static_cast<size_t>(v->bytes()));
    do {
      accept("{");
      uint64_t bits = 0;
      if (token_.kind == Token::kWord) {
        std::string name = take().text;
        if (name == "generic") {
          expect("(");
          name = take().text;
          expect(")");
        }
        v->addresses.emplace_back(static_cast<int64_t>(v->data.size()), name);
      } else if (token_.kind == Token::kFloat) {
        const double real = take().real;
        bits = size == 8 ? std::bit_cast<uint64_t>(real)
                         : std::bit_cast<uint32_t>(static_cast<float>(real));
      } else {
        bits = static_cast<uint64_t>(integer());
      }
      for (int i = 0; i < size; ++i) v->data.push_back(static_cast<uint8_t>(bits >> (8 * i)));
      accept("}");
    } while (accept(","));
    if (list) accept("}");
    v->data.resize(static_cast<size_t>(v->bytes()));
  }

  std::vector<Variable> parameter_list() {
    std::vector<Variable> params;
    expect("(");
    while (!accept(")")) {
      Variable v = variable_head();
      variable_name(&v);
      if (v.space == Space::kReg) wrong("expected .param parameters");
      params.push_back(std::move(v));
      accept(",");
    }
    return params;
  }

  void function(bool is_extern) {
    Function f;
    f.is_entry = take().text == ".entry";
    if (at("(")) f.results = parameter_list();
    f.name = take().text;
    if (at("(")) f.params = parameter_list();
    while (token_.kind == Token::kWord && token_.text[0] == '.') {
      const std::string limit = take().text.substr(1);
      std::vector<int>& values = f.limits[limit];
      while (token_.kind == Token::kNumber) {
        values.push_back(static_cast<int>(integer()));
        accept(",");
      }
    }
    f.is_declaration = is_extern || at(";");
    if (f.is_declaration) {
      expect(";");
    } else {
      function_ = &f;
      file_ = source_line_ = 0;
      registers_.clear();
      body();
      function_ = nullptr;
    }
    module_.functions.push_back(std::move(f));
  }

  // A name declared in an inner scope gets a suffix of its own.
  std::string declare(const std::string& name) {
    if (scopes_.empty()) return name;
    if (depth_ <= 1) return name;
    const std::string renamed = name + "@" + std::to_string(++renames_);
    scopes_.back()[name] = renamed;
    return renamed;
  }

  std::string resolve(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto found = scope->find(name); found != scope->end()) return found->second;
    }
    return name;
  }

  void body() {
    expect("{");
    ++depth_;
    scopes_.emplace_back();
    const size_t first = function_->body.size();
    while (!accept("}")) statement();
    // A label declared in this scope hides one outside, even for branches before it.
    const auto names = std::move(scopes_.back());
    scopes_.pop_back();
    for (size_t i = first; i < function_->body.size(); ++i) {
      for (Operand& operand : function_->body[i].operands) {
        const auto found = names.find(operand.name);
        if (operand.form == Operand::kSymbol && found != names.end()) operand.name = found->second;
      }
    }
    --depth_;
  }

  void statement() {
    if (at("{")) return body();
    if (token_.kind == Token::kEnd) wrong("expected '}'");
    if (at("@")) return instruction();
    if (token_.kind != Token::kWord) wrong("expected an instruction");
    if (token_.text[0] == '.') return directive();
    Token word = take();
    if (accept(":")) return label(word.text);
    instruction(std::move(word));
  }

  void label(const std::string& name) {
    if (at(".branchtargets")) {
      take();
      std::vector<std::string>& targets = function_->tables[name];
      do targets.push_back(take().text);
      while (accept(","));
      expect(";");
      return;
    }
    if (at(".callprototype")) {
      while (!accept(";")) take();
      return;
    }
    const std::string unique = depth_ > 1 ? declare(name) : name;
    function_->labels[unique] = static_cast<int>(function_->body.size());
  }

  void directive() {
    if (is_space(token_.text)) return variable(&function_->variables);
    const std::string word = take().text;
    if (word == ".loc") {
      file_ = static_cast<int>(integer());
      source_line_ = static_cast<int>(integer());
      integer();
      while (accept(",")) {  // function_name $label [+ offset], inlined_at file line column
        while (token_.kind == Token::kWord && token_.text[0] != '.') {
          const bool known = at("function_name") || at("inlined_at");
          if (!known && token_.text[0] != '$') break;
          take();
        }
        if (accept("+")) integer();
        while (token_.kind == Token::kNumber) integer();
      }
    } else if (word == ".pragma") {
      while (!accept(";")) take();
    } else {
      wrong("directive " + word + " is not known");
    }
  }

  void instruction() {
    expect("@");
    guard_negated_ = accept("!");
    guard_ = resolve(take().text);
    instruction(take());
    guard_.clear();
    guard_negated_ = false;
  }

  void instruction(Token word) {
    Instruction i;
    const std::vector<std::string> parts = split(word.text);
    i.opcode = parts[0];
    i.modifiers.assign(parts.begin() + 1, parts.end());
    i.guard = guard_;
    i.guard_negated = guard_negated_;
    i.line = word.line;
    i.source_file = file_;
    i.source_line = source_line_;
    while (!accept(";")) {
      i.operands.push_back(operand());
      if (!at(";")) expect(",");
    }
    function_->body.push_back(std::move(i));
  }

  Operand operand() {
    Operand o = single();
    if (accept("|")) {
      Operand pair;
      pair.form = Operand::kPair;
      pair.parts = {std::move(o), single()};
      return pair;
    }
    return o;
  }

  Operand single() {
    Operand o;
    if (accept("!")) {
      o = single();
      o.negated = true;
    } else if (accept("[")) {
      address(&o);
    } else if (accept("{")) {
      list(&o, Operand::kVector, "}");
    } else if (accept("(")) {
      list(&o, Operand::kList, ")");
    } else if (at("_")) {
      take();
      o.form = Operand::kSink;
    } else if (token_.kind == Token::kWord) {
      named(&o);
    } else if (token_.kind == Token::kFloat) {
      o.form = Operand::kFloat;
      o.real = take().real;
    } else if (at("-")) {
      take();
      if (token_.kind == Token::kFloat) {
        o.form = Operand::kFloat;
        o.real = -take().real;
      } else {
        o.form = Operand::kInteger;
        o.integer = -integer();
      }
    } else {
      o.form = Operand::kInteger;
      o.integer = integer();
    }
    return o;
  }

  void list(Operand* o, Operand::Form form, const char* close) {
    o->form = form;
    while (!accept(close)) {
      o->parts.push_back(operand());
      accept(",");
    }
  }

  void named(Operand* o) {
    o->name = resolve(take().text);
    o->form = o->name[0] == '%' || is_register(o->name) ? Operand::kRegister : Operand::kSymbol;
    if (o->form == Operand::kSymbol && (at("+") || at("-"))) o->integer = signed_offset();
  }

  int64_t signed_offset() {
    if (accept("+")) return integer();
    if (accept("-")) return -integer();
    return 0;
  }

  void address(Operand* o) {
    o->form = Operand::kAddress;
    Operand base = single();
    o->integer = base.form == Operand::kSymbol ? base.integer : signed_offset();
    if (base.form == Operand::kSymbol) base.integer = 0;
    o->parts.push_back(std::move(base));
    while (accept(",")) o->parts.push_back(operand());
    expect("]");
  }

  // Registers need not begin with %: those of inline assembly seldom do.
  bool is_register(const std::string& name) const {
    if (registers_.count(name)) return true;
    const size_t digits = name.find_last_not_of("0123456789") + 1;
    return digits < name.size() && registers_.count(name.substr(0, digits));
  }

  Lexer lexer_;
  Token token_;
  Module module_;
  Function* function_ = nullptr;
  std::vector<std::map<std::string, std::string>> scopes_;
  std::set<std::string> registers_;  // of the function
  int depth_ = 0, renames_ = 0;
  int file_ = 0, source_line_ = 0;
  std::string guard_;
  bool guard_negated_ = false;
};

}  // namespace

bool Instruction::has(const std::string& modifier) const {
  return std::find(modifiers.begin(), modifiers.end(), modifier) != modifiers.end();
}

std::vector<std::string> Instruction::types() const {
  std::vector<std::string> found;
  for (const std::string& modifier : modifiers) {
    if (kTypeBytes.count(modifier)) found.push_back(modifier);
  }
  return found;
}

std::string Instruction::text() const {
  std::string text = opcode;
  for (const std::string& modifier : modifiers) text += "." + modifier;
  return text;
}

int64_t Variable::bytes() const { return elements * bytes_of(type); }

Module parse(const std::string& text) { return Parser(text).parse(); }

int bytes_of(const std::string& type) {
  const auto found = kTypeBytes.find(type);
  if (found == kTypeBytes.end()) fault(Kind::kUnsupported, -1, "type ", type, " is not known");
  return found->second;
}

}  // namespace sim::ptx
