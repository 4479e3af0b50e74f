#include "launch.h"

#include <exception>
#include <mutex>
#include <thread>

#include "checker.h"

namespace sim {
namespace {

void set_special(Warp& w, Special which, uint32_t value) {
  auto* lanes = w.lanes<uint32_t>(Ref{static_cast<uint32_t>(which) * kLanes * 4, 0});
  for (int i = 0; i < kLanes; ++i) lanes[i] = value;
}

void set_threads(Warp& w, const Dim& size) {
  const auto lanes = [&](Special which) {
    return w.lanes<uint32_t>(Ref{static_cast<uint32_t>(which) * kLanes * 4, 0});
  };
  for (uint32_t i = 0; i < kLanes; ++i) {
    const uint32_t thread = static_cast<uint32_t>(w.index) * kLanes + i;
    lanes(kTidX)[i] = thread % size.x;
    lanes(kTidY)[i] = thread / size.x % size.y;
    lanes(kTidZ)[i] = thread / size.x / size.y;
    lanes(kLaneid)[i] = i;
    lanes(kLanemaskEq)[i] = 1u << i;
    lanes(kLanemaskLt)[i] = (1u << i) - 1;
    lanes(kLanemaskLe)[i] = (2u << i) - 1;
    lanes(kLanemaskGt)[i] = ~((2u << i) - 1);
    lanes(kLanemaskGe)[i] = ~((1u << i) - 1);
  }
}

// A worker's block, made once and set back for each block of the grid.
class Worker {
 public:
  explicit Worker(const Launch& launch) : launch_(launch) {
    const Kernel& kernel = *launch.kernel;
    const uint64_t threads = launch.block.count();
    const auto warps = static_cast<int>((threads + kLanes - 1) / kLanes);
    register_stride_ = (kernel.register_bytes + 63) / 64 * 64;
    registers_.resize(register_stride_ * static_cast<size_t>(warps) + 64);
    block_.launch = &launch;
    block_.warps.resize(static_cast<size_t>(warps));
    const size_t shared = kernel.static_shared + launch.dynamic_shared;
    block_.shared.resize(shared + 16);
    block_.checker = std::make_unique<Checker>(shared, warps, launch.race_check);
    block_.local_bytes = kernel.local_bytes;
    block_.local.resize(static_cast<size_t>(warps) * kLanes * kernel.local_bytes);
    block_.local_written.resize(block_.local.size());
    profile.issued.resize(kernel.code.size());
    profile.shared.resize(kernel.code.size());
    profile.global.resize(kernel.code.size());
  }

  void run(uint64_t index) {
    block_.x = static_cast<uint32_t>(index % launch_.grid.x);
    block_.y = static_cast<uint32_t>(index / launch_.grid.x % launch_.grid.y);
    block_.z = static_cast<uint32_t>(index / launch_.grid.x / launch_.grid.y);
    block_.checker->reset();
    block_.barriers = {};
    block_.cluster_knowledge = {};
    block_.mbarriers.clear();
    block_.mbarriers_made = 0;
    std::fill(block_.local_written.begin(), block_.local_written.end(), uint8_t{0});
    block_.progress = 0;
    for (size_t i = 0; i < block_.warps.size(); ++i) reset(static_cast<int>(i));
    run_block(block_, &profile);
  }

  Profile profile;

 private:
  void reset(int index) {
    Warp& w = block_.warps[static_cast<size_t>(index)];
    const Dim &grid = launch_.grid, &size = launch_.block;
    const uint64_t left = size.count() - static_cast<uint64_t>(index) * kLanes;
    auto* start = reinterpret_cast<std::byte*>(
        (reinterpret_cast<uintptr_t>(registers_.data()) + 63) / 64 * 64);
    w = Warp{};
    w.bank[0] = start + register_stride_ * static_cast<size_t>(index);
    w.bank[1] = const_cast<std::byte*>(launch_.constants.data());
    w.block = &block_;
    w.index = index;
    w.alive = w.active = left >= kLanes ? kAll : (1u << left) - 1;
    w.pc = static_cast<uint32_t>(launch_.kernel->entry);
    w.join = -1;
    std::fill_n(w.bank[0], launch_.kernel->register_bytes, std::byte{0});
    set_threads(w, size);
    const std::pair<Special, uint32_t> uniform[] = {
        {kNtidX, size.x},
        {kNtidY, size.y},
        {kNtidZ, size.z},
        {kCtaidX, block_.x},
        {kCtaidY, block_.y},
        {kCtaidZ, block_.z},
        {kNctaidX, grid.x},
        {kNctaidY, grid.y},
        {kNctaidZ, grid.z},
        {kWarpid, static_cast<uint32_t>(index)},
        {kNwarpid, static_cast<uint32_t>(block_.warps.size())},
        {kNsmid, 1},
        {kOne, 1},
        {kDynamicShared, launch_.dynamic_shared},
        {kTotalShared, launch_.kernel->static_shared + launch_.dynamic_shared}};
    for (const auto& [which, value] : uniform) set_special(w, which, value);
  }

