// Where the operators are registered. tests/simulator compiles the CUDA bindings into a namespace
// of its own and for CPU tensors.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef FL_NAMESPACE
#define FL_NAMESPACE fastlayers
#define FL_CUDA_KEY CUDA
#endif

#define FL_TORCH_LIBRARY_OF(name, m) STABLE_TORCH_LIBRARY(name, m)
#define FL_TORCH_LIBRARY(m) FL_TORCH_LIBRARY_OF(FL_NAMESPACE, m)
