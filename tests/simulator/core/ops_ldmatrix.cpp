// ldmatrix, stmatrix, movmatrix: 8x8 matrices of 16-bit elements. PTX ISA, "Warp-level matrix load
// instruction". Lane 8 m + r addresses row r of matrix m; lane 4 g + t holds columns 2 t and
// 2 t + 1 of row g, with .trans rows 2 t and 2 t + 1 of column g.
#include "block.h"
#include "ops_arithmetic.h"
#include "ops_tensor.h"

namespace sim {
namespace {

constexpr uint32_t kRowBytes = 16;
using Matrix = uint16_t[8][8];

constexpr uint64_t kTrans = 0x100, kGeneric = 0x200;  // in aux, beside the number of matrices

uint32_t held(const Matrix& rows, int lane, bool trans) {
  const int g = lane / 4, t = lane % 4 * 2;
  const uint32_t low = trans ? rows[t][g] : rows[g][t];
  const uint32_t high = trans ? rows[t + 1][g] : rows[g][t + 1];
  return low | high << 16;
}

void put(Matrix& rows, int lane, bool trans, uint32_t word) {
  const int g = lane / 4, t = lane % 4 * 2;
  (trans ? rows[t][g] : rows[g][t]) = static_cast<uint16_t>(word);
  (trans ? rows[t + 1][g] : rows[g][t + 1]) = static_cast<uint16_t>(word >> 16);
}

// Where the rows are in shared memory.
void row_offsets(Warp& w, const Instr& i, Ref ref, int rows, uint64_t* offsets) {
  const uint64_t* base = w.lanes<uint64_t>(ref);
  for (int lane = 0; lane < rows; ++lane) {
    const uint64_t at = base[lane] + static_cast<uint64_t>(i.imm);
    if ((i.aux & kGeneric) && (at & kWindowMask) != kSharedWindow) {
      fault(Kind::kOutOfBounds, lane, "address 0x", std::hex, at, " is not in shared memory");
    }
    offsets[lane] = at & ~kWindowMask;
  }
  count_shared_rows(w, offsets, rows);
}

// ops: destinations, address.
void ldmatrix(Warp& w, const Instr& i, uint32_t mask) {
  need_whole_warp(mask);
  const int count = static_cast<int>(i.aux & 0xff);
  uint64_t offsets[kLanes] = {};
  row_offsets(w, i, i.ops[count], 8 * count, offsets);
  for (int m = 0; m < count; ++m) {
    Matrix rows;
    for (int r = 0; r < 8; ++r) {
      std::memcpy(rows[r], shared_read(w, 8 * m + r, offsets[8 * m + r], kRowBytes), kRowBytes);
    }
    uint32_t* d = w.lanes<uint32_t>(i.ops[m]);
    for (int lane = 0; lane < kLanes; ++lane) d[lane] = held(rows, lane, i.aux & kTrans);
  }
}

// ops: sources, address.
void stmatrix(Warp& w, const Instr& i, uint32_t mask) {
  need_whole_warp(mask);
  const int count = static_cast<int>(i.aux & 0xff);
  uint64_t offsets[kLanes] = {};
  row_offsets(w, i, i.ops[count], 8 * count, offsets);
  for (int m = 0; m < count; ++m) {
    Matrix rows;
    const uint32_t* s = w.lanes<uint32_t>(i.ops[m]);
    for (int lane = 0; lane < kLanes; ++lane) put(rows, lane, i.aux & kTrans, s[lane]);
    for (int r = 0; r < 8; ++r) {
      std::memcpy(shared_write(w, 8 * m + r, offsets[8 * m + r], kRowBytes), rows[r], kRowBytes);
    }
  }
}

void movmatrix(Warp& w, const Instr& i, uint32_t mask) {
  need_whole_warp(mask);
  Matrix rows;
  const uint32_t* s = w.lanes<uint32_t>(i.ops[1]);
  for (int lane = 0; lane < kLanes; ++lane) put(rows, lane, false, s[lane]);
  uint32_t* d = w.lanes<uint32_t>(i.ops[0]);
  for (int lane = 0; lane < kLanes; ++lane) d[lane] = held(rows, lane, true);
}

void decode_rows(const ptx::Instruction& i, Assembler& a, Instr* instr, bool store) {
  check_modifiers(
      i, {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16"});
  const int count = i.has("x4") ? 4 : i.has("x2") ? 2 : i.has("x1") ? 1 : 0;
  if (!i.has("sync") || !i.has("aligned") || !i.has("m8n8") || !i.has("b16") || !count) unknown(i);
  const int needs = store ? 90 : 75;
  if (a.target() < needs) fault(Kind::kUnsupported, -1, i.text(), " needs sm_", needs);
  const ptx::Operand& registers = i.operands.at(store ? 1 : 0);
  const bool vector = registers.form == ptx::Operand::kVector;
  const std::vector<ptx::Operand> parts =
      vector ? registers.parts : std::vector<ptx::Operand>{registers};
  if (static_cast<int>(parts.size()) != count) unknown(i);
  std::vector<Ref> refs;
  for (const ptx::Operand& p : parts) refs.push_back(store ? a.read(p, 32) : a.write(p, 32));
  refs.push_back(a.address(i.operands.at(store ? 0 : 1), &instr->imm));
  instr->aux = static_cast<uint64_t>(count);
  if (i.has("trans")) instr->aux |= kTrans;
  if (!i.has("shared") && !i.has("shared::cta")) instr->aux |= kGeneric;
  instr->klass = Class::kLdmatrix;
  instr->exec = store ? stmatrix : ldmatrix;
  a.set_ops(instr, refs);
}

void decode_ldmatrix(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  decode_rows(i, a, instr, false);
}

void decode_stmatrix(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  decode_rows(i, a, instr, true);
}

void decode_movmatrix(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  const std::vector<std::string> known = {"sync", "aligned", "m8n8", "trans", "b16"};
  if (i.modifiers != known) unknown(i);
  if (a.target() < 75) fault(Kind::kUnsupported, -1, i.text(), " needs sm_75");
  instr->klass = Class::kLdmatrix;
  instr->exec = movmatrix;
  a.set_ops(instr, {a.write(i.operands.at(0), 32), a.read(i.operands.at(1), 32)});
}

}  // namespace

void add_ldmatrix(Decoders* decoders) {
  (*decoders)["ldmatrix"] = decode_ldmatrix;
  (*decoders)["stmatrix"] = decode_stmatrix;
  (*decoders)["movmatrix"] = decode_movmatrix;
}

}  // namespace sim
