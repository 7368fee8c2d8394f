// kmeans_update: a block owns a cluster and 128 columns, and adds its members in the order of the points.
#include "weights.cuh"

namespace tinycomp::cuda {

constexpr int kUpdateThreads = 128;

template <class T>
__global__ void __launch_bounds__(kUpdateThreads)
    kmeans_update_kernel(const T* points, int64_t stride, const void* labels, int label_bytes, T* centroids,
                         int64_t* counts, int count, int depth) {
  __shared__ int chunk[kUpdateThreads];
  const int cluster = blockIdx.x, column = blockIdx.y * kUpdateThreads + threadIdx.x;
  float sum = 0.f;
  int64_t members = 0;
  for (int start = 0; start < count; start += kUpdateThreads) {
    const int own = start + threadIdx.x, size = min(kUpdateThreads, count - start);
    chunk[threadIdx.x] = own < count ? label_at(labels, label_bytes, own) : -1;
    __syncthreads();
    for (int i = 0; i < size; ++i) {
      if (chunk[i] != cluster) continue;
      ++members;
      if (column < depth) sum += to_float(points[(start + i) * stride + column]);
    }
    __syncthreads();
  }
  if (column < depth)
    centroids[static_cast<int64_t>(cluster) * depth + column] = from_float<T>(sum / (members ? members : 1));
  if (blockIdx.y == 0 && threadIdx.x == 0) counts[cluster] = members;
}

}  // namespace tinycomp::cuda

#if defined(TINYCOMP_TORCH)
#include "host.cuh"

namespace tinycomp::cuda {

std::tuple<Tensor, Tensor> kmeans_update(const Tensor& points, const Tensor& labels, int64_t k) {
  STD_TORCH_CHECK(points.dim() == 2 && labels.dim() == 1 && labels.size(0) == points.size(0) && k >= 1,
                  "kmeans_update: shapes do not fit");
  const Device device(points);
  const Tensor centroids = empty(points, {k, points.size(1)}, points.scalar_type()),
               counts = empty(points, {k}, ScalarType::Long), label = adjacent(labels);
  with_float_type(points.scalar_type(), "kmeans_update", [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> x(points, -1, "kmeans_update: points");
    const unsigned columns = (x.columns + kUpdateThreads - 1) / kUpdateThreads;
    TINYCOMP_LAUNCH((kmeans_update_kernel<T>), dim3(to_int(k, "kmeans_update: k"), columns ? columns : 1),
                    dim3(kUpdateThreads), 0, device.stream, x.data, x.stride, label.const_data_ptr(),
                    static_cast<int>(label.element_size()), static_cast<T*>(centroids.mutable_data_ptr()),
                    static_cast<int64_t*>(counts.mutable_data_ptr()), x.rows, x.columns);
    device.check_launch();
  });
  return {centroids, counts};
}

TINYCOMP_CUDA_KERNEL(kmeans_update, kmeans_update)

}  // namespace tinycomp::cuda
#endif
