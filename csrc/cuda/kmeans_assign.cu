// kmeans_assign: 64 points per block against tiles of 64 centroids, in float32; then the distance from the difference.
//
// The dot products of 16-bit points run on tensor cores, which sum their exact products in float32. Those of float32
// points take FMA: with the digits that TF32 keeps, a point between two centroids would get the wrong label.
#include "gemm.cuh"

namespace tinycomp::cuda {

constexpr int kAssignTile = 64, kAssignDepth = 16, kAssignThreads = 256;

template <class T>
__device__ __forceinline__ void load_transposed(const T* from, int64_t stride, int rows, int columns, int first_row,
                                                int column, float (&to)[kAssignDepth][kAssignTile + 1]) {
  for (int i = threadIdx.x; i < kAssignDepth * kAssignTile; i += kAssignThreads) {
    const int64_t row = first_row + i / kAssignDepth;
    const int k = i % kAssignDepth;
    const bool inside = row < rows && column + k < columns;
    to[k][i / kAssignDepth] = inside ? to_float(from[row * stride + column + k]) : 0.f;
  }
}

// The lower score wins, the lower label on a tie.
__device__ __forceinline__ void keep_lower(float& score, int& label, float other, int other_label) {
  if (other < score || (other == score && other_label < label)) score = other, label = other_label;
}

// The lowest of `kLanes` adjacent lanes, in all of them.
template <int kLanes>
__device__ __forceinline__ void keep_lowest_of_lanes(float& score, int& label) {
#pragma unroll
  for (int offset = kLanes / 2; offset; offset /= 2) {
    const float other = __shfl_xor_sync(~0u, score, offset);
    const int other_label = __shfl_xor_sync(~0u, label, offset);
    keep_lower(score, label, other, other_label);
  }
}

// |p - c|², by a warp.
template <class T>
__device__ __forceinline__ float squared_distance(const T* p, const T* c, int depth) {
  float sum = 0.f;
  for (int k = threadIdx.x % 32; k < depth; k += 32) {
    const float difference = to_float(p[k]) - to_float(c[k]);
    sum += difference * difference;
  }
#pragma unroll
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kAssignThreads)
    kmeans_assign_kernel(const T* points, int64_t p_stride, const T* centroids, int64_t c_stride, int* labels,
                         float* distances, int count, int clusters, int depth) {
  __shared__ float x[kAssignDepth][kAssignTile + 1], mu[kAssignDepth][kAssignTile + 1];
  __shared__ int chosen[kAssignTile];
  const int first = blockIdx.x * kAssignTile, i0 = threadIdx.x / 16 * 4, j0 = threadIdx.x % 16 * 4;
  float best[4];
  int label[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) best[i] = INFINITY, label[i] = clusters - 1;
  for (int c = 0; c < clusters; c += kAssignTile) {
    float dots[4][4] = {}, sizes[4] = {};
    for (int k = 0; k < depth; k += kAssignDepth) {
      load_transposed(points, p_stride, count, depth, first, k, x);
      load_transposed(centroids, c_stride, clusters, depth, c, k, mu);
      __syncthreads();
#pragma unroll 4
      for (int d = 0; d < kAssignDepth; ++d)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float m = mu[d][j0 + j];
          sizes[j] += m * m;
#pragma unroll
          for (int i = 0; i < 4; ++i) dots[i][j] += x[d][i0 + i] * m;
        }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (c + j0 + j < clusters) keep_lower(best[i], label[i], sizes[j] - 2.f * dots[i][j], c + j0 + j);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    keep_lowest_of_lanes<16>(best[i], label[i]);
    if (j0 == 0) chosen[i0 + i] = label[i];
  }
  __syncthreads();
  for (int i = threadIdx.x / 32; i < kAssignTile; i += kAssignThreads / 32) {
    const int64_t point = first + i;
    if (point >= count) break;
    const float distance = squared_distance(points + point * p_stride, centroids + chosen[i] * c_stride, depth);
    if (threadIdx.x % 32 == 0) labels[point] = chosen[i], distances[point] = distance;
  }
}

// A stage holds 64 numbers of the points and of one tile of centroids; a tile takes as many stages as its depth.
template <class T>
__global__ void __launch_bounds__(SmallTile::kThreads, 3)
    kmeans_assign_tiles(const T* points, int64_t p_stride, int p_vector, const T* centroids, int64_t c_stride,
                        int c_vector, int* labels, float* distances, int count, int clusters, int depth) {
  using Tile = SmallTile;
  constexpr int kTilesM = Tile::kM / Tile::kWarpsM / 16, kTilesN = Tile::kN / Tile::kWarpsN / 8;
  constexpr int kStages = Tile::kStages, kColumns = Tile::kRowBytes / sizeof(T),
                kSideBytes = Tile::kM * Tile::kRowBytes;
  static_assert(Tile::kM == Tile::kN && Tile::kThreads == 2 * Tile::kN && kColumns == 64);
  TINYCOMP_SHARED_MEMORY(char, shared);
  __shared__ float sizes[Tile::kN], scores[Tile::kWarpsN][Tile::kM];
  __shared__ int chosen[Tile::kWarpsN][Tile::kM];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = blockIdx.x * Tile::kM;
  const int m0 = warp / Tile::kWarpsN * 16 * kTilesM + lane / 4;
  const int n0 = warp % Tile::kWarpsN * 8 * kTilesN + lane % 4 * 2;
  const Matrix<T> x{points, p_stride, p_vector != 0}, mu{centroids, c_stride, c_vector != 0};
  const int per_tile = max((depth + kColumns - 1) / kColumns, 1);
  const int steps = per_tile * ((clusters + Tile::kN - 1) / Tile::kN);
  auto stage = [&](int step) {
    char* at = shared + step % kStages * 2 * kSideBytes;
    if (step < steps) {
      const int column = step % per_tile * kColumns;
      stage_rows<T, Tile::kM, Tile::kThreads>(x, count, depth, first, column, at);
      stage_rows<T, Tile::kN, Tile::kThreads>(mu, clusters, depth, step / per_tile * Tile::kN, column, at + kSideBytes);
    }
    ptx::commit_copies();
  };
  // Of point m0 + 16 i + 8 h.
  float best[kTilesM][2];
  int label[kTilesM][2];
#pragma unroll
  for (int i = 0; i < kTilesM; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) best[i][h] = INFINITY, label[i][h] = clusters - 1;
  float dots[kTilesM][kTilesN][4] = {}, size = 0.f;
  run_steps<kStages>(steps, stage, [&](int step) {
    const char* at = shared + step % kStages * 2 * kSideBytes;
    add_products(dots, [&](auto& products) { multiply_stage<T, Tile>(at, at + kSideBytes, products); });
    // Two threads square a centroid.
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int chunk = threadIdx.x % 2 * 4 + c;
      const auto v = *reinterpret_cast<const Eight<T>*>(at + kSideBytes + swizzled(threadIdx.x / 2, chunk));
#pragma unroll
      for (int e = 0; e < 8; ++e) size += to_float(v.at[e]) * to_float(v.at[e]);
    }
    if ((step + 1) % per_tile) return;
    size += __shfl_xor_sync(~0u, size, 1);
    sizes[threadIdx.x / 2] = size;
    size = 0.f;
    __syncthreads();
    const int c0 = step / per_tile * Tile::kN + n0;
#pragma unroll
    for (int j = 0; j < kTilesN; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = c0 + 8 * j + e;
        const float square = sizes[n0 + 8 * j + e];
#pragma unroll
        for (int i = 0; i < kTilesM; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& dot = dots[i][j][2 * h + e];
            if (c < clusters) keep_lower(best[i][h], label[i][h], square - 2.f * dot, c);
            dot = 0.f;
          }
      }
  });
  ptx::wait_copies<0>();
#pragma unroll
  for (int i = 0; i < kTilesM; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      keep_lowest_of_lanes<4>(best[i][h], label[i][h]);
      const int w = warp % Tile::kWarpsN, m = m0 + 16 * i + 8 * h;
      if (lane % 4 == 0) scores[w][m] = best[i][h], chosen[w][m] = label[i][h];
    }
  __syncthreads();
  for (int i = warp; i < Tile::kM; i += Tile::kThreads / 32) {
    const int64_t point = first + i;
    if (point >= count) break;
    float score = scores[0][i];
    int nearest = chosen[0][i];
    for (int w = 1; w < Tile::kWarpsN; ++w) keep_lower(score, nearest, scores[w][i], chosen[w][i]);
    const float distance = squared_distance(points + point * p_stride, centroids + nearest * c_stride, depth);
    if (lane == 0) labels[point] = nearest, distances[point] = distance;
  }
}

}  // namespace tinycomp::cuda

