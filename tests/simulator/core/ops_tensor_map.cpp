// Tensor maps: building one on the device, and copying the box of a tensor that it describes. PTX
// ISA, "Tensors" and "tensormap.replace".
#include <algorithm>
#include <cstddef>
#include <cstring>

#include "ops_bulk.h"

namespace sim {
namespace {

constexpr uint32_t kMapBytes = sizeof(TensorMap);

// The map's own bytes, in global or shared memory or among the kernel's parameters.
TensorMap read_map(Warp& w, int lane, uint64_t address) {
  TensorMap map;
  if (address % 64 != 0) {
    fault(Kind::kMisaligned, lane, "a tensor map at 0x", std::hex, address, ", no multiple of 64");
  }
  std::memcpy(&map, global_range(w, lane, address, kMapBytes, false), kMapBytes);
  return map;
}

void check_map(int lane, const TensorMap& map, int rank) {
  const uint32_t size = element_bytes(map.element_type);
  if (map.rank + 1 != rank || size == 0) {
    fault(Kind::kArguments, lane, "a tensor map of ", map.rank + 1, " dimensions and element type ",
          int{map.element_type}, " where ", rank, " dimensions are copied");
  }
  if (map.interleave != 0 || map.fill > 1 || map.swizzle > 3 || map.swizzle_atomicity != 0) {
    fault(Kind::kUnsupported, lane, "this layout of a tensor map is not known");
  }
  bool aligned = map.address % 16 == 0 && map.box[0] * size % 16 == 0;
  for (int d = 1; d < rank; ++d) aligned &= map.strides[static_cast<size_t>(d) - 1] % 16 == 0;
  if (!aligned) {
    fault(Kind::kMisaligned, lane,
          "a tensor map whose address, strides or inner box are no multiples of 16 bytes");
  }
  if (map.swizzle && map.box[0] * size > (16u << map.swizzle)) {
    fault(Kind::kArguments, lane, "a box of ", map.box[0] * size, " bytes in a swizzle of ",
          16u << map.swizzle);
  }
  for (int d = 0; d < rank; ++d) {
    const auto at = static_cast<size_t>(d);
    if (map.box[at] == 0 || map.box[at] > 256 || map.steps[at] > 1) {
      fault(Kind::kUnsupported, lane, "a box of ", map.box[at], " elements, one in ",
            map.steps[at]);
    }
  }
}

// XORs 16-byte chunks with the number of their 128-byte line.
uint64_t swizzled(uint64_t offset, int mode) {
  const uint64_t mask = mode == 0 ? 0 : (uint64_t{1} << mode) - 1;
  return offset ^ (offset >> 7 & mask) << 4;
}

// One row of the box, `first` its first element along each dimension.
struct BoxRow {
  std::array<int64_t, kMaxRank> first;
  uint64_t shared;  // offset of its bytes, before the swizzle
};

class Box {
 public:
  Box(Warp& w, const BulkCopy& copy, int lane, const TensorMap& map)
      : w_(w), copy_(copy), lane_(lane), map_(map), size_(element_bytes(map.element_type)) {}

  uint32_t bytes() const {
    uint32_t all = size_;
    for (size_t d = 0; d <= map_.rank; ++d) all *= map_.box[d];
    return all;
  }

  void move(const BoxRow& row, uint8_t* block) {
    const int64_t begin = std::clamp<int64_t>(-row.first[0], 0, map_.box[0]);
    int64_t end = std::clamp<int64_t>(int64_t{map_.sizes[0]} - row.first[0], begin, map_.box[0]);
    uint64_t address = map_.address;
    for (size_t d = 1; d <= map_.rank; ++d) {
      if (row.first[d] < 0 || row.first[d] >= int64_t{map_.sizes[d]}) end = begin;
      address += static_cast<uint64_t>(row.first[d]) * map_.strides[d - 1];
    }
    address += static_cast<uint64_t>(row.first[0] * size_);
    if (begin < end) {
      const auto from = static_cast<uint64_t>(begin * size_);
      const auto length = static_cast<uint64_t>((end - begin) * size_);
      global_range(w_, lane_, address + from, length, !copy_.loads);
      count_bulk(w_, address + from, length);
    }
    for (int64_t e = 0; e < int64_t{map_.box[0]}; ++e) {
      uint8_t* here = block + swizzled(row.shared + static_cast<uint64_t>(e * size_), map_.swizzle);
      auto* there = reinterpret_cast<uint8_t*>(address + static_cast<uint64_t>(e * size_));
      if (e >= begin && e < end) {
        move_bulk(copy_, here, there, size_);
      } else if (copy_.loads) {
        std::memset(here, map_.fill ? 0xff : 0, size_);
      }
    }
  }

