// split_bregman_step_: one pass over all state, every number read and written once.
#include "../common/linear.h"

namespace tinycomp {
namespace {

struct Numbers {
  double lr, kappa, nu, threshold, beta;
};

// The arithmetic of the reference, operation by operation.
template <class T, bool coupled, bool nonnegative, bool momentum>
void step_range(T* __restrict mask, T* __restrict dual, T* __restrict gamma, int32_t* __restrict entry,
                const T* __restrict grad, T* __restrict velocity, int32_t step, const Numbers& by, int64_t first,
                int64_t last) {
  const T lr = static_cast<T>(by.lr), kappa = static_cast<T>(by.kappa), nu = static_cast<T>(by.nu);
  const T threshold = static_cast<T>(by.threshold), beta = static_cast<T>(by.beta);
  const T pull = static_cast<T>(by.kappa * by.lr);
  for (int64_t i = first; i < last; ++i) {
    T direction = grad[i];
    if constexpr (momentum) velocity[i] = direction = velocity[i] * beta + direction;
    T gap = (mask[i] - gamma[i]) / nu;
    if constexpr (coupled) {
      mask[i] -= pull * (direction + gap);
    } else {
      mask[i] -= lr * direction;
      gap = (mask[i] - gamma[i]) / nu;
    }
    const T raised = dual[i] + lr * gap;
    dual[i] = raised;
    const T size = std::fabs(raised) - threshold;
    T shrunk = size > 0 ? kappa * (raised < 0 ? -size : size) : T(0);
    if constexpr (nonnegative) shrunk = shrunk > 0 ? shrunk : T(0);
    // NaN must show in the twin as it does in the reference.
    gamma[i] = raised == raised ? shrunk : raised;
    entry[i] = (entry[i] < 0) & (gamma[i] != 0) ? step : entry[i];
  }
}

template <class T, bool... chosen>
void choose(const std::vector<bool>& flags, T* mask, T* dual, T* gamma, int32_t* entry, const T* grad, T* velocity,
            int32_t step, const Numbers& by, int64_t first, int64_t last) {
  if constexpr (sizeof...(chosen) == 3) {
    step_range<T, chosen...>(mask, dual, gamma, entry, grad, velocity, step, by, first, last);
  } else if (flags[sizeof...(chosen)]) {
    choose<T, chosen..., true>(flags, mask, dual, gamma, entry, grad, velocity, step, by, first, last);
  } else {
    choose<T, chosen..., false>(flags, mask, dual, gamma, entry, grad, velocity, step, by, first, last);
  }
}

// A tensor that is worked on in a contiguous copy where it is not contiguous, and written back.
class Dense {
 public:
  explicit Dense(const Tensor& t) : original_(t), copy_(torch::stable::contiguous(t)) {}
  void* data() const { return copy_.mutable_data_ptr(); }
  void write_back() {
    if (!original_.is_contiguous()) torch::stable::copy_(original_, copy_);
  }

 private:
  Tensor original_, copy_;
};

void split_bregman_step_(Tensor mask, Tensor dual, Tensor gamma, Tensor entry, const Tensor& grad,
                         std::optional<Tensor> momentum, int64_t step, double lr, double kappa, double nu,
                         double threshold, double beta, bool coupled, bool nonnegative) {
  const ScalarType type = mask.scalar_type();
  auto same = [&](const Tensor& t, ScalarType wanted) {
    bool fits = t.dim() == mask.dim() && t.scalar_type() == wanted;
    for (int64_t d = 0; fits && d < mask.dim(); ++d) fits = t.size(d) == mask.size(d);
    STD_TORCH_CHECK(fits, "split_bregman_step_: shapes or dtypes differ");
  };
  same(dual, type), same(gamma, type), same(grad, type);
  same(entry, ScalarType::Int);
  if (momentum) same(*momentum, type);
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::Double) && lr > 0 && kappa > 0 && nu > 0 &&
                      threshold >= 0 && beta >= 0 && beta < 1 && step >= 0,
                  "split_bregman_step_: dtype or a number is not allowed");
  Dense state[] = {Dense(mask), Dense(dual), Dense(gamma), Dense(entry), Dense(momentum.value_or(mask))};
  const Tensor direction = torch::stable::contiguous(grad);
  const std::vector<bool> flags = {coupled, nonnegative, momentum.has_value()};
  const Numbers by{lr, kappa, nu, threshold, beta};
  auto run = [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, mask.numel(), 32768, [&](int64_t first, int64_t last) {
      choose<T>(flags, static_cast<T*>(state[0].data()), static_cast<T*>(state[1].data()),
                static_cast<T*>(state[2].data()), static_cast<int32_t*>(state[3].data()),
                static_cast<const T*>(direction.const_data_ptr()), static_cast<T*>(state[4].data()),
                static_cast<int32_t>(step), by, first, last);
    });
  };
  type == ScalarType::Float ? run(float{}) : run(double{});
  for (int i = 0; i < 4 + (momentum ? 1 : 0); ++i) state[i].write_back();
}

TINYCOMP_CPU_KERNEL(split_bregman_step_, split_bregman_step_)

}  // namespace
}  // namespace tinycomp
