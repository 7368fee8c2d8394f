// dot.h for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#define TINYCOMP_TARGET __attribute__((target("avx2,fma,f16c")))

#include "dot_kernels.h"
#include "sums_x86.h"

namespace tinycomp {
namespace {

struct Avx2 {
  using Vec = __m256;
  static constexpr int width = 8, inputs = 2, panel_inputs = 5;
  static constexpr int64_t panels_from = kPanelInputs;
  static constexpr bool narrows = false;

  TINYCOMP_TARGET static Vec zero() { return _mm256_setzero_ps(); }
  TINYCOMP_TARGET static Vec set1(float v) { return _mm256_set1_ps(v); }
  TINYCOMP_TARGET static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  TINYCOMP_TARGET static void transpose(Vec (&v)[8]) {
    Vec t[8];
    for (int i = 0; i < 8; i += 2)
      t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]), t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        v[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
        v[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
      }
    for (int c = 0; c < 4; ++c) {
      t[c] = _mm256_permute2f128_ps(v[c], v[c + 4], 0x20);
      t[c + 4] = _mm256_permute2f128_ps(v[c], v[c + 4], 0x31);
    }
    for (int c = 0; c < 8; ++c) v[c] = t[c];
  }
  TINYCOMP_TARGET static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  TINYCOMP_TARGET static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  TINYCOMP_TARGET static Vec load(const torch::headeronly::BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  TINYCOMP_TARGET static Vec load(const torch::headeronly::Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  TINYCOMP_TARGET static Vec load_pairs(const torch::headeronly::BFloat16* p) {
    return _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  TINYCOMP_TARGET static Vec first(Vec v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v), 16)); }
  TINYCOMP_TARGET static Vec second(Vec v) {
    return _mm256_castsi256_ps(
        _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
  template <class T>
  TINYCOMP_TARGET static Vec load_first(const T* p, int64_t n) {
    T padded[width] = {};
    std::copy_n(p, n, padded);
    return load(padded);
  }
  TINYCOMP_TARGET static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  TINYCOMP_TARGET static float sum(Vec v) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
  TINYCOMP_TARGET static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) { sum_each(a, b, c, d, out); }
};

}  // namespace

const DotTable avx2_dot = make_table<Avx2>();

}  // namespace tinycomp
#endif
