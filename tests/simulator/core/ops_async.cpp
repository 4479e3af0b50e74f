// cp.async and its groups, and the fences between proxies. PTX ISA, "Asynchronous copy".
//
// The bytes are there at once; that they may be used is what the checker knows. Groups are counted
// per warp: lanes that commit or wait apart from each other are not told apart.
#include "ops_async.h"

#include <cstring>

#include "ops_barrier.h"
#include "ops_bulk.h"

namespace sim {
namespace {

// ops: to, from, source bytes, ignore predicate; imm: offset of `to`; extra: the rest.
struct CopyAsync {
  uint32_t bytes;
  int64_t from_offset;
  bool ignores, negated;
};

void copy_async(Warp& w, const Instr& i, uint32_t mask) {
  const auto& copy = *static_cast<const CopyAsync*>(i.extra);
  const uint64_t *to = w.lanes<uint64_t>(i.ops[0]), *from = w.lanes<uint64_t>(i.ops[1]);
  const uint32_t* given = w.lanes<uint32_t>(i.ops[2]);
  const uint32_t ignored = copy.ignores ? w.predicate(i.ops[3]) ^ (copy.negated ? kAll : 0) : 0;
  const Event event = w.block->checker->event(Actor::kCopies, w.index, w.async.copies);
  uint64_t offsets[kLanes] = {}, addresses[kLanes] = {};
  uint32_t reads = 0;
  uint64_t missing = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    offsets[lane] = shared_offset(to[lane] + static_cast<uint64_t>(i.imm));
    addresses[lane] = from[lane] + static_cast<uint64_t>(copy.from_offset);
    const uint32_t bytes = ignored >> lane & 1 ? 0 : given[lane];
    if (bytes > copy.bytes) {
      fault(Kind::kArguments, lane, "reads ", bytes, " bytes for a copy of ", copy.bytes);
    }
    uint8_t* place = shared_write_async(w, lane, offsets[lane], copy.bytes, event);
    std::memset(place + bytes, 0, copy.bytes - bytes);
    if (bytes == 0) continue;
    if (addresses[lane] % copy.bytes != 0) {
      fault(Kind::kMisaligned, lane, "global address 0x", std::hex, addresses[lane], std::dec,
            " is no multiple of ", copy.bytes);
    }
    std::memcpy(place, global_range(w, lane, addresses[lane], bytes, false), bytes);
    reads |= 1u << lane;
    missing += copy.bytes - bytes;
  }
  count_shared(w, offsets, copy.bytes, mask);
  if (reads == 0) return;
  count_global(w, addresses, copy.bytes, reads);
  w.profile->global[w.pc].bytes -= missing;
}

void decode_copy(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  CopyAsync copy{};
  int64_t bytes = 0;
  if (!a.is_immediate(i.operands.at(2), &bytes)) unknown(i);
  if (bytes != 16 && (i.has("cg") || (bytes != 4 && bytes != 8))) unknown(i);
  copy.bytes = static_cast<uint32_t>(bytes);
  const size_t count = i.operands.size() - i.has("L2::cache_hint");
  if (count > 4 || count < 3) unknown(i);
  ptx::Operand read = i.operands[count == 4 ? 3 : 2];
  copy.ignores = count == 4 && a.bits_of(read) == 1;
  copy.negated = read.negated;
  read.negated = false;
  const Ref to = a.address(i.operands[0], &instr->imm);
  const Ref from = a.address(i.operands[1], &copy.from_offset);
  const Ref size = a.read(copy.ignores ? i.operands[2] : read, 32);
  instr->extra = a.own(std::make_shared<CopyAsync>(copy));
  instr->exec = copy_async;
  a.set_ops(instr, {to, from, size, copy.ignores ? a.read(read, 1) : size});
}

// Group numbers start at 1; those up to copies - 1 are committed.
void commit(Warp& w, const Instr&, uint32_t) { ++w.async.copies; }

void wait_group(Warp& w, const Instr& i, uint32_t) {
  const auto left = static_cast<uint32_t>(i.imm), committed = w.async.copies - 1;
  if (committed <= left) return;
  w.block->checker->learn(w.index,
                          w.block->checker->event(Actor::kCopies, w.index, committed - left));
}

void wait_all(Warp& w, const Instr& i, uint32_t mask) {
  commit(w, i, mask);
  wait_group(w, i, mask);  // imm is 0
}

void decode_cp(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  needs_target(i, a, 80);
  instr->klass = Class::kAsync;
  if (i.has("reduce")) return decode_bulk_reduce(i, a, instr);
  if (i.modifiers.at(0) != "async") unknown(i);
  if (i.has("bulk")) return decode_bulk(i, a, instr);
  if (i.has("mbarrier")) return decode_copy_arrive(i, a, instr);
  check_modifiers(i, {"async", "ca", "cg", "shared", "shared::cta", "global", "L2::cache_hint",
                      "L2::64B", "L2::128B", "L2::256B", "commit_group", "wait_group", "wait_all"});
  if (i.has("commit_group")) {
    instr->exec = commit;
  } else if (i.has("wait_group")) {
    if (!a.is_immediate(i.operands.at(0), &instr->imm)) unknown(i);
    instr->exec = wait_group;
  } else if (i.has("wait_all")) {
    instr->exec = wait_all;
  } else {
    decode_copy(i, a, instr);
  }
}

}  // namespace

void decode_proxy_fence(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  needs_target(i, a, 90);
  instr->klass = Class::kBarrier;
  const bool async = i.modifiers.size() > 0 && i.modifiers[0] == "proxy" && i.has("async");
  const bool known = i.has("mbarrier_init") || i.has("alias") || async ||
                     (i.modifiers[0] == "proxy" && i.has("tensormap::generic"));
  if (!known) unknown(i);
  instr->exec = [](Warp&, const Instr&, uint32_t) {};
  if (async) {
    instr->exec = [](Warp& w, const Instr&, uint32_t) { w.block->checker->fence_async(w.index); };
  }
}

void add_async(Decoders* decoders) {
  (*decoders)["cp"] = decode_cp;
  add_mbarrier(decoders);
  add_tensor_maps(decoders);
}

}  // namespace sim
