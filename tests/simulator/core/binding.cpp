// The simulator for Python: tests/simulator/module.py is what people use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "launch.h"

namespace py = pybind11;

namespace sim {
namespace {

using Buffer = std::tuple<uint64_t, uint64_t, bool>;  // address, bytes, writable
using Sizes = std::array<uint32_t, 3>;

py::dict as_dict(const Cost& cost, const char* unit) {
  py::dict d;
  d["accesses"] = cost.accesses;
  d[unit] = cost.took;
  d["minimum"] = cost.minimum;
  d["bytes"] = cost.bytes;
  return d;
}

class Program {
 public:
  explicit Program(const std::string& text)
      : module_(ptx::parse(text)), memory_(place_variables(module_)) {}

  std::vector<std::string> kernels() const {
    std::vector<std::string> names;
    for (const ptx::Function& f : module_.functions) {
      if (f.is_entry && !f.is_declaration) names.push_back(f.name);
    }
    return names;
  }

  std::string target() const { return module_.target; }

  // (offset, bytes) of each parameter.
  std::vector<std::pair<uint32_t, uint32_t>> params(const std::string& name) {
    std::vector<std::pair<uint32_t, uint32_t>> all;
    for (const Param& p : kernel(name).params) all.emplace_back(p.offset, p.bytes);
    return all;
  }

  py::dict facts(const std::string& name) {
    const Kernel& k = kernel(name);
    py::dict d;
    d["static_shared"] = k.static_shared;
    d["local_bytes"] = k.local_bytes;
    d["max_threads"] = k.required_threads ? k.required_threads : k.max_threads;
    d["instructions"] = k.sources.size();
    return d;
  }

  py::dict launch(const std::string& name, Sizes grid, Sizes block, const py::bytes& params,
                  uint32_t shared, const std::vector<Buffer>& buffers, bool race_check,
                  uint64_t limit, int threads) {
    Launch launch;
    launch.kernel = &kernel(name);
    launch.grid = {grid[0], grid[1], grid[2]};
    launch.block = {block[0], block[1], block[2]};
    launch.dynamic_shared = shared;
    launch.race_check = race_check;
    launch.limit = limit;
    launch.memory = memory_->allocations;
    for (const auto& [address, bytes, writable] : buffers) {
      launch.memory.add(address, bytes, writable);
    }
    const std::string_view given = params;
    launch.params = lines_for(given.size());
    std::memcpy(launch.params.data(), given.data(), given.size());
    Profile profile;
    {
      const py::gil_scoped_release release;
      profile = run(launch, threads);
    }
    return report(*launch.kernel, profile);
  }

 private:
  Kernel& kernel(const std::string& name) {
    std::unique_ptr<Kernel>& slot = kernels_[name];
    if (!slot) slot = assemble(module_, *memory_, name);
    return *slot;
  }

  static py::dict report(const Kernel& kernel, const Profile& profile) {
    uint64_t total = 0, mma_flops = 0, barriers = 0;
    uint64_t classes[static_cast<int>(Class::kCount)] = {};
    Cost shared, global;
    const auto add = [](Cost* to, const Cost& from) {
      to->accesses += from.accesses;
      to->took += from.took;
      to->minimum += from.minimum;
      to->bytes += from.bytes;
    };
    py::list lines;
    for (size_t i = 0; i < kernel.code.size(); ++i) {
      const Instr& instr = kernel.code[i];
      const uint64_t issued = profile.issued[i];
      if (instr.source == kNoSource || issued == 0) continue;
      total += issued;
      mma_flops += issued * instr.mma_flops;
      classes[static_cast<int>(instr.klass)] += issued;
      const ptx::Instruction& source = kernel.sources[instr.source];
      if (source.opcode == "bar" || source.opcode == "barrier") barriers += issued;
      add(&shared, profile.shared[i]);
      add(&global, profile.global[i]);
      py::dict line;
      line["line"] = instr.line;
      line["instruction"] = source.text();
      line["source_line"] = source.source_line;
      line["issued"] = issued;
      if (profile.shared[i].accesses) line["shared"] = as_dict(profile.shared[i], "wavefronts");
      if (profile.global[i].accesses) line["global"] = as_dict(profile.global[i], "sectors");
      lines.append(line);
    }
    py::dict by_class;
    for (int c = 0; c < static_cast<int>(Class::kCount); ++c) {
      if (classes[c]) by_class[name_of(static_cast<Class>(c))] = classes[c];
    }
    py::dict d;
    d["total"] = total;
    d["classes"] = by_class;
    d["mma_flops"] = mma_flops;
    d["shared"] = as_dict(shared, "wavefronts");
    d["global"] = as_dict(global, "sectors");
    d["barriers"] = barriers;
    d["largest_block"] = profile.largest_block;
    d["lines"] = lines;
    return d;
  }

  ptx::Module module_;
  std::unique_ptr<ModuleMemory> memory_;
  std::map<std::string, std::unique_ptr<Kernel>> kernels_;
};

void raise(const Fault& reason) {
  const py::object type = py::module_::import("tests.simulator.error").attr("SimulatorError");
  const py::object error = type(name_of(reason.kind), reason.what());
  PyErr_SetObject(type.ptr(), error.ptr());
}

}  // namespace
}  // namespace sim

PYBIND11_MODULE(simulator_core, m) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const sim::Fault& reason) {
      sim::raise(reason);
    }
  });
  py::class_<sim::Program>(m, "Program")
      .def(py::init<const std::string&>())
      .def("kernels", &sim::Program::kernels)
      .def("target", &sim::Program::target)
      .def("params", &sim::Program::params)
      .def("facts", &sim::Program::facts)
      .def("launch", &sim::Program::launch);
}
