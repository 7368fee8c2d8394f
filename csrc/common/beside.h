// Two or three layers that read the same input, from the kernel of one: their outputs one beside the other.
#pragma once

#include <cstring>
#include <tuple>
#include <utility>

#include "linear.h"

namespace tinycomp {

// An argument as the third layer has it, which may be missing, and back.
template <class A>
struct Missing {
  static constexpr bool needed = true;
  using type = std::optional<std::decay_t<A>>;
  static const A& here(const type& a) { return *a; }
};
template <class A>
struct Missing<const A&> {
  static constexpr bool needed = true;
  using type = const std::optional<A>&;
  static const A& here(type a) { return *a; }
};
template <class A>
struct Missing<const std::optional<A>&> {
  static constexpr bool needed = false;
  using type = const std::optional<A>&;
  static type here(type a) { return a; }
};

template <auto layer, class Signature, class Own, class Common>
struct BesideOf;

// `layer`(x, own arguments of a layer..., arguments that all have...).
template <auto layer, class... A, size_t... own, size_t... common>
struct BesideOf<layer, Tensor (*)(const Tensor&, A...), std::index_sequence<own...>, std::index_sequence<common...>> {
  template <size_t i>
  using Argument = std::tuple_element_t<i, std::tuple<A...>>;
  template <size_t i>
  using Maybe = Missing<Argument<i>>;

  static Tensor run(const Tensor& x, Argument<own>... a, Argument<own>... b, typename Maybe<own>::type... c,
                    Argument<sizeof...(own) + common>... more) {
    const bool any = (c.has_value() || ...), whole = ((c.has_value() || !Maybe<own>::needed) && ...);
    STD_TORCH_CHECK(whole || !any, "a third layer lacks some of its arguments");
    Tensor parts[3] = {layer(x, a..., more...), layer(x, b..., more...), x};
    const int count = any ? 3 : 2;
    if (count == 3) parts[2] = layer(x, Maybe<own>::here(c)..., more...);
    int64_t cols = 0;
    for (int i = 0; i < count; ++i) cols += parts[i].size(x.dim() - 1);
    const Tensor y = empty(shape_with_last(x, cols), x.scalar_type());
    const int64_t rows = row_count(x), size = static_cast<int64_t>(x.element_size());
    char* to = static_cast<char*>(y.mutable_data_ptr());
    for (int i = 0; i < count; ++i) {
      const int64_t bytes = parts[i].size(x.dim() - 1) * size;
      const char* from = static_cast<const char*>(parts[i].const_data_ptr());
      for (int64_t j = 0; j < rows && bytes > 0; ++j) std::memcpy(to + j * cols * size, from + j * bytes, bytes);
      to += bytes;
    }
    return y;
  }
};

template <auto layer, size_t own, class... A>
auto beside_of(Tensor (*)(const Tensor&, A...))
    -> BesideOf<layer, Tensor (*)(const Tensor&, A...), std::make_index_sequence<own>,
                std::make_index_sequence<sizeof...(A) - own>>;

}  // namespace tinycomp

// Op `op` of layers whose kernel is `layer`; the first `own` arguments after the input belong to each.
#define TINYCOMP_CPU_KERNEL_BESIDE(op, layer, own)          \
  using op##_of = decltype(beside_of<&layer, own>(&layer)); \
  TINYCOMP_CPU_KERNEL(op, op##_of::run)
