// Copies between global and shared memory that one thread starts and the hardware does.
#pragma once

#include "ops_async.h"
#include "ops_memory.h"
#include "tensor_map.h"

namespace sim {

// One copy: where it goes from and to, and what counts it.
struct BulkCopy {
  bool loads = false;          // global to shared, counted by an mbarrier; else the other way
  Update reduce = nullptr;     // of what is in global memory already
  uint32_t reduced_bytes = 0;  // of an element that is reduced
  int rank = 0;                // of a tensor's box; 0: bytes in a row
  int64_t shared_offset = 0, global_offset = 0, barrier_offset = 0;
};

// ops: shared address, global address or map, mbarrier, then bytes or coordinates.
void copy_bytes(Warp& w, const Instr& i, uint32_t mask);
void copy_box(Warp& w, const Instr& i, uint32_t mask);  // ops_tensor_map.cpp

// The bytes of shared memory that a copy writes or reads, checked.
uint8_t* bulk_shared(Warp& w, const BulkCopy& copy, int lane, uint64_t offset, uint32_t bytes,
                     Mbarrier* barrier);
void count_bulk(Warp& w, uint64_t address, uint64_t bytes);
void move_bulk(const BulkCopy& copy, uint8_t* shared, uint8_t* global, uint64_t bytes);

void add_tensor_maps(Decoders*);

}  // namespace sim
