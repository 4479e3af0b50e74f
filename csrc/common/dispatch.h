// Run-time values to compile-time constants: with_int(Ints<32, 64>{}, head_dim, "head_dim", f).
#pragma once

#include <type_traits>

#include "common/check.h"
#include "common/dtype.h"

namespace fl {

template <int... kValues>
struct Ints {};

template <class T>
struct Type {
  using type = T;
};

template <int... kValues, class F>
void with_int(Ints<kValues...>, int value, const char* what, F&& f) {
  bool hit = ((value == kValues && (f(std::integral_constant<int, kValues>{}), true)) || ...);
  FL_CHECK(hit, what, " = ", value, " is not supported");
}

template <class F>
void with_bool(bool value, F&& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

template <class F>
void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Type<float>{});
    case DType::kFloat16:
      return f(Type<Half>{});
    case DType::kBFloat16:
      return f(Type<BFloat16>{});
  }
}

}  // namespace fl
