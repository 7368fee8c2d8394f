// Portable loops as the widest vector code of the processor: sums in a fixed number of partial sums, which compilers
// may then vectorise without leave to reorder, and loops compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "dot.h"

namespace tinycomp {

constexpr int kSumLanes = 16;

// term(0) + ... + term(n - 1), in an order that depends on n alone.
template <class A, class Term>
A lane_sum(int64_t n, const Term& term) {
  A lanes[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes)
#if defined(__x86_64__)
#pragma GCC unroll 1  // GCC would take 16 of these at once for AVX-512 and transpose them: four times as slow
#endif
    for (int l = 0; l < kSumLanes; ++l) lanes[l] += term(i + l);
  for (; i < n; ++i) lanes[i % kSumLanes] += term(i);
  for (int half = kSumLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

#if defined(__x86_64__)
template <class Body>
[[gnu::flatten]] __attribute__((
    target("avx512f,avx512bw,avx512dq,avx512vl,avx2,prefer-vector-width=512"))) void with_avx512(const Body& body) {
  body();
}

template <class Body>
[[gnu::flatten]] __attribute__((target("avx2"))) void with_avx2(const Body& body) {
  body();
}
#endif

// body(), everything it calls inlined and compiled for the instruction set in use. Without contraction (see setup.py)
// all of them give the same numbers.
template <class Body>
void vectorised(const Body& body) {
#if defined(__x86_64__)
  static const Loops compiled_for = loops();
  if (compiled_for == Loops::avx512) return with_avx512(body);
  if (compiled_for == Loops::avx2) return with_avx2(body);
#endif
  body();
}

}  // namespace tinycomp
