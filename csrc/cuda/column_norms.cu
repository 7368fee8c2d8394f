// column_norms: squares added in float64, in a fixed order; 32 columns per block, eight rows at a time.
#include "ptx.cuh"

namespace tinycomp::cuda {

constexpr int kNormColumns = 32, kNormRows = 8;

template <class T>
__global__ void __launch_bounds__(kNormColumns* kNormRows)
    column_norms_kernel(const T* w, int64_t stride, float* norms, int rows, int columns) {
  __shared__ double sums[kNormRows][kNormColumns];
  const int column = blockIdx.x * kNormColumns + threadIdx.x;
  double sum = 0.;
  if (column < columns)
    for (int64_t row = threadIdx.y; row < rows; row += kNormRows) {
      const double value = to_float(w[row * stride + column]);
      sum += value * value;
    }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < columns) {
    for (int i = 1; i < kNormRows; ++i) sum += sums[i][threadIdx.x];
    norms[column] = static_cast<float>(sqrt(sum));
  }
}

}  // namespace tinycomp::cuda

#if defined(TINYCOMP_TORCH)
#include "host.cuh"

namespace tinycomp::cuda {

Tensor column_norms(const Tensor& w) {
  STD_TORCH_CHECK(w.dim() == 2, "column_norms: w is not a matrix");
  const Device device(w);
  const Tensor norms = empty(w, {w.size(1)}, ScalarType::Float);
  if (w.size(1) == 0) return norms;
  return with_float_type(w.scalar_type(), "column_norms", [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows(w, -1, "column_norms: w");
    const dim3 grid((rows.columns + kNormColumns - 1) / kNormColumns);
    TINYCOMP_LAUNCH((column_norms_kernel<T>), grid, dim3(kNormColumns, kNormRows), 0, device.stream, rows.data,
                    rows.stride, static_cast<float*>(norms.mutable_data_ptr()), rows.rows, rows.columns);
    device.check_launch();
    return norms;
  });
}

TINYCOMP_CUDA_KERNEL(column_norms, column_norms)

}  // namespace tinycomp::cuda
#endif