 private:
  Warp& w_;
  const BulkCopy& copy_;
  int lane_;
  const TensorMap& map_;
  uint32_t size_;
};

void copy_one(Warp& w, const Instr& i, const BulkCopy& copy, int lane) {
  const auto at = [&](int operand, int64_t offset) {
    return w.lanes<uint64_t>(i.ops[operand])[lane] + static_cast<uint64_t>(offset);
  };
  const TensorMap map = read_map(w, lane, at(1, copy.global_offset));
  check_map(lane, map, copy.rank);
  const uint64_t shared = shared_offset(at(0, copy.shared_offset));
  if (shared % 128 != 0) {
    fault(Kind::kMisaligned, lane, "a box at shared byte ", shared, ", no multiple of 128");
  }
  Box box(w, copy, lane, map);
  Mbarrier* barrier =
      copy.loads ? &mbarrier_at(w, lane, shared_offset(at(2, copy.barrier_offset))) : nullptr;
  bulk_shared(w, copy, lane, shared, box.bytes(), barrier);
  ++w.profile->global[w.pc].accesses;
  std::array<uint32_t, kMaxRank> index{};
  const uint64_t row_bytes = map.box[0] * element_bytes(map.element_type);
  for (uint64_t row = 0; row * row_bytes < box.bytes(); ++row) {
    BoxRow at_row{{}, shared + row * row_bytes};
    for (int d = 0; d < copy.rank; ++d) {
      const int32_t first = w.lanes<int32_t>(i.ops[3 + d])[lane];
      at_row.first[static_cast<size_t>(d)] = int64_t{first} + index[static_cast<size_t>(d)];
    }
    box.move(at_row, w.block->shared.data());
    for (size_t d = 1; d <= map.rank && ++index[d] == map.box[d]; ++d) index[d] = 0;
  }
  if (barrier) complete_bytes(w, *barrier, box.bytes());
}

// A field of a map and how many bytes it has.
struct Field {
  size_t offset;
  uint32_t bytes;
  uint32_t count;  // with an ordinal operand, where more than one
};

Field field_of(const ptx::Instruction& i) {
  if (i.has("global_address")) return {offsetof(TensorMap, address), 8, 1};
  if (i.has("rank")) return {offsetof(TensorMap, rank), 1, 1};
  if (i.has("box_dim")) return {offsetof(TensorMap, box), 4, kMaxRank};
  if (i.has("global_dim")) return {offsetof(TensorMap, sizes), 4, kMaxRank};
  if (i.has("global_stride")) return {offsetof(TensorMap, strides), 8, kMaxRank - 1};
  if (i.has("element_stride")) return {offsetof(TensorMap, steps), 4, kMaxRank};
  if (i.has("elemtype")) return {offsetof(TensorMap, element_type), 1, 1};
  if (i.has("interleave_layout")) return {offsetof(TensorMap, interleave), 1, 1};
  if (i.has("swizzle_mode")) return {offsetof(TensorMap, swizzle), 1, 1};
  if (i.has("swizzle_atomicity")) return {offsetof(TensorMap, swizzle_atomicity), 1, 1};
  if (i.has("fill_mode")) return {offsetof(TensorMap, fill), 1, 1};
  unknown(i);
}

// ops: address, value; imm: offset of the field; aux: its bytes, bit 8: in shared memory, bit 9:
// the value has 64 bits.
void replace(Warp& w, const Instr& i, uint32_t mask) {
  const auto bytes = static_cast<uint32_t>(i.aux & 0xff);
  const Where where = i.aux & 0x100 ? Where::kShared : Where::kGlobal;
  uint8_t* to[kLanes];
  resolve(w, i, w.lanes<uint64_t>(i.ops[0]), where, bytes, Use::kStore, mask, to);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const uint64_t value =
        i.aux & 0x200 ? w.lanes<uint64_t>(i.ops[1])[lane] : w.lanes<uint32_t>(i.ops[1])[lane];
    std::memcpy(to[lane], &value, bytes);
  }
}

void decode_replace(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  const Field field = field_of(i);
  int64_t ordinal = 0, base = 0;
  if (!i.has("b1024") || !i.has("tile")) unknown(i);
  if (field.count > 1 && !a.is_immediate(i.operands.at(1), &ordinal)) unknown(i);
  if (ordinal < 0 || ordinal >= int64_t{field.count}) unknown(i);
  const int bits = i.has("b64") ? 64 : 32;
  const Ref address = a.address(i.operands.at(0), &base);
  instr->imm = base + static_cast<int64_t>(field.offset) + ordinal * int64_t{field.bytes};
  instr->aux = field.bytes | (i.has("shared::cta") ? 0x100u : 0) | (bits == 64 ? 0x200u : 0);
  instr->exec = replace;
  a.set_ops(instr, {address, a.read(i.operands.back(), bits)});
}

// All lanes of the warp together copy one map from shared to global memory.
void copy_map(Warp& w, const Instr& i, uint32_t mask) {
  if (mask != w.alive) {
    fault(Kind::kDivergence, first_lane(w.alive & ~mask), "a warp-wide copy of a tensor map");
  }
  const int lane = first_lane(mask);
  const uint64_t to = w.lanes<uint64_t>(i.ops[0])[lane] + static_cast<uint64_t>(i.imm);
  const uint64_t from = shared_offset(w.lanes<uint64_t>(i.ops[1])[lane]) + i.aux;
  const uint8_t* map = shared_read(w, lane, from, kMapBytes);
  std::memcpy(global_range(w, lane, to, kMapBytes, true), map, kMapBytes);
}

void decode(const ptx::Instruction& i, Assembler& a, Instr* instr) {
  needs_target(i, a, 90);
  instr->klass = Class::kAsync;
  if (i.has("replace")) return decode_replace(i, a, instr);
  int64_t from = 0, bytes = 0;
  if (!i.has("cp_fenceproxy") || !i.has("global")) unknown(i);
  if (!a.is_immediate(i.operands.at(2), &bytes) || bytes != kMapBytes) unknown(i);
  const Ref to = a.address(i.operands.at(0), &instr->imm);
  const Ref shared = a.address(i.operands.at(1), &from);
  instr->aux = static_cast<uint64_t>(from);
  instr->exec = copy_map;
  a.set_ops(instr, {to, shared});
}

}  // namespace

void copy_box(Warp& w, const Instr& i, uint32_t mask) {
  const auto& copy = *static_cast<const BulkCopy*>(i.extra);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) copy_one(w, i, copy, lane);
  }
}

void add_tensor_maps(Decoders* decoders) { (*decoders)["tensormap"] = decode; }

}  // namespace sim