#if defined(TINYCOMP_TORCH)
#include "host.cuh"

namespace tinycomp::cuda {

std::tuple<Tensor, Tensor> kmeans_assign(const Tensor& points, const Tensor& centroids) {
  STD_TORCH_CHECK(points.dim() == 2 && centroids.dim() == 2 && centroids.size(0) > 0,
                  "kmeans_assign: shapes do not fit");
  const Device device(points);
  const Tensor labels = empty(points, {points.size(0)}, ScalarType::Int),
               distances = empty(points, {points.size(0)}, ScalarType::Float);
  with_float_type(points.scalar_type(), "kmeans_assign", [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> x(points, -1, "kmeans_assign: points"), mu(centroids, x.columns, "kmeans_assign: centroids");
    if (x.rows == 0) return;
    auto* label = static_cast<int*>(labels.mutable_data_ptr());
    auto* distance = static_cast<float*>(distances.mutable_data_ptr());
    const dim3 blocks(ceil_div(x.rows, kAssignTile));
    if constexpr (sizeof(T) == 4) {
      TINYCOMP_LAUNCH((kmeans_assign_kernel<T>), blocks, dim3(kAssignThreads), 0, device.stream, x.data, x.stride,
                      mu.data, mu.stride, label, distance, x.rows, mu.rows, x.columns);
    } else {
      static_assert(SmallTile::kM == kAssignTile);
      allow_shared_memory(kmeans_assign_tiles<T>, SmallTile::kSharedBytes);
      TINYCOMP_LAUNCH((kmeans_assign_tiles<T>), blocks, dim3(SmallTile::kThreads), SmallTile::kSharedBytes,
                      device.stream, x.data, x.stride, x.vector, mu.data, mu.stride, mu.vector, label, distance, x.rows,
                      mu.rows, x.columns);
    }
    device.check_launch();
  });
  return {labels, distances};
}

TINYCOMP_CUDA_KERNEL(kmeans_assign, kmeans_assign)

}  // namespace tinycomp::cuda
#endif
