#include "memory.h"

#include <algorithm>
#include <sstream>

namespace sim {

void GlobalMemory::add(uint64_t begin, uint64_t bytes, bool writable) {
  if (bytes == 0) return;
  const Allocation added{begin, begin + bytes, writable};
  const auto before = [](const Allocation& a, const Allocation& b) { return a.begin < b.begin; };
  allocations_.insert(std::upper_bound(allocations_.begin(), allocations_.end(), added, before),
                      added);
}

const Allocation* GlobalMemory::find(uint64_t address, uint64_t bytes) const {
  const auto after = std::upper_bound(allocations_.begin(), allocations_.end(), address,
                                      [](uint64_t a, const Allocation& b) { return a < b.begin; });
  if (after == allocations_.begin()) return nullptr;
  const Allocation& found = *(after - 1);
  return address + bytes <= found.end ? &found : nullptr;
}

std::string GlobalMemory::nearest(uint64_t address) const {
  if (allocations_.empty()) return "the launch was given no memory";
  const auto distance = [&](const Allocation& a) {
    return address < a.begin ? a.begin - address : address - std::min(address, a.end);
  };
  const auto best = std::min_element(
      allocations_.begin(), allocations_.end(),
      [&](const Allocation& a, const Allocation& b) { return distance(a) < distance(b); });
  std::ostringstream text;
  text << "the nearest allocation has " << best->end - best->begin << " bytes, the access begins "
       << static_cast<int64_t>(address - best->begin) << " bytes from its start";
  return text.str();
}

namespace {

constexpr uint32_t kBanks = 32, kBankBytes = 4;

// Wavefronts of one phase: the largest number of different words in one bank.
class Phase {
 public:
  void add(uint64_t offset, uint32_t bytes) {
    for (uint64_t word = offset / kBankBytes; word * kBankBytes < offset + bytes; ++word) {
      uint32_t* words = words_[word % kBanks];
      uint32_t& count = counts_[word % kBanks];
      const auto w = static_cast<uint32_t>(word);
      if (std::find(words, words + count, w) == words + count) words[count++] = w;
    }
  }
  uint32_t wavefronts() const { return *std::max_element(counts_, counts_ + kBanks); }

 private:
  uint32_t counts_[kBanks] = {};
  uint32_t words_[kBanks][kLanes];
};

bool contiguous(const uint64_t* at, uint32_t bytes) {
  bool yes = true;
  for (int lane = 1; lane < kLanes; ++lane) yes &= at[lane] == at[0] + uint64_t{bytes} * lane;
  return yes;
}

uint64_t lanes_of(uint32_t mask) { return static_cast<uint64_t>(__builtin_popcount(mask)); }

}  // namespace

void count_shared(Warp& w, const uint64_t* offsets, uint32_t bytes, uint32_t mask) {
  Cost& cost = w.profile->shared[w.pc];
  ++cost.accesses;
  cost.bytes += bytes * lanes_of(mask);
  const int per_phase = bytes <= 4 ? kLanes : static_cast<int>(4 * kLanes / bytes);
  if (mask == kAll && contiguous(offsets, bytes)) {
    cost.took += static_cast<uint64_t>(kLanes / per_phase);
    cost.minimum += static_cast<uint64_t>(kLanes / per_phase);
    return;
  }
  for (int first = 0; first < kLanes; first += per_phase) {
    Phase phase;
    for (int lane = first; lane < first + per_phase; ++lane) {
      if (mask >> lane & 1) phase.add(offsets[lane], bytes);
    }
    cost.took += phase.wavefronts();
    cost.minimum += phase.wavefronts() > 0;
  }
}

void count_shared_rows(Warp& w, const uint64_t* offsets, int rows) {
  Cost& cost = w.profile->shared[w.pc];
  ++cost.accesses;
  cost.bytes += static_cast<uint64_t>(rows) * 16;
  for (int first = 0; first < rows; first += 8) {
    ++cost.minimum;
    uint32_t chunks = 0;  // of 16 bytes, where the 8 rows lie in a line of all banks
    for (int row = first; row < first + 8; ++row) chunks |= 1u << (offsets[row] / 16 % 8);
    if (chunks == 0xff) {
      ++cost.took;
      continue;
    }
    Phase phase;
    for (int row = first; row < first + 8; ++row) phase.add(offsets[row], 16);
    cost.took += phase.wavefronts();
  }
}

void count_global(Warp& w, const uint64_t* addresses, uint32_t bytes, uint32_t mask) {
  Cost& cost = w.profile->global[w.pc];
  ++cost.accesses;
  cost.bytes += bytes * lanes_of(mask);
  uint64_t sorted[kLanes];
  int count = 0;
  bool ascending = true;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    ascending &= count == 0 || addresses[lane] >= sorted[count - 1];
    sorted[count++] = addresses[lane];
  }
  if (!ascending) std::sort(sorted, sorted + count);
  uint64_t sectors = 0, distinct = 0, last_sector = ~uint64_t{0}, last = ~uint64_t{0};
  for (int i = 0; i < count; ++i) {
    distinct += sorted[i] != last;
    last = sorted[i];
    for (uint64_t s = sorted[i] / 32; s <= (sorted[i] + bytes - 1) / 32; ++s) {
      if (s == last_sector) continue;
      ++sectors;
      last_sector = s;
    }
  }
  cost.took += sectors;
  cost.minimum += (distinct * bytes + 31) / 32;
}

}  // namespace sim
