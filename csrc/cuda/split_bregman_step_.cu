// split_bregman_step_: one pass over masks, dual variable and sparse twin; two where units enter in groups.
#include "ptx.cuh"

namespace tinycomp::cuda {

constexpr int kStepThreads = 256, kStepWarps = kStepThreads / 32;

// The sparse twin of v. factor: of its group, kappa max(1 - threshold / |V|, 0); unused for a unit by itself.
template <bool kGroups>
__device__ __forceinline__ float twin_of(float v, float factor, float kappa, float threshold, int nonnegative) {
  if constexpr (kGroups) return (nonnegative ? max(v, 0.f) : v) * factor;
  const float size = max(fabsf(v) - threshold, 0.f);
  const float twin = v > 0.f ? kappa * size : v < 0.f ? -kappa * size : 0.f;
  return nonnegative ? max(twin, 0.f) : twin;
}

// factors[g] of the groups of units first..end, by one warp; others may read them after it.
__device__ __forceinline__ void group_factors(const float* dual, int64_t first, int64_t end, int group, float kappa,
                                              float threshold, int nonnegative, float* factors) {
  const int lane = threadIdx.x % 32;
  __syncwarp();
  for (int g = 0; first + static_cast<int64_t>(g) * group < end; ++g) {
    float sum = 0.f;
    for (int i = lane; i < group; i += 32) {
      const float v = dual[first + static_cast<int64_t>(g) * group + i];
      if (!nonnegative || v > 0.f) sum += v * v;
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    const float norm = sqrtf(sum);
    if (lane == 0) factors[g] = norm <= threshold ? 0.f : kappa * (1.f - threshold / norm);
  }
  __syncwarp();
}

// A warp takes `chunk` units at a time: whole groups (at most eight of them) and whole bytes of the support.
// direction: momentum = beta momentum + mix grad, and with second (Adam) divided by its corrected root.
template <bool kGroups>
__global__ void __launch_bounds__(kStepThreads, 4)
    split_bregman_kernel(float* mask, float* dual, float* gamma, int* entry, const float* grad, float* momentum,
                         float* second, uint8_t* support, int64_t count, int64_t chunk, int group, int step, float lr,
                         float kappa, float nu, float threshold, float beta, float mix, float first_correction,
                         float beta2, float mix2, float second_correction, float eps, int coupled, int nonnegative) {
  __shared__ float factors[kStepWarps][8];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto twin = [&](float v, int64_t unit) {
    return twin_of<kGroups>(v, kGroups ? factors[warp][unit / group] : 0.f, kappa, threshold, nonnegative);
  };
  const auto move = [&](int64_t i, int64_t unit) {
    float direction = grad[i];
    if (momentum) momentum[i] = direction = beta * momentum[i] + mix * direction;
    if (second) {
      const float squares = second[i] = beta2 * second[i] + mix2 * grad[i] * grad[i];
      direction = direction * first_correction / (sqrtf(squares * second_correction) + eps);
    }
    const float v = dual[i], g = gamma ? gamma[i] : twin(v, unit);
    float m = mask[i], gap = (m - g) / nu;
    if (coupled) {
      m -= kappa * lr * (direction + gap);
    } else {
      m -= lr * direction;
      gap = (m - g) / nu;
    }
    mask[i] = m;
    return dual[i] = v + lr * gap;
  };
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kStepWarps;
  for (int64_t first = (blockIdx.x * static_cast<int64_t>(kStepWarps) + warp) * chunk; first < count;
       first += warps * chunk) {
    const int64_t end = min(first + chunk, count);
    if constexpr (kGroups) {
      if (!gamma) group_factors(dual, first, end, group, kappa, threshold, nonnegative, factors[warp]);
      for (int64_t i = first + lane; i < end; i += 32) move(i, i - first);
      group_factors(dual, first, end, group, kappa, threshold, nonnegative, factors[warp]);
    }
    // All lanes stay until the last: a byte of the support is of eight of them.
    for (int64_t base = first; base < end; base += 32) {
      const int64_t i = base + lane;
      bool inside = false;
      if (i < end) {
        const float g = twin(kGroups ? dual[i] : move(i, i - first), i - first);
        inside = g != 0.f;
        if (gamma) gamma[i] = g;
        if (entry[i] < 0 && inside) entry[i] = step;
      }
      const unsigned bits = __ballot_sync(~0u, inside);
      if (support && lane % 8 == 0 && i < end) support[i / 8] = static_cast<uint8_t>(bits >> lane);
    }
  }
}

}  // namespace tinycomp::cuda

#if defined(TINYCOMP_TORCH)
#include <cmath>

#include "config.h"
#include "host.cuh"

namespace tinycomp::cuda {

// A tensor of any layout as adjacent numbers; what was written to a copy goes back at the end.
template <class T>
struct InPlace {
  Tensor original, flat;
  bool copied;
  InPlace(const Tensor& t, ScalarType type, const Tensor& like)
      : original(t), flat(adjacent(t)), copied(!t.is_contiguous()) {
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
                         double beta2, double eps, int64_t group_size, std::optional<Tensor> support) {
  const Device device(mask);
  const int64_t count = mask.numel();
  STD_TORCH_CHECK(group_size >= 0 && (group_size == 0 || count % group_size == 0) && (!second || momentum) &&
                      (!support || support->numel() == (count + 7) / 8),
                  "split_bregman_step_: group_size, second or support do not fit");
  if (count == 0) return;
  using Floats = InPlace<float>;
  const auto optional = [&](const std::optional<Tensor>& t) {
    return t ? std::optional<Floats>(Floats(*t, ScalarType::Float, mask)) : std::nullopt;
  };
  Floats m(mask, ScalarType::Float, mask), v(dual, ScalarType::Float, mask), direction(grad, ScalarType::Float, mask);
  InPlace<int> e(entry, ScalarType::Int, mask);
  std::optional<Floats> g = optional(gamma), buffer = optional(momentum), squares = optional(second);
  std::optional<InPlace<uint8_t>> bits;
  if (support) bits.emplace(*support, ScalarType::Byte, *support);
  const int group = to_int(group_size, "split_bregman_step_: group_size");
  int groups_per_chunk = 8;  // the fewest that fill whole bytes
  while (groups_per_chunk > 1 && group * static_cast<int64_t>(groups_per_chunk / 2) % 8 == 0) groups_per_chunk /= 2;
  const int64_t chunk = group ? group * static_cast<int64_t>(groups_per_chunk) : 32;
  const int64_t blocks = ceil_div(count, kStepWarps * chunk), most = 8 * device.processors;
  const double after = static_cast<double>(step) + 1;
  TINYCOMP_LAUNCH(
      (group ? split_bregman_kernel<true> : split_bregman_kernel<false>), dim3(blocks < most ? blocks : most),
      dim3(kStepThreads), 0, device.stream, m.data(), v.data(), g ? g->data() : nullptr, e.data(), direction.data(),
      buffer ? buffer->data() : nullptr, squares ? squares->data() : nullptr, bits ? bits->data() : nullptr, count,
      chunk, group, static_cast<int>(step), static_cast<float>(lr), static_cast<float>(kappa), static_cast<float>(nu),
      static_cast<float>(threshold), static_cast<float>(beta), static_cast<float>(second ? 1 - beta : 1),
      static_cast<float>(1 / (1 - std::pow(beta, after))), static_cast<float>(beta2), static_cast<float>(1 - beta2),
      static_cast<float>(1 / (1 - std::pow(beta2, after))), static_cast<float>(eps), int(coupled), int(nonnegative));
  device.check_launch();
  m.finish(), v.finish(), e.finish();
  for (auto* t : {&g, &buffer, &squares})
    if (*t) (*t)->finish();
  if (bits) bits->finish();
}

TINYCOMP_CUDA_KERNEL(split_bregman_step_, split_bregman_step_)

}  // namespace tinycomp::cuda
#endif
