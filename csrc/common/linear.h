// What the linear-layer kernels share: checked views of their arguments, and rows of a weight against few inputs in
// parallel. Errors here are terse: Python explains a refused call with the contract's own checks.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "dot.h"
#include "register.h"

namespace tinycomp {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// Up to this many input rows the kernels stream weights through `dot`; beyond, GEMM in torch is faster.
constexpr int64_t kFewRows = 16;

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

// The tensor as a matrix (product of leading dimensions, last dimension), a view where strides allow.
inline Tensor as_matrix(const Tensor& x) {
  const int64_t columns = x.size(x.dim() - 1);
  const int64_t shape[] = {columns == 0 ? 0 : x.numel() / columns, columns};
  return torch::stable::reshape(x, {shape, 2});
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, type);
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
    if (t.stride(1) != 1 && cols > 1) tensor = torch::stable::contiguous(t);
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
  const Tensor flat = torch::stable::contiguous(*t);
  const T* from = static_cast<const T*>(flat.const_data_ptr());
  values.resize(size);
  for (int64_t i = 0; i < size; ++i) values[i] = static_cast<Accumulate<T>>(from[i]);
  return values;
}

// An integer vector as int32, every entry checked to be below `limit`.
inline std::vector<int32_t> indices(const Tensor& t, int64_t size, int64_t limit, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size, name, ": shape does not fit");
  const Tensor flat = torch::stable::contiguous(t);
  std::vector<int32_t> values(size);
  auto copy = [&](auto* from) {
    for (int64_t i = 0; i < size; ++i) {
      STD_TORCH_CHECK(from[i] >= 0 && from[i] < limit, name, ": an index is out of range");
      values[i] = static_cast<int32_t>(from[i]);
    }
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

// An int32 permutation of range(size).
inline std::vector<int32_t> permutation(const Tensor& t, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int, name, ": dtype does not fit");
  std::vector<int32_t> values = indices(t, size, size, name);
  std::vector<char> seen(size, 0);
  for (const int32_t value : values) {
    STD_TORCH_CHECK(!seen[value], name, ": an index is repeated");
    seen[value] = 1;
  }
  return values;
}

// The few rows of an input in float32, adjacent.
class FewInputs {
 public:
  template <class T>
  FewInputs(const Tensor& matrix, T) : tensor_(torch::stable::contiguous(matrix)) {
    const void* from = tensor_.const_data_ptr();
    if constexpr (std::is_same_v<T, float>) {
      data_ = static_cast<const float*>(from);
    } else {
      copy_.resize(tensor_.numel());
      widen(dot_type<T>, from, copy_.data(), tensor_.numel());
      data_ = copy_.data();
    }
  }
  const float* data() const { return data_; }

 private:
  Tensor tensor_;
  std::vector<float> copy_;
  const float* data_;
};

inline int64_t blocks(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }

// store(j, i, value) for each input row j and each weight row i in the given blocks; inputs are `cols` floats apart.
template <class Store>
void dot_blocks(const Weight& w, const float* x, int64_t m, int64_t first, int64_t last, Store store) {
  constexpr int64_t kBatch = 64;
  float out[kFewRows * kBatch];
  const int64_t end = std::min(last * kBlockRows, w.rows);
  for (int64_t i = first * kBlockRows; i < end; i += kBatch) {
    const int64_t n = std::min(kBatch, end - i);
    dot(w.type, w.data + i * w.stride, w.stride, n, w.cols, x, w.cols, m, out, kBatch);
    for (int64_t j = 0; j < m; ++j)
      for (int64_t r = 0; r < n; ++r) store(j, i + r, out[j * kBatch + r]);
  }
}

// Blocks of weight rows over threads; a thread is worth waking for 64 KiB of weights.
template <class Body>
void parallel_blocks(int64_t count, int64_t bytes_per_row, Body body) {
  const int64_t grain = 1 + 65536 / (kBlockRows * std::max<int64_t>(bytes_per_row, 1));
  torch::stable::parallel_for(0, count, grain, body);
}

template <class Store>
void rows_dot(const Weight& w, const float* x, int64_t m, Store store) {
  parallel_blocks(blocks(w.rows), w.stride,
                  [&](int64_t first, int64_t last) { dot_blocks(w, x, m, first, last, store); });
}

// x wᵀ through torch, outside any gradient graph.
inline Tensor gemm(const Tensor& x, const Tensor& w) {
  return torch::stable::matmul(detach(x), torch::stable::transpose(detach(w), 0, 1));
}

// body(j) for the rows of a result, over threads.
template <class Body>
void parallel_rows(int64_t rows, int64_t cols, Body body) {
  const int64_t grain = 1 + 32768 / std::max<int64_t>(cols, 1);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) body(j);
  });
}

// y += bias by rows of a contiguous matrix.
template <class T>
void add_bias(T* y, int64_t rows, int64_t cols, const std::vector<Accumulate<T>>& bias) {
  if (bias.empty()) return;
  parallel_rows(rows, cols, [&](int64_t j) {
    for (int64_t i = 0; i < cols; ++i)
      y[j * cols + i] = static_cast<T>(static_cast<Accumulate<T>>(y[j * cols + i]) + bias[i]);
  });
}

}  // namespace tinycomp
