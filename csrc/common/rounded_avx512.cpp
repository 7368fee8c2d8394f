// rounded.h for AVX-512 F, BW, DQ, VL and VNNI.
#if defined(__x86_64__)
#include <immintrin.h>

#define TINYCOMP_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))

#include "rounded_kernels.h"

namespace tinycomp {
namespace {

struct Avx512 {
  using Vec = __m512;
  using Int = __m512i;
  static constexpr int width = 16, bytes = 64, inputs = 3;

  TINYCOMP_TARGET static __mmask16 lanes(int64_t n) {
    return n >= 16 ? static_cast<__mmask16>(-1) : static_cast<__mmask16>((1u << n) - 1);
  }
  TINYCOMP_TARGET static Vec zero() { return _mm512_setzero_ps(); }
  TINYCOMP_TARGET static Vec set1(float v) { return _mm512_set1_ps(v); }
  TINYCOMP_TARGET static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  TINYCOMP_TARGET static float sum(Vec v) { return _mm512_reduce_add_ps(v); }
  TINYCOMP_TARGET static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  TINYCOMP_TARGET static Vec load_i8(const uint8_t* p, int64_t n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes(n), p)));
  }
  TINYCOMP_TARGET static void load_u4(const uint8_t* p, int64_t n, Vec& low, Vec& high) {
    // A table look-up by the low four bits of each lane is the mask, the subtraction and the conversion at once.
    const __m512 levels = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes(n), p));
    low = _mm512_permutexvar_ps(wide, levels);
    high = _mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), levels);
  }
  TINYCOMP_TARGET static Int no_sums() { return _mm512_setzero_si512(); }
  TINYCOMP_TARGET static Int load_sums(const int32_t* p) { return _mm512_loadu_si512(p); }
  TINYCOMP_TARGET static void store_sums(int32_t* p, Int v) { _mm512_storeu_si512(p, v); }
  TINYCOMP_TARGET static Int set_bytes(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
  TINYCOMP_TARGET static Int dot(Int sums, Int levels, Int inputs) { return _mm512_dpbusd_epi32(sums, levels, inputs); }
  TINYCOMP_TARGET static Int load_bytes(const uint8_t* p, int64_t n) {
    return n >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((1ull << n) - 1, p);
  }
  TINYCOMP_TARGET static Int offset(Int v) { return _mm512_xor_si512(v, _mm512_set1_epi8(-128)); }
  TINYCOMP_TARGET static Int low(Int v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  TINYCOMP_TARGET static Int high(Int v) { return low(_mm512_srli_epi16(v, 4)); }
  TINYCOMP_TARGET static Vec to_float(Int v) { return _mm512_cvtepi32_ps(v); }
  TINYCOMP_TARGET static float largest(const float* x, int64_t n) {
    Vec most = zero();
    for (int64_t i = 0; i < n; i += width)
      most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_maskz_loadu_ps(lanes(n - i), x + i)));
    return _mm512_reduce_max_ps(most);
  }
  TINYCOMP_TARGET static void round(const float* x, float factor, int64_t n, int8_t* levels) {
    for (int64_t i = 0; i < n; i += width) {
      const Vec scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes(n - i), x + i), set1(factor));
      _mm512_mask_cvtsepi32_storeu_epi8(levels + i, lanes(n - i), _mm512_cvtps_epi32(scaled));
    }
  }
};

}  // namespace

const RoundedTable avx512_rounded = make_rounded<Avx512>();

}  // namespace tinycomp
#endif
