// The host half of every op: checked views of tensors, the current stream and device, configurations, registration.
// Errors are terse: Python explains a refused call with the contract's own checks.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>

#include "../common/register.h"
#include "config.h"
#include "decode.cuh"
#if !defined(TINYCOMP_EMULATION)
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>
#endif

namespace tinycomp::cuda {

using torch::headeronly::ScalarType;

#if defined(TINYCOMP_EMULATION)
using Stream = void*;
// Resident blocks of the emulated device; a test lowers it to reach the configurations of small grids.
inline int emulated_processors = 108;
inline Instructions emulated_instructions = kMma;
inline bool emulated_capture = false;
struct Device {
  int index = 0;
  Stream stream = nullptr;
  int processors = emulated_processors;
  Instructions instructions = emulated_instructions;
  mutable int64_t scratch_used = 0;
  explicit Device(const Tensor&) {}
  unsigned* counters() const;
  void check_launch() const {}
  bool capturing() const { return emulated_capture; }
};
#else
using Stream = cudaStream_t;
// Makes the tensor's device current; its current stream; nothing here waits for the device.
struct Device {
  int index;
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream = nullptr;
  int processors = 0;
  Instructions instructions = kMma;  // what else it has, if that is asked for
  mutable int64_t scratch_used = 0;  // by this call, of what `scratch` keeps
  explicit Device(const Tensor& t) : index(t.get_device_index()), guard(t.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<Stream>(current);
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index));
    static const char* wanted = std::getenv("TINYCOMP_TMA");
    if (wanted && wanted[0] == '1') {
      int major = 0, minor = 0;
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
      STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
      if (major == 9 && minor == 0) instructions = kWgmma;
      if (major == 10 && minor == 0) instructions = kTcgen05;
    }
  }
  // Zeros for `run_stages`, left at zero by it; no other launch that may run at the same time gets the same ones.
  unsigned* counters() const;
  void check_launch() const { STD_CUDA_KERNEL_LAUNCH_CHECK(); }
  bool capturing() const {
    cudaStreamCaptureStatus status;
    STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
    return status != cudaStreamCaptureStatusNone;
  }
};
#endif

// More than 48 KB of dynamic shared memory must be asked for.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, size_t bytes) {
#if defined(TINYCOMP_EMULATION)
  (void)kernel, (void)bytes;
#else
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
#endif
}

template <class T>
constexpr ScalarType scalar_type = std::is_same_v<T, float>  ? ScalarType::Float
                                   : std::is_same_v<T, bf16> ? ScalarType::BFloat16
                                                             : ScalarType::Half;

// Calls `body` with a value of the device type of `type`.
template <class Body>
auto with_float_type(ScalarType type, const char* op, Body body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(bf16{});
    case ScalarType::Half:
      return body(f16{});
    default:
      STD_TORCH_CHECK(false, op, ": dtype of the input is not supported");
  }
}

inline bool vector_aligned(const void* data, int64_t stride_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride_bytes % 16 == 0;
}

inline int to_int(int64_t value, const char* name) {
  STD_TORCH_CHECK(value <= INT32_MAX / 2, name, ": more than 2^30 rows or columns");
  return static_cast<int>(value);
}

// A matrix whose rows have adjacent entries; copied if they have not. Leading dimensions are one.
template <class T>
struct Rows {
  Tensor tensor;
  const T* data;
  int rows, columns;
  int64_t stride;
  bool vector;

  Rows(const Tensor& t, ScalarType type, int64_t wanted_columns, const char* name) : tensor(t) {
    STD_TORCH_CHECK(t.dim() >= 1 && t.scalar_type() == type, name, ": dimensions or dtype do not fit");
    const int64_t last = t.size(t.dim() - 1);
    STD_TORCH_CHECK(wanted_columns < 0 || last == wanted_columns, name, ": shape does not fit");
    int64_t count = 1;
    for (int64_t d = 0; d + 1 < t.dim(); ++d) count *= t.size(d);
    const bool matrix = t.dim() == 2 && (t.stride(1) == 1 || last <= 1);
    if (!matrix) tensor = adjacent(t);
    data = static_cast<const T*>(tensor.const_data_ptr());
    rows = to_int(count, name), columns = to_int(last, name);
    stride = matrix ? t.stride(0) : last;
    vector = vector_aligned(data, stride * static_cast<int64_t>(sizeof(T)));
  }
  explicit Rows(const Tensor& t, int64_t wanted_columns, const char* name)
      : Rows(t, scalar_type<T>, wanted_columns, name) {}

  Matrix<T> matrix() const { return {data, stride, vector}; }
};

// An optional vector with adjacent entries; null if absent.
template <class T>
struct Vector {
  std::optional<Tensor> tensor;
  const T* data = nullptr;
  Vector(const std::optional<Tensor>& t, ScalarType type, int64_t size, const char* name) {
    if (!t) return;
    STD_TORCH_CHECK(t->dim() == 1 && t->scalar_type() == type && t->size(0) == size, name,
                    ": shape or dtype does not fit");
    tensor = adjacent(*t);
    data = static_cast<const T*>(tensor->const_data_ptr());
  }
};

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, type);
}

inline std::vector<int64_t> shape_with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape(x.dim());
  for (int64_t d = 0; d < x.dim(); ++d) shape[d] = x.size(d);
  shape.back() = last;
  return shape;
}

// Bytes for the only launch of a call, from memory that its stream keeps for the next call's; null while a graph is
// captured, whose launches may be replayed beside others of the stream.
void* scratch(const Device& device, const Tensor& like, int64_t bytes);

// Memory for what a call keeps between its stages. Few inputs take one launch and allocate nothing.
template <class T>
struct Kept {
  std::optional<Tensor> tensor;
  T* data = nullptr;
  Kept(const Device& device, const Tensor& like, int64_t count, bool one_launch) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (one_launch) data = static_cast<T*>(scratch(device, like, bytes));
    if (data) return;
    tensor = empty(like, {bytes}, ScalarType::Byte);
    data = static_cast<T*>(tensor->mutable_data_ptr());
  }
};

// Products of earlier stages: rows padded so that they can be read 16 bytes at a time.
template <class T>
struct Between : Kept<T> {
  int64_t stride;
  Between(const Device& device, const Tensor& like, int64_t rows, int64_t columns, bool one_launch = true)
      : Kept<T>(device, like, rows * ((columns + 7) / 8 * 8), one_launch && rows <= kDecodeRows),
        stride((columns + 7) / 8 * 8) {}
};

}  // namespace tinycomp::cuda

#if defined(TINYCOMP_EMULATION)
#define TINYCOMP_CUDA_KERNEL(op, function)                            \
  STABLE_TORCH_LIBRARY_IMPL(tinycomp_emulated, CPU, m) {              \
    m.impl(#op, TORCH_BOX(&function));                                \
    ::tinycomp::signatures()[#op] = ::tinycomp::signature(&function); \
  }
#else
#define TINYCOMP_CUDA_KERNEL(op, function)                            \
  STABLE_TORCH_LIBRARY_IMPL(tinycomp, CUDA, m) {                      \
    m.impl(#op, TORCH_BOX(&function));                                \
    ::tinycomp::signatures()[#op] = ::tinycomp::signature(&function); \
  }
#endif
