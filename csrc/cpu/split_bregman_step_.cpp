// split_bregman_step_: one pass over all state in blocks that stay in the nearest cache, every number of it read and
// written once.
#include <limits>

#include "../common/lanes.h"
#include "../common/linear.h"

namespace tinycomp {
namespace {

constexpr int64_t kBlock = 1024, kPiece = 128, kAhead = 384;

struct Numbers {
  double lr, kappa, nu, threshold, beta, beta2, eps;
  int64_t step, group;
  bool nonnegative;
};

template <class T>
struct State {
  T *mask, *dual, *gamma;
  int32_t* entry;
  const T* grad;
  T *momentum, *second;
  uint8_t* support;
};

// One number of the proximal map of the l1 penalty. Written so that NaN shows in the twin, and without branches.
template <class T>
T shrunk(T v, T kappa, T threshold, T floor) {
  const T size = std::fabs(v) - threshold;
  const T made = kappa * std::copysign(size <= 0 ? T(0) : size, v);
  return made < floor ? floor : made;
}

template <class T>
T floor_of(const Numbers& by) {
  return by.nonnegative ? T(0) : -std::numeric_limits<T>::infinity();
}

// The proximal map of the group penalty.
template <class T>
void shrink_groups(const T* __restrict v, T* __restrict twin, int64_t n, const Numbers& by) {
  const T kappa = static_cast<T>(by.kappa), threshold = static_cast<T>(by.threshold), floor = floor_of<T>(by);
  for (int64_t start = 0; start < n; start += by.group) {
    const T* __restrict from = v + start;
    const T norm = std::sqrt(lane_sum<T>(by.group, [&](int64_t i) {
      const T part = from[i] < floor ? floor : from[i];
      return part * part;
    }));
    const T scale = norm <= threshold ? T(0) : kappa * (1 - threshold / norm);
    for (int64_t i = 0; i < by.group; ++i) twin[start + i] = (from[i] < floor ? floor : from[i]) * scale;
  }
}

// What the masks move against: the gradient, its running mean, or Adam's quotient.
template <class T>
const T* direction(const State<T>& at, int64_t first, int64_t n, const Numbers& by, T* __restrict scratch) {
  const T* __restrict grad = at.grad + first;
  if (!at.momentum) return grad;
  T* __restrict mean = at.momentum + first;
  const T beta = static_cast<T>(by.beta);
  if (!at.second) {
    for (int64_t i = 0; i < n; ++i) mean[i] = mean[i] * beta + grad[i];
    return mean;
  }
  T* __restrict square = at.second + first;
  const T beta2 = static_cast<T>(by.beta2), eps = static_cast<T>(by.eps);
  const T rest = static_cast<T>(1 - by.beta), rest2 = static_cast<T>(1 - by.beta2);
  const double count = static_cast<double>(by.step + 1);
  const T seen = static_cast<T>(1 - std::pow(by.beta, count)), seen2 = static_cast<T>(1 - std::pow(by.beta2, count));
  for (int64_t i = 0; i < n; ++i) {
    mean[i] = mean[i] * beta + rest * grad[i];
    square[i] = square[i] * beta2 + rest2 * grad[i] * grad[i];
    scratch[i] = mean[i] / seen / (std::sqrt(square[i] / seen2) + eps);
  }
  return scratch;
}

// Mask and dual of one unit.
template <class T, bool coupled>
void move(T& mask, T& dual, T twin, T along, T lr, T weak, T pull) {
  T gap = (mask - twin) * weak;
  if constexpr (coupled) {
    mask -= pull * (along + gap);
  } else {
    mask -= lr * along;
    gap = (mask - twin) * weak;
  }
  dual += lr * gap;
}

// All of the step but the direction; inside: whether each unit is in the support, not written if none is: the result.
// Where a piece has nothing in it and had nothing, its twin is not written and its entry not even read, and where
// nothing new has entered entry is not written: early on a path that is a third of the traffic, later a ninth.
template <class T, bool coupled, bool stored>
bool advance(T* __restrict mask, T* __restrict dual, T* __restrict twin, int32_t* __restrict entry,
             uint8_t* __restrict inside, const T* __restrict along, int64_t n, const Numbers& by) {
  const T lr = static_cast<T>(by.lr), weak = static_cast<T>(1 / by.nu), pull = static_cast<T>(by.kappa * by.lr);
  const T kappa = static_cast<T>(by.kappa), threshold = static_cast<T>(by.threshold), floor = floor_of<T>(by);
  const int32_t step = static_cast<int32_t>(by.step);
  bool any = false;
  T made[kPiece];
  for (int64_t start = 0; start < n; start += kPiece) {
    const int64_t count = std::min(kPiece, n - start);
    // Four or five streams of few numbers for as many operations: memory is asked for what comes kAhead later.
    const auto ask = [&](const T* from) {
      for (int64_t k = 0; k < kPiece; k += 64 / sizeof(T)) __builtin_prefetch(from + start + kAhead + k, 0, 2);
    };
    ask(mask), ask(dual), ask(along);
    if constexpr (stored) ask(twin);
    int32_t some = 0;
#pragma GCC ivdep  // too many arrays to check for overlap; they are the caller's separate tensors
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = start + k;
      T old;
      if constexpr (stored)
        old = twin[i];
      else
        old = shrunk(dual[i], kappa, threshold, floor);
      move<T, coupled>(mask[i], dual[i], old, along[i], lr, weak, pull);
      made[k] = shrunk(dual[i], kappa, threshold, floor);
      some |= (made[k] != 0) | (stored && old != 0);
    }
    if (!some) {
      if (any) std::fill_n(inside + start, count, uint8_t{0});
      continue;
    }
    if (!any) std::fill_n(inside, start, uint8_t{0});
    any = true;
    int32_t entered = 0;
#pragma GCC ivdep
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = start + k;
      if constexpr (stored) twin[i] = made[k];
      entered |= (entry[i] < 0) & (made[k] != 0);
      inside[i] = made[k] != 0;
    }
    for (int64_t i = start; entered && i < start + count; ++i)
      entry[i] = (entry[i] < 0) & (made[i - start] != 0) ? step : entry[i];
  }
  return any;
}

