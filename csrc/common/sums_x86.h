// Sums across registers of float32.
#pragma once

#include <immintrin.h>

namespace tinycomp {

// out[0] to out[3]: the sums of four registers.
__attribute__((target("avx2"), always_inline)) inline void sum_each(__m256 a, __m256 b, __m256 c, __m256 d,
                                                                    float* out) {
  const __m256 quads = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
}

__attribute__((target("avx512f,avx512dq"), always_inline)) inline __m256 halve(__m512 v) {
  return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}

}  // namespace tinycomp
