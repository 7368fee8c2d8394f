// split_bregman_step_: one pass over masks, dual variable and sparse twin.
#include "ptx.cuh"

namespace tinycomp::cuda {

constexpr int kStepThreads = 256;

__global__ void __launch_bounds__(kStepThreads)
    split_bregman_kernel(float* mask, float* dual, float* gamma, int* entry, const float* grad, float* momentum,
                         int64_t count, int step, float lr, float kappa, float nu, float threshold, float beta,
                         int coupled, int nonnegative) {
  const int64_t step_size = static_cast<int64_t>(gridDim.x) * kStepThreads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kStepThreads) + threadIdx.x; i < count; i += step_size) {
    float direction = grad[i];
    if (momentum) momentum[i] = direction = beta * momentum[i] + direction;
    float m = mask[i], gap = (m - gamma[i]) / nu;
    if (coupled) {
      m -= kappa * lr * (direction + gap);
    } else {
      m -= lr * direction;
      gap = (m - gamma[i]) / nu;
    }
    const float v = dual[i] + lr * gap, size = max(fabsf(v) - threshold, 0.f);
    float g = v > 0.f ? kappa * size : v < 0.f ? -kappa * size : 0.f;
    if (nonnegative) g = max(g, 0.f);
    mask[i] = m, dual[i] = v, gamma[i] = g;
    if (entry[i] < 0 && g != 0.f) entry[i] = step;
  }
}

}  // namespace tinycomp::cuda

#if defined(TINYCOMP_TORCH)
#include "host.cuh"

namespace tinycomp::cuda {

// A tensor of any layout as adjacent numbers; what was written to a copy goes back at the end.
template <class T>
struct InPlace {
  Tensor original, flat;
  bool copied;
  InPlace(const Tensor& t, ScalarType type, const Tensor& like)
      : original(t), flat(torch::stable::contiguous(t)), copied(!t.is_contiguous()) {
    STD_TORCH_CHECK(t.scalar_type() == type && t.numel() == like.numel(),
                    "split_bregman_step_: shapes or dtypes differ");
  }
  T* data() { return static_cast<T*>(flat.mutable_data_ptr()); }
  void finish() {
    if (copied) torch::stable::copy_(original, flat);
  }
};

void split_bregman_step_(Tensor mask, Tensor dual, std::optional<Tensor> gamma, Tensor entry, const Tensor& grad,
                         std::optional<Tensor> momentum, int64_t step, double lr, double kappa, double nu,
                         double threshold, double beta, bool coupled, bool nonnegative, std::optional<Tensor> second,
                         double, double, int64_t group_size, std::optional<Tensor> support) {
  STD_TORCH_CHECK(gamma && !second && group_size == 0 && !support, "split_bregman_step_: not in this kernel");
  const Device device(mask);
  const int64_t count = mask.numel();
  if (count == 0) return;
  InPlace<float> m(mask, ScalarType::Float, mask), v(dual, ScalarType::Float, mask), g(*gamma, ScalarType::Float, mask);
  InPlace<int> e(entry, ScalarType::Int, mask);
  InPlace<float> direction(grad, ScalarType::Float, mask);
  std::optional<InPlace<float>> buffer;
  if (momentum) buffer.emplace(*momentum, ScalarType::Float, mask);
  const int64_t blocks = (count + kStepThreads - 1) / kStepThreads, most = 8 * device.processors;
  TINYCOMP_LAUNCH(split_bregman_kernel, dim3(blocks < most ? blocks : most), dim3(kStepThreads), 0, device.stream,
                  m.data(), v.data(), g.data(), e.data(), direction.data(), buffer ? buffer->data() : nullptr, count,
                  static_cast<int>(step), static_cast<float>(lr), static_cast<float>(kappa), static_cast<float>(nu),
                  static_cast<float>(threshold), static_cast<float>(beta), int(coupled), int(nonnegative));
  device.check_launch();
  m.finish(), v.finish(), g.finish(), e.finish();
  if (buffer) buffer->finish();
}

TINYCOMP_CUDA_KERNEL(split_bregman_step_, split_bregman_step_)

}  // namespace tinycomp::cuda
#endif