// The same with groups, in passes over a block that stays in the nearest cache.
template <class T, bool coupled>
void advance_groups(T* __restrict mask, T* __restrict dual, T* __restrict twin, int32_t* __restrict entry,
                    uint8_t* __restrict inside, const T* __restrict along, int64_t n, const Numbers& by) {
  const T lr = static_cast<T>(by.lr), weak = static_cast<T>(1 / by.nu), pull = static_cast<T>(by.kappa * by.lr);
  const int32_t step = static_cast<int32_t>(by.step);
  for (int64_t i = 0; i < n; ++i) move<T, coupled>(mask[i], dual[i], twin[i], along[i], lr, weak, pull);
  shrink_groups(dual, twin, n, by);
  for (int64_t i = 0; i < n; ++i) {
    entry[i] = (entry[i] < 0) & (twin[i] != 0) ? step : entry[i];
    inside[i] = twin[i] != 0;
  }
}

// Bit i % 8 of byte i / 8 is inside[i]; there is room for zeros beyond n.
void pack(uint8_t* __restrict inside, int64_t n, uint8_t* __restrict bits) {
  std::fill_n(inside + n, 7, uint8_t{0});
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t bytes;
    __builtin_memcpy(&bytes, inside + i, 8);  // byte j is number j: the processors are little-endian
    // The bits of this number are 7 apart, so that byte i of the other factor arrives as bit i of the top byte.
    bits[i / 8] = static_cast<uint8_t>((bytes * 0x0102040810204080ull) >> 56);
  }
}

// scratch: room for two blocks.
template <class T, bool coupled>
void step_block(const State<T>& at, int64_t first, int64_t n, const Numbers& by, T* scratch, uint8_t* inside) {
  T *mask = at.mask + first, *dual = at.dual + first, *twin = at.gamma ? at.gamma + first : scratch + n;
  int32_t* entry = at.entry + first;
  const T* along = direction(at, first, n, by, scratch);
  bool any = true;
  if (by.group) {
    if (!at.gamma) shrink_groups(dual, twin, n, by);
    advance_groups<T, coupled>(mask, dual, twin, entry, inside, along, n, by);
  } else if (at.gamma) {
    any = advance<T, coupled, true>(mask, dual, twin, entry, inside, along, n, by);
  } else {
    any = advance<T, coupled, false>(mask, dual, twin, entry, inside, along, n, by);
  }
  if (at.support && any) pack(inside, n, at.support + first / 8);
  if (at.support && !any) std::fill_n(at.support + first / 8, (n + 7) / 8, uint8_t{0});
}

