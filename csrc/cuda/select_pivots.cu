// select_pivots in float64: one launch per pivot and no word with the host. A launch finds the last pivot from the
// block maxima of the launch before, removes its row from all others, and leaves the maxima for the next one.
#include "ptx.cuh"

namespace tinycomp::cuda {

constexpr int kPivotWarps = 8, kPivotThreads = 32 * kPivotWarps;

__device__ __forceinline__ void keep_higher(double& score, int& row, double other, int other_row) {
  if (other > score || (other == score && other_row < row)) score = other, row = other_row;
}

// The best of all threads of the block, in every thread.
__device__ __forceinline__ void best_of_block(double& score, int& row) {
  __shared__ double scores[kPivotWarps];
  __shared__ int rows[kPivotWarps];
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    const double other = __shfl_xor_sync(~0u, score, offset);
    const int other_row = __shfl_xor_sync(~0u, row, offset);
    keep_higher(score, row, other, other_row);
  }
  if (threadIdx.x % 32 == 0) scores[threadIdx.x / 32] = score, rows[threadIdx.x / 32] = row;
  __syncthreads();
  score = scores[0], row = rows[0];
  for (int i = 1; i < kPivotWarps; ++i) keep_higher(score, row, scores[i], rows[i]);
  __syncthreads();
}

__device__ __forceinline__ double sum_of_warp(double value) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

template <class T>
__global__ void __launch_bounds__(kPivotThreads)
    widen_kernel(const T* a, int64_t stride, double* rest, int rows, int columns) {
  const int64_t count = static_cast<int64_t>(rows) * columns, step = static_cast<int64_t>(gridDim.x) * kPivotThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kPivotThreads + threadIdx.x; i < count; i += step)
    rest[i] = to_float(a[i / columns * stride + i % columns]);
}

// Step j of k + 1: pivots[j - 1] is decided, its row is removed (kQr: its direction; else by elimination of column
// j - 1), and maxima[j % 2] gets the best score and row of each block. A warp handles a row; chosen rows stay as they
// are, so that every block may read the pivot's.
template <bool kQr>
__global__ void __launch_bounds__(kPivotThreads)
    pivot_kernel(double* rest, int* taken, double* max_scores, int* max_rows, int64_t* pivots, int rows, int columns,
                 int step, int steps) {
  const int blocks = gridDim.x, lane = threadIdx.x % 32;
  const double* row = nullptr;
  int pivot = -1;
  double scale = 0.;
  if (step > 0) {
    double score = -2.;
    int found = rows;
    for (int i = threadIdx.x; i < blocks; i += kPivotThreads)
      keep_higher(score, found, max_scores[(step + 1) % 2 * blocks + i], max_rows[(step + 1) % 2 * blocks + i]);
    best_of_block(score, found);
    pivot = found;
    if (blockIdx.x == 0 && threadIdx.x == 0) pivots[step - 1] = pivot, taken[pivot] = 1;
    if (step == steps) return;
    row = rest + static_cast<int64_t>(pivot) * columns;
    if (kQr) {
      double square = 0.;
      for (int j = lane; j < columns; j += 32) square += row[j] * row[j];
      scale = 1. / max(sqrt(sum_of_warp(square)), 2.2250738585072014e-308);
    } else {
      scale = row[step - 1] == 0. ? 1. : row[step - 1];
    }
  }
  double best = -2.;
  int best_row = rows;
  for (int i = blockIdx.x * kPivotWarps + threadIdx.x / 32; i < rows; i += blocks * kPivotWarps) {
    double* own = rest + static_cast<int64_t>(i) * columns;
    double score = -1.;
    if (i != pivot && !taken[i]) {
      double share = 0.;
      if (row && kQr) {
        for (int j = lane; j < columns; j += 32) share += own[j] * (row[j] * scale);
        share = sum_of_warp(share) * scale;
      } else if (row) {
        share = own[step - 1] / scale;
      }
      __syncwarp();
      double square = 0.;
      for (int j = lane; j < columns; j += 32) {
        const double value = row ? own[j] - share * row[j] : own[j];
        own[j] = value;
        square += kQr ? value * value : j == step ? fabs(value) : 0.;
      }
      score = sum_of_warp(square);
    }
    keep_higher(best, best_row, score, i);
  }
  best_of_block(best, best_row);
  if (threadIdx.x == 0)
    max_scores[step % 2 * blocks + blockIdx.x] = best, max_rows[step % 2 * blocks + blockIdx.x] = best_row;
}

}  // namespace tinycomp::cuda

#if defined(TINYCOMP_TORCH)
#include "host.cuh"

namespace tinycomp::cuda {

Tensor select_pivots(const Tensor& a, int64_t k, std::string method) {
  STD_TORCH_CHECK(a.dim() == 2 && (method == "qr" || method == "lu") && 0 <= k && k <= a.size(0) &&
                      (method == "qr" || k <= a.size(1)),
                  "select_pivots: shapes do not fit, or k or method is not allowed");
  const Device device(a);
  const Tensor pivots = empty(a, {k}, ScalarType::Long);
  if (k == 0) return pivots;
  with_float_type(a.scalar_type(), "select_pivots", [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> x(a, -1, "select_pivots: a");
    const int64_t most = 4 * device.processors, needed = (x.rows + kPivotWarps - 1) / kPivotWarps;
    const int blocks = static_cast<int>(needed < most ? needed : most);
    const Tensor rest = empty(a, {x.rows, x.columns}, ScalarType::Double),
                 scores = empty(a, {2, blocks}, ScalarType::Double), rows = empty(a, {2, blocks}, ScalarType::Int);
    const int64_t shape[] = {x.rows};
    const Tensor taken = torch::stable::new_zeros(a, {shape, 1}, ScalarType::Int);
    auto* numbers = static_cast<double*>(rest.mutable_data_ptr());
    TINYCOMP_LAUNCH((widen_kernel<T>), dim3(blocks), dim3(kPivotThreads), 0, device.stream, x.data, x.stride, numbers,
                    x.rows, x.columns);
    device.check_launch();
    for (int step = 0; step <= k; ++step) {
      const auto kernel = method == "qr" ? pivot_kernel<true> : pivot_kernel<false>;
      TINYCOMP_LAUNCH(kernel, dim3(blocks), dim3(kPivotThreads), 0, device.stream, numbers,
                      static_cast<int*>(taken.mutable_data_ptr()), static_cast<double*>(scores.mutable_data_ptr()),
                      static_cast<int*>(rows.mutable_data_ptr()), static_cast<int64_t*>(pivots.mutable_data_ptr()),
                      x.rows, x.columns, step, static_cast<int>(k));
      device.check_launch();
    }
  });
  return pivots;
}

TINYCOMP_CUDA_KERNEL(select_pivots, select_pivots)

}  // namespace tinycomp::cuda
#endif
