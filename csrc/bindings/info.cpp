#include <torch/csrc/stable/library.h>

#include <string>

#include "common/isa.h"

namespace {

std::string cpu_isa() { return fl::isa_name(fl::cpu_isa()); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastlayers, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}
