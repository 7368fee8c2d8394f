// rotary_embedding: x cos + rotate(x) sin of the first numbers of each head, each product and the sum rounded; tokens
// over threads, queries and keys in one pass.
#include "../common/linear.h"

namespace tinycomp {
namespace {

// (batch, heads, tokens, cols) with adjacent numbers, copied if they are not, and what becomes of it.
template <class T>
struct Heads {
  Tensor tensor, result;
  const T* from;
  T* to;
  int64_t heads, tokens, cols, steps[3];

  Heads(const Tensor& x, const char* name)
      : tensor(x), result(x), heads(x.size(1)), tokens(x.size(2)), cols(x.size(3)) {
    STD_TORCH_CHECK(x.scalar_type() == scalar_type<T>, name, ": dtype does not fit");
    if (x.stride(3) != 1 && cols > 1) tensor = torch::stable::contiguous(x);
    result = empty({x.size(0), heads, tokens, cols}, scalar_type<T>);
    from = static_cast<const T*>(tensor.const_data_ptr());
    to = static_cast<T*>(result.mutable_data_ptr());
    for (int d = 0; d < 3; ++d) steps[d] = tensor.stride(d);
  }
};

// One head of one token: the first r of `cols` numbers turned, the others copied.
template <class T>
void turn(const T* __restrict x, const T* __restrict cos, const T* __restrict sin, int64_t r, int64_t cols,
          T* __restrict y) {
  using A = Accumulate<T>;
  const auto product = [](T a, T b) { return static_cast<A>(static_cast<T>(static_cast<A>(a) * static_cast<A>(b))); };
  const int64_t half = r / 2;
  for (int64_t i = 0; i < half; ++i) {
    y[i] = static_cast<T>(product(x[i], cos[i]) - product(x[half + i], sin[i]));
    y[half + i] = static_cast<T>(product(x[half + i], cos[half + i]) + product(x[i], sin[half + i]));
  }
  for (int64_t i = r; i < cols; ++i) y[i] = x[i];
}

// No compiler vectorises its conversions.
void turn(const Half* x, const Half* cos, const Half* sin, int64_t r, int64_t cols, Half* y) {
  constexpr int64_t kAtOnce = 64;
  const int64_t half = r / 2;
  float wide[6][kAtOnce];
  Half rounded[kAtOnce];
  const auto product = [&](const float* a, const float* b, int64_t n, float* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = a[i] * b[i];
    narrow(Type::f16, to, rounded, n), widen(Type::f16, rounded, to, n);
  };
  for (int64_t i = 0; i < half; i += kAtOnce) {
    const int64_t n = std::min(kAtOnce, half - i);
    widen(Type::f16, x + i, wide[0], n), widen(Type::f16, x + half + i, wide[1], n);
    for (int part = 0; part < 2; ++part) {
      widen(Type::f16, cos + part * half + i, wide[2], n), widen(Type::f16, sin + part * half + i, wide[3], n);
      product(wide[part], wide[2], n, wide[4]), product(wide[1 - part], wide[3], n, wide[5]);
      for (int64_t c = 0; c < n; ++c) wide[4][c] += part == 0 ? -wide[5][c] : wide[5][c];
      narrow(Type::f16, wide[4], y + part * half + i, n);
    }
  }
  std::copy(x + r, x + cols, y + r);
}

std::tuple<Tensor, Tensor> rotary_embedding(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && cos.dim() == 3 && sin.dim() == 3,
                  "rotary_embedding: dimensions do not fit");
  const int64_t batch = q.size(0), tokens = q.size(2), cols = q.size(3), r = cos.size(2);
  STD_TORCH_CHECK(k.size(0) == batch && k.size(2) == tokens && k.size(3) == cols && r % 2 == 0 && r <= cols &&
                      (cos.size(0) == 1 || cos.size(0) == batch) && cos.size(1) == tokens &&
                      sin.size(0) == cos.size(0) && sin.size(1) == tokens && sin.size(2) == r,
                  "rotary_embedding: shapes do not fit");
  return with_float_type(q.scalar_type(), "rotary_embedding", [&](auto zero) {
    using T = decltype(zero);
    STD_TORCH_CHECK(cos.scalar_type() == scalar_type<T> && sin.scalar_type() == scalar_type<T>,
                    "rotary_embedding: dtypes do not fit");
    const Heads<T> both[] = {{q, "rotary_embedding: q"}, {k, "rotary_embedding: k"}};
    const Tensor c = adjacent(cos), s = adjacent(sin);
    const T *const cosines = static_cast<const T*>(c.const_data_ptr()), *const sines =
                                                                            static_cast<const T*>(s.const_data_ptr());
    const int64_t step = cos.size(0) == 1 ? 0 : tokens * r;  // from a sequence to the next
    const Stage stages[] = {{batch * tokens, std::max<int64_t>(1, 4096 / std::max<int64_t>(1, cols))}};
    const double numbers = static_cast<double>(batch) * tokens * cols * (both[0].heads + both[1].heads);
    run_stages(stages, microseconds(2 * numbers * sizeof(T), 15 * numbers), [&](int, int64_t first, int64_t last) {
      vectorised([&] {
        for (int64_t i = first; i < last; ++i) {
          const int64_t b = i / tokens, t = i % tokens, angles = b * step + t * r;
          for (const auto& x : both)
            for (int64_t h = 0; h < x.heads; ++h)
              turn(x.from + b * x.steps[0] + h * x.steps[1] + t * x.steps[2], cosines + angles, sines + angles, r, cols,
                   x.to + ((b * x.heads + h) * tokens + t) * cols);
        }
      });
    });
    return std::tuple<Tensor, Tensor>(both[0].result, both[1].result);
  });
}

TINYCOMP_CPU_KERNEL(rotary_embedding, rotary_embedding)

}  // namespace
}  // namespace tinycomp
