#include "address.h"

#include <algorithm>

#include "block.h"
#include "launch.h"

namespace sim {
namespace {

[[noreturn]] void outside(Warp& w, int lane, uint64_t address, uint64_t bytes, bool write) {
  fault(Kind::kOutOfBounds, lane, write ? "writes " : "reads ", bytes, " global bytes at 0x",
        std::hex, address, std::dec, "; ", w.block->launch->memory.nearest(address));
}

void check_alignment(int lane, uint64_t address, uint32_t bytes, const char* space) {
  if (address % bytes == 0) return;
  fault(Kind::kMisaligned, lane, space, " address 0x", std::hex, address, std::dec,
        " is no multiple of ", bytes);
}

void resolve_global(Warp& w, const uint64_t* at, uint32_t bytes, bool write, uint32_t mask,
                    uint8_t** pointers) {
  const Allocation* found = nullptr;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    check_alignment(lane, at[lane], bytes, "global");
    if (found == nullptr || at[lane] < found->begin || at[lane] + bytes > found->end) {
      found = w.block->launch->memory.find(at[lane], bytes);
      if (found == nullptr) outside(w, lane, at[lane], bytes, write);
      if (write && !found->writable) {
        fault(Kind::kOutOfBounds, lane, "writes read-only memory at 0x", std::hex, at[lane]);
      }
    }
    pointers[lane] = reinterpret_cast<uint8_t*>(at[lane]);
  }
}

void resolve_shared(Warp& w, const uint64_t* at, uint32_t bytes, Use use, uint32_t mask,
                    uint8_t** pointers) {
  uint64_t offsets[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    offsets[lane] = at[lane] & ~kWindowMask;
    if (!(mask >> lane & 1)) continue;
    check_alignment(lane, offsets[lane], bytes, "shared");
    // Wider accesses than 16 bytes do not exist in shared memory.
    pointers[lane] = use == Use::kLoad
                         ? const_cast<uint8_t*>(shared_read(w, lane, offsets[lane], bytes))
                     : use == Use::kStore ? shared_write(w, lane, offsets[lane], bytes)
                                          : shared_atomic(w, lane, offsets[lane], bytes);
  }
  count_shared(w, offsets, bytes, mask);
}

void resolve_local(Warp& w, const uint64_t* at, uint32_t bytes, Use use, uint32_t mask,
                   uint8_t** pointers) {
  Block& block = *w.block;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const uint64_t offset = at[lane] & ~kWindowMask;
    check_alignment(lane, offset, bytes, "local");
    if (offset + bytes > block.local_bytes) {
      fault(Kind::kOutOfBounds, lane, "local bytes ", offset, "..", offset + bytes - 1,
            " of a thread that has ", block.local_bytes);
    }
    const uint64_t thread = static_cast<uint64_t>(w.index) * kLanes + static_cast<uint64_t>(lane);
    const uint64_t place = thread * block.local_bytes + offset;
    uint8_t* written = block.local_written.data() + place;
    if (use != Use::kLoad) {
      std::fill_n(written, bytes, uint8_t{1});
    } else if (std::find(written, written + bytes, 0) != written + bytes) {
      fault(Kind::kUninitialised, lane, "reads local bytes ", offset, "..", offset + bytes - 1,
            ", which were never written");
    }
    pointers[lane] = block.local.data() + place;
  }
}

}  // namespace

Where space_of(const ptx::Instruction& i) {
  for (const std::string& m : i.modifiers) {
    if (m == "global") return Where::kGlobal;
    if (m.rfind("shared", 0) == 0) return Where::kShared;
    if (m == "local") return Where::kLocal;
    if (m == "const" || m.rfind("param", 0) == 0) return Where::kConst;
  }
  return Where::kGeneric;
}

void resolve(Warp& w, const Instr& i, const uint64_t* base, Where where, uint32_t bytes, Use use,
             uint32_t mask, uint8_t** pointers) {
  uint64_t at[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) at[lane] = base[lane] + static_cast<uint64_t>(i.imm);
  uint32_t shared = where == Where::kShared ? mask : 0, local = where == Where::kLocal ? mask : 0;
  if (where == Where::kGeneric) {
    for (int lane = 0; lane < kLanes; ++lane) {
      shared |= uint32_t{(at[lane] & kWindowMask) == kSharedWindow} << lane;
      local |= uint32_t{(at[lane] & kWindowMask) == kLocalWindow} << lane;
    }
    shared &= mask;
    local &= mask;
  }
  const uint32_t global = mask & ~shared & ~local;
  if (shared) resolve_shared(w, at, bytes, use, shared, pointers);
  if (local) resolve_local(w, at, bytes, use, local, pointers);
  if (global) {
    resolve_global(w, at, bytes, use != Use::kLoad, global, pointers);
    if (where != Where::kConst) count_global(w, at, bytes, global);
  }
}

uint8_t* global_range(Warp& w, int lane, uint64_t address, uint64_t bytes, bool write) {
  const Allocation* found = w.block->launch->memory.find(address, bytes);
  if (found == nullptr || (write && !found->writable)) outside(w, lane, address, bytes, write);
  return reinterpret_cast<uint8_t*>(address);
}

}  // namespace sim
