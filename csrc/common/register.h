// Registration of a kernel with torch's dispatcher, and a record of its C++ signature that Python compares with the
// op's contract when the library is loaded.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace tinycomp {

using torch::stable::Tensor;

// The tensor with adjacent entries, copied if they are not. The stable interface's own `contiguous` looks its op up by
// name in every call, which takes longer than some kernels.
inline Tensor adjacent(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline std::map<std::string, std::string>& signatures() {
  static std::map<std::string, std::string> all;
  return all;
}

// A kernel as the dispatcher calls it, arguments and then results on one stack, for sequence.cpp.
using Boxed = void (*)(StableIValue* stack, uint64_t arguments, uint64_t results);
struct BoxedKernel {
  Boxed run;
  std::vector<std::string> arguments;  // names of their types
  uint64_t results;
};

inline std::map<std::string, BoxedKernel, std::less<>>& kernels() {
  static std::map<std::string, BoxedKernel, std::less<>> all;
  return all;
}

template <class T>
std::string type_name() {
  if constexpr (std::is_same_v<T, Tensor>)
    return "Tensor";
  else if constexpr (std::is_same_v<T, std::optional<Tensor>>)
    return "Optional[Tensor]";
  else if constexpr (std::is_same_v<T, int64_t>)
    return "int";
  else if constexpr (std::is_same_v<T, std::optional<int64_t>>)
    return "Optional[int]";
  else if constexpr (std::is_same_v<T, double>)
    return "float";
  else if constexpr (std::is_same_v<T, bool>)
    return "bool";
  else {
    static_assert(std::is_same_v<T, std::string>, "give this type a schema name");
    return "str";
  }
}

template <class... T>
std::string join() {
  std::string text;
  ((text += (text.empty() ? "" : ", ") + type_name<std::decay_t<T>>()), ...);
  return text;
}

template <class R, class... A>
BoxedKernel boxed(Boxed run, R (*)(A...)) {
  return {run, {type_name<std::decay_t<A>>()...}, std::is_void_v<R> ? 0 : 1};
}

template <class... R, class... A>
BoxedKernel boxed(Boxed run, std::tuple<R...> (*)(A...)) {
  return {run, {type_name<std::decay_t<A>>()...}, sizeof...(R)};
}

template <class R, class... A>
std::string signature(R (*)(A...)) {
  if constexpr (std::is_void_v<R>)
    return "(" + join<A...>() + ") -> ()";
  else
    return "(" + join<A...>() + ") -> (" + type_name<R>() + ")";
}

template <class... R, class... A>
std::string signature(std::tuple<R...> (*)(A...)) {
  return "(" + join<A...>() + ") -> (" + join<R...>() + ")";
}

}  // namespace tinycomp

#define TINYCOMP_CPU_KERNEL(op, function)                                              \
  STABLE_TORCH_LIBRARY_IMPL(tinycomp, CPU, m) {                                        \
    m.impl(#op, TORCH_BOX(&function));                                                 \
    ::tinycomp::signatures()[#op] = ::tinycomp::signature(&function);                  \
    ::tinycomp::kernels()[#op] = ::tinycomp::boxed(TORCH_BOX(&function), (&function)); \
  }
