// gram_accumulate_: tiles of 64 x 64 of xᵀ x in the dtype of the sum; a tile off the diagonal is computed once and
// added on both sides.
#include "ptx.cuh"

namespace tinycomp::cuda {

constexpr int kGramTile = 64, kGramRows = 16, kGramThreads = 256;

template <class T, class G>
__global__ void __launch_bounds__(kGramThreads, 4)
    gram_kernel(const T* x, int64_t x_stride, G* gram, int64_t gram_stride, int64_t gram_step, int rows, int columns) {
  __shared__ G left[kGramRows][kGramTile], right[kGramRows][kGramTile];
  const int first = blockIdx.x * kGramTile, second = blockIdx.y * kGramTile;
  if (first > second) return;
  const int i0 = threadIdx.x / 16 * 4, j0 = threadIdx.x % 16 * 4;
  G sums[4][4] = {};
  for (int start = 0; start < rows; start += kGramRows) {
    for (int i = threadIdx.x; i < kGramRows * kGramTile; i += kGramThreads) {
      const int row = start + i / kGramTile, column = i % kGramTile;
      const T* from = x + row * x_stride;
      left[i / kGramTile][column] = row < rows && first + column < columns ? G(to_float(from[first + column])) : G(0);
      right[i / kGramTile][column] =
          row < rows && second + column < columns ? G(to_float(from[second + column])) : G(0);
    }
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < kGramRows; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += left[k][i0 + i] * right[k][j0 + j];
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t a = first + i0 + i, b = second + j0 + j;
      if (a >= columns || b >= columns) continue;
      gram[a * gram_stride + b * gram_step] += sums[i][j];
      if (first != second) gram[b * gram_stride + a * gram_step] += sums[i][j];
    }
}

}  // namespace tinycomp::cuda

#if defined(TINYCOMP_TORCH)
#include "host.cuh"

namespace tinycomp::cuda {

void gram_accumulate_(Tensor gram, const Tensor& x) {
  const Device device(gram);
  STD_TORCH_CHECK(
      x.dim() >= 1 && gram.dim() == 2 && gram.size(0) == gram.size(1) && gram.size(0) == x.size(x.dim() - 1),
      "gram_accumulate_: shapes do not fit");
  with_float_type(x.scalar_type(), "gram_accumulate_", [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows(x, -1, "gram_accumulate_: x");
    if (rows.rows == 0 || rows.columns == 0) return;
    const auto launch = [&](auto sum) {
      using G = decltype(sum);
      const unsigned tiles = (rows.columns + kGramTile - 1) / kGramTile;
      TINYCOMP_LAUNCH((gram_kernel<T, G>), dim3(tiles, tiles), dim3(kGramThreads), 0, device.stream, rows.data,
                      rows.stride, static_cast<G*>(gram.mutable_data_ptr()), gram.stride(0), gram.stride(1), rows.rows,
                      rows.columns);
      device.check_launch();
    };
    if (gram.scalar_type() == ScalarType::Double) return launch(double{});
    STD_TORCH_CHECK(gram.scalar_type() == ScalarType::Float, "gram_accumulate_: dtype of gram is not supported");
    launch(float{});
  });
}

TINYCOMP_CUDA_KERNEL(gram_accumulate_, gram_accumulate_)

}  // namespace tinycomp::cuda
#endif