// A tensor that is worked on in a contiguous copy where it is not contiguous, and written back; none is a null pointer.
class Dense {
 public:
  explicit Dense(const std::optional<Tensor>& t) : original_(t) {
    if (t) copy_ = adjacent(*t);
  }
  template <class T>
  T* data() const {
    return copy_ ? static_cast<T*>(copy_->mutable_data_ptr()) : nullptr;
  }
  void write_back() {
    if (original_ && !original_->is_contiguous()) torch::stable::copy_(*original_, *copy_);
  }

 private:
  std::optional<Tensor> original_, copy_;
};

void check(const Tensor& mask, const std::vector<std::optional<Tensor>>& like, const Tensor& entry,
           const std::optional<Tensor>& support, const Numbers& by) {
  const ScalarType type = mask.scalar_type();
  auto same = [&](const Tensor& t, ScalarType wanted) {
    bool fits = t.dim() == mask.dim() && t.scalar_type() == wanted;
    for (int64_t d = 0; fits && d < mask.dim(); ++d) fits = t.size(d) == mask.size(d);
    STD_TORCH_CHECK(fits, "split_bregman_step_: shapes or dtypes differ");
  };
  for (const auto& t : like)
    if (t) same(*t, type);
  same(entry, ScalarType::Int);
  STD_TORCH_CHECK(!support || (support->dim() == 1 && support->scalar_type() == ScalarType::Byte &&
                               support->size(0) == (mask.numel() + 7) / 8),
                  "split_bregman_step_: support does not fit");
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::Double) && by.lr > 0 && by.kappa > 0 && by.nu > 0 &&
                      by.threshold >= 0 && by.beta >= 0 && by.beta < 1 && by.beta2 >= 0 && by.beta2 < 1 && by.eps > 0 &&
                      by.step >= 0 && by.group >= 0 && (by.group == 0 || mask.numel() % by.group == 0),
                  "split_bregman_step_: dtype or a number is not allowed");
}

void split_bregman_step_(Tensor mask, Tensor dual, std::optional<Tensor> gamma, Tensor entry, const Tensor& grad,
                         std::optional<Tensor> momentum, int64_t step, double lr, double kappa, double nu,
                         double threshold, double beta, bool coupled, bool nonnegative, std::optional<Tensor> second,
                         double beta2, double eps, int64_t group_size, std::optional<Tensor> support) {
  const Numbers by{lr, kappa, nu, threshold, beta, beta2, eps, step, group_size, nonnegative};
  check(mask, {dual, gamma, grad, momentum, second}, entry, support, by);
  STD_TORCH_CHECK(!second || momentum, "split_bregman_step_: second goes with momentum");
  Dense state[] = {Dense(mask),     Dense(dual),   Dense(gamma),  Dense(entry),
                   Dense(momentum), Dense(second), Dense(support)};
  const Tensor along = adjacent(grad);
  int64_t block = group_size == 0 ? kBlock : group_size * ((kBlock + group_size - 1) / group_size);
  while (block % 8) block *= 2;  // whole bytes of the support, whole groups
  const int64_t count = mask.numel(), blocks = (count + block - 1) / block;
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const State<T> at{state[0].data<T>(),
                      state[1].data<T>(),
                      state[2].data<T>(),
                      state[3].data<int32_t>(),
                      static_cast<const T*>(along.const_data_ptr()),
                      state[4].data<T>(),
                      state[5].data<T>(),
                      state[6].data<uint8_t>()};
    torch::stable::parallel_for(0, blocks, 1 + 32 * kBlock / block, [&](int64_t from, int64_t to) {
      std::vector<T> scratch(2 * block);
      std::vector<uint8_t> inside(block + 7);
      for (int64_t b = from; b < to; ++b)
        vectorised([&] {
          const int64_t first = b * block, n = std::min(block, count - first);
          coupled ? step_block<T, true>(at, first, n, by, scratch.data(), inside.data())
                  : step_block<T, false>(at, first, n, by, scratch.data(), inside.data());
        });
    });
  };
  mask.scalar_type() == ScalarType::Float ? run(float{}) : run(double{});
  for (Dense& t : state) t.write_back();
}

TINYCOMP_CPU_KERNEL(split_bregman_step_, split_bregman_step_)

}  // namespace
}  // namespace tinycomp
