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

// One head of one token: the first r of `cols` numbers turned, the others copied; `memory` has room for 2 r.
template <class T, class A>
void turn(const T* x, const A* cos, const A* sin, int64_t r, int64_t cols, A* memory, T* y) {
  const int64_t half = r / 2;
  A *const a = memory, *const b = memory + r;
  const auto rounded = [r](A* values, T* to) {
    if constexpr (!std::is_same_v<T, A>) narrow(dot_type<T>, values, to, r), widen(dot_type<T>, to, values, r);
  };
  if constexpr (std::is_same_v<T, A>)
    std::copy_n(x, r, a);
  else
    widen(dot_type<T>, x, a, r);
  vectorised([&] {
    for (int64_t i = 0; i < half; ++i) b[i] = -a[half + i] * sin[i];
    for (int64_t i = 0; i < half; ++i) b[half + i] = a[i] * sin[half + i];
    for (int64_t i = 0; i < r; ++i) a[i] *= cos[i];
  });
  rounded(a, y), rounded(b, y);
  vectorised([&] {
    for (int64_t i = 0; i < r; ++i) a[i] += b[i];
  });
  if constexpr (std::is_same_v<T, A>)
    std::copy_n(a, r, y);
  else
    narrow(dot_type<T>, a, y, r);
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
    using A = Accumulate<T>;
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
      const Scratch memory(kResultSlot, 4 * r * static_cast<int64_t>(sizeof(A) / sizeof(float)));
      A *const angles = reinterpret_cast<A*>(memory.data()), *const work = angles + 2 * r;
      for (int64_t i = first; i < last; ++i) {
        const int64_t b = i / tokens, t = i % tokens;
        for (int part = 0; part < 2; ++part) {
          const T* const from = (part == 0 ? cosines : sines) + b * step + t * r;
          if constexpr (std::is_same_v<T, A>)
            std::copy_n(from, r, angles + part * r);
          else
            widen(dot_type<T>, from, angles + part * r, r);
        }
        for (const auto& x : both)
          for (int64_t h = 0; h < x.heads; ++h)
            turn(x.from + b * x.steps[0] + h * x.steps[1] + t * x.steps[2], angles, angles + r, r, cols, work,
                 x.to + ((b * x.heads + h) * tokens + t) * cols);
      }
    });
    return std::tuple<Tensor, Tensor>(both[0].result, both[1].result);
  });
}

TINYCOMP_CPU_KERNEL(rotary_embedding, rotary_embedding)

}  // namespace
}  // namespace tinycomp
