// cp.async.bulk, cp.reduce.async.bulk and their groups. PTX ISA, "Asynchronous copy: bulk copy".
#include "ops_bulk.h"

#include <algorithm>
#include <cstring>

namespace sim {
namespace {

// Groups of what leaves shared memory are numbered from 1, like those of cp.async.
void commit(Warp& w, const Instr&, uint32_t) { ++w.async.bulk; }

void wait_group(Warp& w, const Instr& i, uint32_t) {
  const auto left = static_cast<uint32_t>(i.imm), committed = w.async.bulk - 1;
  if (committed <= left) return;
  w.block->checker->learn(w.index,
                          w.block->checker->event(Actor::kBulk, w.index, committed - left));
}

std::string last_type(const ptx::Instruction& i) {
  const std::vector<std::string> types = i.types();
  if (types.empty()) unknown(i);
  return types.back();
}

bool into_shared(const ptx::Instruction& i) {
  for (const std::string& m : i.modifiers) {
    if (m == "global") return false;
    if (m == "shared::cluster" || m == "shared::cta") return true;
  }
  unknown(i);
}

void check_words(const ptx::Instruction& i) {
  check_modifiers(i, {"async",
                      "bulk",
                      "tensor",
                      "reduce",
                      "1d",
                      "2d",
                      "3d",
                      "4d",
                      "5d",
                      "tile",
                      "shared::cluster",
                      "shared::cta",
                      "global",
                      "bulk_group",
                      "mbarrier::complete_tx::bytes",
                      "L2::cache_hint",
                      "add",
                      "min",
                      "max",
                      "and",
                      "or",
                      "xor",
                      "inc",
                      "dec",
                      "noftz",
                      "commit_group",
                      "wait_group",
                      "read",
                      "prefetch",
                      "L2",
                      "f16",
                      "bf16",
                      "f32",
                      "f64",
                      "u32",
                      "s32",
                      "u64",
                      "s64",
                      "b32",
                      "b64"});
}

int rank_of(const ptx::Instruction& i) {
  for (int rank = 1; rank <= kMaxRank; ++rank) {
    if (i.has(std::to_string(rank) + "d")) return rank;
  }
  unknown(i);
}

// Operands: to, from, then (bytes unless a tensor), (the mbarrier of a load), (a cache policy).
void decode_transfer(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  BulkCopy copy;
  copy.loads = into_shared(i);
  const bool tensor = i.has("tensor");
  if (copy.loads != i.has("mbarrier::complete_tx::bytes")) unknown(i);
  copy.rank = tensor ? rank_of(i) : 0;
  const ptx::Operand& shared = i.operands.at(copy.loads ? 0 : 1);
  const ptx::Operand& global = i.operands.at(copy.loads ? 1 : 0);
  std::vector<Ref> refs = {a.address(shared, &copy.shared_offset),
                           a.address(global, &copy.global_offset)};
  size_t next = 2;
  const Ref bytes = tensor ? Ref{} : a.read(i.operands.at(next++), 32);
  refs.push_back(copy.loads ? a.address(i.operands.at(next++), &copy.barrier_offset) : refs[0]);
  if (tensor) {
    const std::vector<ptx::Operand>& parts = global.parts;
    if (parts.size() != 2 || parts[1].parts.size() != static_cast<size_t>(copy.rank)) unknown(i);
    for (const ptx::Operand& c : parts[1].parts) refs.push_back(a.read(c, 32));
  } else {
    refs.push_back(bytes);
  }
  if (i.operands.size() != next + i.has("L2::cache_hint")) unknown(i);
  instr->exec = tensor ? copy_box : copy_bytes;
  if (i.has("reduce")) {
    if (copy.loads) unknown(i);
    const std::string type = tensor ? "" : last_type(i);
    if (tensor) fault(Kind::kUnsupported, -1, i.text(), " reduces, which is not known");
    copy.reduce = update_of(i, type, true);
    copy.reduced_bytes = static_cast<uint32_t>(ptx::bytes_of(type));
  }
  instr->extra = a.own(std::make_shared<BulkCopy>(copy));
  a.set_ops(instr, refs);
}

}  // namespace

uint8_t* bulk_shared(Warp& w, const BulkCopy& copy, int lane, uint64_t offset, uint32_t bytes,
                     Mbarrier* barrier) {
  if (copy.loads) return shared_write_async(w, lane, offset, bytes, event_of(w, *barrier));
  const Event event = w.block->checker->event(Actor::kBulk, w.index, w.async.bulk);
  return const_cast<uint8_t*>(shared_read_async(w, lane, offset, bytes, event));
}

void count_bulk(Warp& w, uint64_t address, uint64_t bytes) {
  Cost& cost = w.profile->global[w.pc];
  cost.bytes += bytes;
  cost.took += (address + bytes + 31) / 32 - address / 32;
  cost.minimum += (bytes + 31) / 32;
}

void move_bulk(const BulkCopy& copy, uint8_t* shared, uint8_t* global, uint64_t bytes) {
  if (copy.reduce == nullptr) {
    std::memcpy(copy.loads ? shared : global, copy.loads ? global : shared, bytes);
    return;
  }
  for (uint64_t at = 0; at < bytes; at += copy.reduced_bytes) {
    uint64_t value = 0;
    std::memcpy(&value, shared + at, copy.reduced_bytes);
    apply_update(global + at, copy.reduced_bytes, copy.reduce, value, 0);
  }
}

void copy_bytes(Warp& w, const Instr& i, uint32_t mask) {
  const auto& copy = *static_cast<const BulkCopy*>(i.extra);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const auto at = [&](int operand, int64_t offset) {
      return w.lanes<uint64_t>(i.ops[operand])[lane] + static_cast<uint64_t>(offset);
    };
    const uint64_t shared = shared_offset(at(0, copy.shared_offset));
    const uint64_t global = at(1, copy.global_offset);
    const uint32_t bytes = w.lanes<uint32_t>(i.ops[3])[lane];
    if (bytes % 16 != 0 || global % 16 != 0 || shared % 16 != 0) {
      fault(Kind::kMisaligned, lane, "a bulk copy of ", bytes, " bytes between shared byte ",
            shared, " and 0x", std::hex, global, ": each has to be a multiple of 16");
    }
    if (bytes == 0) continue;
    Mbarrier* barrier =
        copy.loads ? &mbarrier_at(w, lane, shared_offset(at(2, copy.barrier_offset))) : nullptr;
    uint8_t* there = global_range(w, lane, global, bytes, !copy.loads);
    move_bulk(copy, bulk_shared(w, copy, lane, shared, bytes, barrier), there, bytes);
    ++w.profile->global[w.pc].accesses;
    count_bulk(w, global, bytes);
    if (barrier) complete_bytes(w, *barrier, bytes);
  }
}

void decode_bulk(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  needs_target(i, a, 90);
  check_words(i);
  if (i.has("commit_group")) {
    instr->exec = commit;
  } else if (i.has("wait_group")) {
    if (!a.is_immediate(i.operands.at(0), &instr->imm)) unknown(i);
    instr->exec = wait_group;
  } else if (i.has("prefetch")) {
    instr->exec = [](Warp&, const Instr&, uint32_t) {};
  } else {
    decode_transfer(i, a, instr);
  }
}

void decode_bulk_reduce(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  needs_target(i, a, 90);
  check_words(i);
  decode_transfer(i, a, instr);
}

}  // namespace sim
