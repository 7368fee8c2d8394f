// The vector type of dot_kernels.h for AVX-512 F, BW, DQ and VL. The includer defines TINYCOMP_TARGET first.
#pragma once

#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "dot.h"
#include "sums_x86.h"
#include "transpose_avx512.h"

namespace tinycomp {
namespace {

struct Avx512 {
  using Vec = __m512;
  static constexpr int width = 16, inputs = 6, panel_inputs = 12;
  static constexpr int64_t panels_from = kPanelInputs;
  static constexpr bool narrows = true;
  // Words of a row that interleaved inputs add in one chain: more would miss the tolerance rule in float32.
  static constexpr int64_t chain = 512;

  TINYCOMP_TARGET static Vec zero() { return _mm512_setzero_ps(); }
  TINYCOMP_TARGET static Vec set1(float v) { return _mm512_set1_ps(v); }
  TINYCOMP_TARGET static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  TINYCOMP_TARGET static void transpose(Vec (&v)[16]) {
    __m512i bits[16];
    for (int i = 0; i < 16; ++i) bits[i] = _mm512_castps_si512(v[i]);
    transpose16(bits);
    for (int i = 0; i < 16; ++i) v[i] = _mm512_castsi512_ps(bits[i]);
  }
  TINYCOMP_TARGET static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  TINYCOMP_TARGET static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  TINYCOMP_TARGET static Vec load(const torch::headeronly::BFloat16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  TINYCOMP_TARGET static Vec load(const torch::headeronly::Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  TINYCOMP_TARGET static Vec load_pairs(const torch::headeronly::BFloat16* p) {
    return _mm512_castsi512_ps(_mm512_loadu_si512(p));
  }
  TINYCOMP_TARGET static Vec first(Vec v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 16)); }
  TINYCOMP_TARGET static Vec second(Vec v) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  TINYCOMP_TARGET static __m256i first16(const void* p, int64_t n) {
    return _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
  }
  TINYCOMP_TARGET static Vec load_first(const float* p, int64_t n) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  }
  TINYCOMP_TARGET static Vec load_first(const torch::headeronly::BFloat16* p, int64_t n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(first16(p, n)), 16));
  }
  TINYCOMP_TARGET static Vec load_first(const torch::headeronly::Half* p, int64_t n) {
    return _mm512_cvtph_ps(first16(p, n));
  }
  TINYCOMP_TARGET static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  TINYCOMP_TARGET static void store(torch::headeronly::BFloat16* p, Vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  TINYCOMP_TARGET static void store(torch::headeronly::Half* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  TINYCOMP_TARGET static float sum(Vec v) {
    const __m256 eight = halve(v);
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
  TINYCOMP_TARGET static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    sum_each(halve(a), halve(b), halve(c), halve(d), out);
  }
};

}  // namespace
}  // namespace tinycomp
