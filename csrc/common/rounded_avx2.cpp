// rounded.h for AVX2 and FMA. Without VNNI, levels are widened to 16 bits: pairs of 8-bit products could saturate.
#if defined(__x86_64__)
#include <immintrin.h>

#define TINYCOMP_TARGET __attribute__((target("avx2,fma")))

#include "rounded_kernels.h"
#include "sums_x86.h"

namespace tinycomp {
namespace {

struct Avx2 {
  using Vec = __m256;
  using Int = __m256i;
  static constexpr int width = 8, bytes = 32, inputs = 2;

  TINYCOMP_TARGET static Vec zero() { return _mm256_setzero_ps(); }
  TINYCOMP_TARGET static Vec set1(float v) { return _mm256_set1_ps(v); }
  TINYCOMP_TARGET static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  TINYCOMP_TARGET static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  TINYCOMP_TARGET static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  TINYCOMP_TARGET static float sum(Vec v) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
  TINYCOMP_TARGET static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) { sum_each(a, b, c, d, out); }
  TINYCOMP_TARGET static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  TINYCOMP_TARGET static __m128i eight_bytes(const uint8_t* p, int64_t n) {
    if (n >= 8) return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    alignas(16) uint8_t some[16] = {};
    std::copy_n(p, n, some);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(some));
  }
  TINYCOMP_TARGET static Vec load_i8(const uint8_t* p, int64_t n) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight_bytes(p, n)));
  }
  TINYCOMP_TARGET static void load_u4(const uint8_t* p, int64_t n, Vec& low, Vec& high) {
    const __m256i wide = _mm256_cvtepu8_epi32(eight_bytes(p, n)), eight = _mm256_set1_epi32(8);
    low = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(wide, _mm256_set1_epi32(15)), eight));
    high = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(wide, 4), eight));
  }
  TINYCOMP_TARGET static Int no_sums() { return _mm256_setzero_si256(); }
  TINYCOMP_TARGET static Int load_sums(const int32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  TINYCOMP_TARGET static void store_sums(int32_t* p, Int v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  TINYCOMP_TARGET static Int set_bytes(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
  TINYCOMP_TARGET static Int dot(Int sums, Int levels, Int inputs) {
    const Int even = _mm256_srai_epi16(_mm256_slli_epi16(inputs, 8), 8), odd = _mm256_srai_epi16(inputs, 8);
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_and_si256(levels, _mm256_set1_epi16(255)), even));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_srli_epi16(levels, 8), odd));
  }
  // Four products of levels below 16 fit in 16 bits.
  TINYCOMP_TARGET static Int dot_halves(Int sums, Int v, Int even, Int odd) {
    const Int low = _mm256_and_si256(v, _mm256_set1_epi8(15));
    const Int high = _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15));
    const Int four = _mm256_add_epi16(_mm256_maddubs_epi16(low, even), _mm256_maddubs_epi16(high, odd));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(four, _mm256_set1_epi16(1)));
  }
  TINYCOMP_TARGET static Int load_bytes(const uint8_t* p, int64_t n) {
    if (n >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    alignas(32) uint8_t some[32] = {};
    std::copy_n(p, n, some);
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(some));
  }
  TINYCOMP_TARGET static Int offset(Int v) { return _mm256_xor_si256(v, _mm256_set1_epi8(-128)); }
  TINYCOMP_TARGET static Vec to_float(Int v) { return _mm256_cvtepi32_ps(v); }
  TINYCOMP_TARGET static float largest(const float* x, int64_t n) {
    float most = 0;
    for (int64_t i = 0; i < n; ++i) most = std::max(most, std::fabs(x[i]));
    return most;
  }
  TINYCOMP_TARGET static void round(const float* x, float factor, int64_t n, int8_t* levels) {
    for (int64_t i = 0; i < n; ++i) levels[i] = static_cast<int8_t>(std::nearbyint(x[i] * factor));
  }
};

}  // namespace

const RoundedTable avx2_rounded = make_rounded<Avx2>();

}  // namespace tinycomp
#endif
