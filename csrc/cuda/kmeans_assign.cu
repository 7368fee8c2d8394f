// kmeans_assign: 64 points per block against tiles of 64 centroids, in float32; then the distance from the difference.
#include "ptx.cuh"

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
#pragma unroll
    for (int offset = 8; offset; offset /= 2) {
      const float score = __shfl_xor_sync(~0u, best[i], offset);
      const int other = __shfl_xor_sync(~0u, label[i], offset);
      keep_lower(best[i], label[i], score, other);
    }
    if (j0 == 0) chosen[i0 + i] = label[i];
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < kAssignTile; i += kAssignThreads / 32) {
    const int64_t point = first + i;
    if (point >= count) break;
    const T *p = points + point * p_stride, *c = centroids + chosen[i] * c_stride;
    float sum = 0.f;
    for (int k = lane; k < depth; k += 32) {
      const float difference = to_float(p[k]) - to_float(c[k]);
      sum += difference * difference;
    }
#pragma unroll
    for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (lane == 0) labels[point] = chosen[i], distances[point] = sum;
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
    TINYCOMP_LAUNCH((kmeans_assign_kernel<T>), dim3((x.rows + kAssignTile - 1) / kAssignTile), dim3(kAssignThreads), 0,
                    device.stream, x.data, x.stride, mu.data, mu.stride, static_cast<int*>(labels.mutable_data_ptr()),
                    static_cast<float*>(distances.mutable_data_ptr()), x.rows, mu.rows, x.columns);
    device.check_launch();
  });
  return {labels, distances};
}

TINYCOMP_CUDA_KERNEL(kmeans_assign, kmeans_assign)

}  // namespace tinycomp::cuda
#endif
