// gram_accumulate_: tiles of xᵀ x on or above the diagonal; a tile off the diagonal is added on both sides.
//
// 16-bit inputs into a float32 sum take tensor cores: products of 16-bit numbers are exact in float32. Plain FMA
// otherwise: TF32 would lose digits of float32 inputs, and a float64 sum promises digits that float32 sums have not.
#include "gemm.cuh"

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
#pragma unroll(sizeof(G) == 8 ? 2 : 4)  // in float64 ptxas spills registers on sm_100 otherwise
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

// A stage holds 64 rows of x, for each side of a tile in panels of 64 columns: 128 swizzled bytes of a row.
constexpr int kPanel = 64, kPanelBytes = kPanel * 128;

// Adds the products of one stage; both operands have their columns along the rows of shared memory.
template <class T, class Tile, int kTilesM, int kTilesN>
__device__ __forceinline__ void multiply_columns(const char* left, const char* right,
                                                 float (&sums)[kTilesM][kTilesN][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int m0 = warp / Tile::kWarpsN * 16 * kTilesM, n0 = warp % Tile::kWarpsN * 8 * kTilesN;
  const auto at = [](const char* side, int row, int column) {
    return side + column / kPanel * kPanelBytes + swizzled(row, column % kPanel / 8);
  };
#pragma unroll
  for (int k = 0; k < kPanel; k += 16) {
    uint32_t a[kTilesM][4], b[kTilesN][2];
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
      ptx::load_matrices_transposed(a[i], at(left, k + lane % 8 + lane / 16 * 8, m0 + 16 * i + lane / 8 % 2 * 8));
#pragma unroll
    for (int j = 0; j < kTilesN; j += 2) {
      uint32_t both[4];
      ptx::load_matrices_transposed(both, at(right, k + lane % 16, n0 + 8 * j + lane / 16 * 8));
      b[j][0] = both[0], b[j][1] = both[1], b[j + 1][0] = both[2], b[j + 1][1] = both[3];
    }
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) ptx::mma(T{}, sums[i][j], a[i], b[j]);
  }
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    gram_tiles(const T* x_data, int64_t x_stride, int x_vector, float* gram, int64_t gram_stride, int64_t gram_step,
               int rows, int columns) {
  TINYCOMP_SHARED_MEMORY(char, shared);
  constexpr int kTilesM = Tile::kM / Tile::kWarpsM / 16, kTilesN = Tile::kN / Tile::kWarpsN / 8;
  constexpr int kStages = Tile::kStages, kPanels = Tile::kM / kPanel, kSideBytes = kPanels * kPanelBytes;
  static_assert(Tile::kM == Tile::kN && kStages * 2 * kSideBytes == Tile::kSharedBytes);
  const int first = blockIdx.x * Tile::kM, second = blockIdx.y * Tile::kN;
  if (first > second) return;
  const Matrix<T> x{x_data, x_stride, x_vector != 0};
  const int steps = (rows + kPanel - 1) / kPanel, right = first == second ? 0 : kSideBytes;
  auto stage = [&](int step) {
    char* at = shared + step % kStages * 2 * kSideBytes;
    if (step < steps) {
#pragma unroll
      for (int p = 0; p < kPanels; ++p) {
        char* panel = at + p * kPanelBytes;
        stage_rows<T, kPanel, Tile::kThreads>(x, rows, columns, step * kPanel, first + p * kPanel, panel);
        if (right)
          stage_rows<T, kPanel, Tile::kThreads>(x, rows, columns, step * kPanel, second + p * kPanel, panel + right);
      }
    }
    ptx::commit_copies();
  };
  float sums[kTilesM][kTilesN][4] = {};
  run_steps<kStages>(steps, stage, [&](int step) {
    const char* at = shared + step % kStages * 2 * kSideBytes;
    add_products(sums, [&](auto& products) { multiply_columns<T, Tile>(at, at + right, products); });
  });
  ptx::wait_copies<0>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int a0 = first + warp / Tile::kWarpsN * 16 * kTilesM + lane / 4;
  const int b0 = second + warp % Tile::kWarpsN * 8 * kTilesN + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < kTilesM; ++i)
#pragma unroll
    for (int j = 0; j < kTilesN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t a = a0 + 16 * i + 8 * (e / 2), b = b0 + 8 * j + e % 2;
        if (a >= columns || b >= columns) continue;
        gram[a * gram_stride + b * gram_step] += sums[i][j][e];
        if (right) gram[b * gram_stride + a * gram_step] += sums[i][j][e];
      }
}

}  // namespace tinycomp::cuda

#if defined(TINYCOMP_TORCH)
#include "host.cuh"

namespace tinycomp::cuda {

template <class T, class G>
void launch_gram(const Device& device, const Rows<T>& x, const Tensor& gram) {
  const unsigned tiles = ceil_div(x.columns, kGramTile);
  TINYCOMP_LAUNCH((gram_kernel<T, G>), dim3(tiles, tiles), dim3(kGramThreads), 0, device.stream, x.data, x.stride,
                  static_cast<G*>(gram.mutable_data_ptr()), gram.stride(0), gram.stride(1), x.rows, x.columns);
  device.check_launch();
}

template <class T, class Tile>
void launch_gram_tiles(const Device& device, const Rows<T>& x, const Tensor& gram) {
  const unsigned tiles = ceil_div(x.columns, Tile::kM);
  allow_shared_memory(gram_tiles<T, Tile>, Tile::kSharedBytes);
  TINYCOMP_LAUNCH((gram_tiles<T, Tile>), dim3(tiles, tiles), dim3(Tile::kThreads), Tile::kSharedBytes, device.stream,
                  x.data, x.stride, x.vector, static_cast<float*>(gram.mutable_data_ptr()), gram.stride(0),
                  gram.stride(1), x.rows, x.columns);
  device.check_launch();
}

void gram_accumulate_(Tensor gram, const Tensor& x) {
  const Device device(gram);
  STD_TORCH_CHECK(
      x.dim() >= 1 && gram.dim() == 2 && gram.size(0) == gram.size(1) && gram.size(0) == x.size(x.dim() - 1),
      "gram_accumulate_: shapes do not fit");
  with_float_type(x.scalar_type(), "gram_accumulate_", [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows(x, -1, "gram_accumulate_: x");
    if (rows.rows == 0 || rows.columns == 0) return;
    if (gram.scalar_type() == ScalarType::Double) return launch_gram<T, double>(device, rows, gram);
    STD_TORCH_CHECK(gram.scalar_type() == ScalarType::Float, "gram_accumulate_: dtype of gram is not supported");
    if constexpr (sizeof(T) == 4) {
      launch_gram<T, float>(device, rows, gram);
    } else {
      // Large tiles want a block for every processor.
      const int64_t large = ceil_div(rows.columns, LargeTile::kM);
      large*(large + 1) / 2 < device.processors ? launch_gram_tiles<T, SmallTile>(device, rows, gram)
                                                : launch_gram_tiles<T, LargeTile>(device, rows, gram);
    }
  });
}

TINYCOMP_CUDA_KERNEL(gram_accumulate_, gram_accumulate_)

}  // namespace tinycomp::cuda
#endif
