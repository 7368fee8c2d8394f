// Checked views of a kernel's arguments. Errors here are terse: Python explains a refused call with the contract's own
// checks.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "dot.h"
#include "lanes.h"
#include "register.h"

namespace tinycomp {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

template <class T>
constexpr ScalarType scalar_type = std::is_same_v<T, float>      ? ScalarType::Float
                                   : std::is_same_v<T, BFloat16> ? ScalarType::BFloat16
                                   : std::is_same_v<T, Half>     ? ScalarType::Half
                                                                 : ScalarType::Double;

template <class T>
constexpr Type dot_type = std::is_same_v<T, float>      ? Type::f32
                          : std::is_same_v<T, BFloat16> ? Type::bf16
                                                        : Type::f16;

// Calls `body` with a value of the C++ type of `type`.
template <class Body>
auto with_float_type(ScalarType type, const char* op, Body body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Half{});
    case ScalarType::Double:
      return body(double{});
    default:
      STD_TORCH_CHECK(false, op, ": dtype of the input is not supported");
  }
}

inline Tensor detach(const Tensor& t) {
  StableIValue stack[] = {torch::stable::detail::from(t)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::detach", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Product of the leading dimensions.
inline int64_t row_count(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
}

// The tensor as a matrix (product of leading dimensions, last dimension), a view where strides allow.
inline Tensor as_matrix(const Tensor& x) {
  const int64_t shape[] = {row_count(x), x.size(x.dim() - 1)};
  return torch::stable::reshape(x, {shape, 2});
}

// A contiguous tensor. The stable interface's own `new_empty` looks its op up by name in every call.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size());
  int64_t step = 1;
  for (size_t d = shape.size(); d-- > 0; step *= std::max<int64_t>(shape[d], 1)) strides[d] = step;
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline std::vector<int64_t> shape_with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape(x.dim());
  for (int64_t d = 0; d < x.dim(); ++d) shape[d] = x.size(d);
  shape.back() = last;
  return shape;
}

// A (rows, cols) weight whose rows have adjacent entries; copied if they have not.
struct Weight {
  Tensor tensor;
  Type type;
  const char* data;
  int64_t rows, cols, stride;  // stride in bytes

  Weight(const Tensor& t, Type type, ScalarType scalar, int64_t cols, const char* name)
      : tensor(t), type(type), rows(0), cols(cols) {
    STD_TORCH_CHECK(t.dim() == 2 && t.scalar_type() == scalar && t.size(1) == cols, name,
                    ": shape or dtype does not fit");
    if (t.stride(1) != 1 && cols > 1) tensor = adjacent(t);
    data = static_cast<const char*>(tensor.const_data_ptr());
    rows = tensor.size(0);
    stride = tensor.stride(0) * static_cast<int64_t>(tensor.element_size());
  }
};

template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Entries of an optional vector (bias, scales), widened; empty if absent.
template <class T>
std::vector<Accumulate<T>> entries(const std::optional<Tensor>& t, int64_t size, const char* name) {
  std::vector<Accumulate<T>> values;
  if (!t) return values;
  STD_TORCH_CHECK(t->dim() == 1 && t->scalar_type() == scalar_type<T> && t->size(0) == size, name,
                  ": shape or dtype does not fit");
  const Tensor flat = adjacent(*t);
  const T* from = static_cast<const T*>(flat.const_data_ptr());
  values.resize(size);
  for (int64_t i = 0; i < size; ++i) values[i] = static_cast<Accumulate<T>>(from[i]);
  return values;
}

// An integer vector as int32, every entry checked to be below `limit`.
inline std::vector<int32_t> indices(const Tensor& t, int64_t size, int64_t limit, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size, name, ": shape does not fit");
  const Tensor flat = adjacent(t);
  std::vector<int32_t> values(size);
  auto copy = [&](const auto* __restrict from) {
    int32_t* __restrict to = values.data();
    int32_t outside = 0;
    vectorised([&] {
      int32_t some = 0;
      for (int64_t i = 0; i < size; ++i) {
        some |= from[i] < 0 || from[i] >= limit;
        to[i] = static_cast<int32_t>(from[i]);
      }
      outside = some;
    });
    STD_TORCH_CHECK(outside == 0, name, ": an index is out of range");
  };
  switch (t.scalar_type()) {
    case ScalarType::Byte:
      copy(static_cast<const uint8_t*>(flat.const_data_ptr()));
      break;
    case ScalarType::Int:
      copy(static_cast<const int32_t*>(flat.const_data_ptr()));
      break;
    case ScalarType::Long:
      copy(static_cast<const int64_t*>(flat.const_data_ptr()));
      break;
    default:
      STD_TORCH_CHECK(false, name, ": dtype does not fit");
  }
  return values;
}

// The inverse of an int32 permutation of range(size).
inline std::vector<int32_t> inverse_permutation(const Tensor& t, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size && t.scalar_type() == ScalarType::Int, name,
                  ": shape or dtype does not fit");
  const Tensor flat = adjacent(t);
  const auto* order = static_cast<const int32_t*>(flat.const_data_ptr());
  std::vector<int32_t> from(size, -1);
  bool outside = false;
  for (int64_t i = 0; i < size; ++i) {
    const bool inside = static_cast<uint32_t>(order[i]) < static_cast<uint32_t>(size);
    outside |= !inside;
    if (inside) from[order[i]] = static_cast<int32_t>(i);
  }
  STD_TORCH_CHECK(!outside, name, ": an index is out of range");
  STD_TORCH_CHECK(std::count(from.begin(), from.end(), -1) == 0, name, ": an index is repeated");
  return from;
}

}  // namespace tinycomp