  const Launch& launch_;
  Block block_;
  size_t register_stride_;
  std::vector<std::byte> registers_;
};

void check(const Launch& launch) {
  const Kernel& kernel = *launch.kernel;
  const uint64_t threads = launch.block.count();
  if (threads == 0 || threads > 1024 || launch.block.z > 64 || launch.grid.count() == 0 ||
      launch.grid.y > 65535 || launch.grid.z > 65535 || launch.grid.x > 0x7fffffff) {
    fault(Kind::kArguments, -1, kernel.name, ": grid (", launch.grid.x, ", ", launch.grid.y, ", ",
          launch.grid.z, ") of blocks (", launch.block.x, ", ", launch.block.y, ", ",
          launch.block.z, ") cannot be launched");
  }
  if (kernel.required_threads && threads != static_cast<uint64_t>(kernel.required_threads)) {
    fault(Kind::kArguments, -1, kernel.name, ": takes blocks of ", kernel.required_threads,
          " threads, got ", threads);
  }
  if (kernel.max_threads && threads > static_cast<uint64_t>(kernel.max_threads)) {
    fault(Kind::kArguments, -1, kernel.name, ": takes blocks of at most ", kernel.max_threads,
          " threads, got ", threads);
  }
  const uint32_t most = kernel.target >= 90 ? 232448 : kernel.target >= 80 ? 166912 : 65536;
  if (kernel.static_shared + launch.dynamic_shared > most) {
    fault(Kind::kArguments, -1, kernel.name, ": ", kernel.static_shared + launch.dynamic_shared,
          " bytes of shared memory, sm_", kernel.target, " has ", most);
  }
}

}  // namespace

Profile run(Launch& launch, int threads) {
  check(launch);
  const Kernel& kernel = *launch.kernel;
  launch.constants = kernel.constants;
  const auto base = reinterpret_cast<uint64_t>(launch.params.data());
  for (const auto& [place, offset] : kernel.param_addresses) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t address = base + offset;
      std::memcpy(&launch.constants[place + 8 * static_cast<size_t>(lane)], &address, 8);
    }
  }
  launch.memory.add(base, std::max(kernel.param_bytes, 1u), false);

  const uint64_t blocks = launch.grid.count();
  std::atomic<uint64_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
  std::vector<std::unique_ptr<Worker>> workers;
  const auto work = [&](Worker* worker) {
    try {
      for (uint64_t i; !launch.failed && (i = next++) < blocks;) worker->run(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
      launch.failed = true;
    }
  };
  const auto count = std::min<uint64_t>(static_cast<uint64_t>(std::max(threads, 1)), blocks);
  for (uint64_t i = 0; i < count; ++i) workers.push_back(std::make_unique<Worker>(launch));
  std::vector<std::thread> others;
  for (uint64_t i = 1; i < count; ++i) others.emplace_back(work, workers[i].get());
  work(workers[0].get());
  for (std::thread& thread : others) thread.join();
  if (failure) std::rethrow_exception(failure);

  Profile total = std::move(workers[0]->profile);
  const auto add = [](Cost& to, const Cost& from) {
    to.accesses += from.accesses;
    to.took += from.took;
    to.minimum += from.minimum;
    to.bytes += from.bytes;
  };
  for (uint64_t w = 1; w < count; ++w) {
    const Profile& part = workers[w]->profile;
    total.largest_block = std::max(total.largest_block, part.largest_block);
    for (size_t i = 0; i < total.issued.size(); ++i) {
      total.issued[i] += part.issued[i];
      add(total.shared[i], part.shared[i]);
      add(total.global[i], part.global[i]);
    }
  }
  return total;
}

}  // namespace sim
