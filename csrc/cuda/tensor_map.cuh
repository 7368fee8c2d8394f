// What the host tells tensor copies (TMA) of a matrix.
#pragma once

#include "linear_host.cuh"
#include "ptx_sm90.cuh"

namespace tinycomp::cuda {

// A matrix of 16-bit numbers in boxes, its rows at 16-byte strides.
template <class T>
ptx::TensorMap boxes(const void* data, int64_t rows, int64_t columns, int64_t stride) {
#if defined(TINYCOMP_EMULATION)
  return {data, columns, rows, stride * int64_t{sizeof(T)}, ptx::kBoxColumns, ptx::kBoxRows, sizeof(T)};
#else
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    STD_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status));
    STD_TORCH_CHECK(status == cudaDriverEntryPointSuccess, "tinycomp: the driver has no tensor maps; update it");
    return reinterpret_cast<Encode>(found);
  }();
  ptx::TensorMap map;
  const auto type = std::is_same_v<T, bf16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * sizeof(T)};
  const cuuint32_t box[2] = {ptx::kBoxColumns, ptx::kBoxRows}, steps[2] = {1, 1};
  const CUresult done =
      encode(&map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(done == CUDA_SUCCESS, "tinycomp: a tensor map was refused, code ", static_cast<int>(done));
  return map;
#endif
}

// A kernel that takes boxes of the inputs and of the weight, a block for each of its tiles.
template <class Tile, class T, class Kernel>
void launch_on_boxes(Kernel* kernel, const Device& device, const Matrix<T>& x, const Storage& w, const Output<T>& o,
                     int inputs) {
  constexpr size_t kBytes = Tile::kSharedBytes + 1024;  // what aligning to 1024 may skip
  allow_shared_memory(kernel, kBytes);
  TINYCOMP_LAUNCH(kernel, dim3(ceil_div(inputs, Tile::kM), ceil_div(w.rows, Tile::kN)), dim3(Tile::kThreads), kBytes,
                  device.stream, boxes<T>(x.data, inputs, w.columns, x.stride),
                  boxes<T>(w.data, w.rows, w.columns, w.stride), TINYCOMP_PASS_OUTPUT(o), inputs, w.rows, w.columns);
  device.check_launch();
}

}  // namespace tinycomp::cuda
