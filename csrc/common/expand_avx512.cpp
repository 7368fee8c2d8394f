// expand.h for AVX-512 F, BW, DQ and VL: one masked load and one expansion for 16 columns.
#if defined(__x86_64__)
#include <immintrin.h>

#include "expand.h"
#include "prefetch.h"

#define TINYCOMP_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt")))

namespace tinycomp {
namespace {

// The `n` <= 16 values from number `at`.
template <Type type>
TINYCOMP_TARGET inline __m512 take(const void* values, int64_t at, int n) {
  const auto some = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (type == Type::f32) {
    return _mm512_maskz_loadu_ps(some, static_cast<const float*>(values) + at);
  } else if constexpr (type == Type::bf16) {
    const __m256i bits = _mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(values) + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  } else if constexpr (type == Type::f16) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, static_cast<const uint16_t*>(values) + at));
  } else if constexpr (type == Type::i8) {
    const __m128i bytes = _mm_maskz_loadu_epi8(some, static_cast<const int8_t*>(values) + at);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  } else {
    // Nine bytes hold any 16 halves; an odd first one is shifted out.
    const int odd = static_cast<int>(at & 1), bytes = (n + odd + 1) / 2;
    const __m128i raw =
        _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << bytes) - 1), static_cast<const uint8_t*>(values) + at / 2);
    const __m128i low = _mm_and_si128(raw, _mm_set1_epi8(15));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(raw, 4), _mm_set1_epi8(15));
    const __m128i halves = odd ? _mm_unpacklo_epi8(high, _mm_srli_si128(low, 1)) : _mm_unpacklo_epi8(low, high);
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(halves), _mm512_set1_epi32(8)));
  }
}

// 16 values from number `at`, whether used or not.
template <Type type>
TINYCOMP_TARGET inline __m512 take16(const void* values, int64_t at) {
  if constexpr (type == Type::u4) {
    const auto* from = static_cast<const uint8_t*>(values) + at / 2;
    uint64_t halves;
    __builtin_memcpy(&halves, from, 8);
    if (at & 1) halves = halves >> 4 | static_cast<uint64_t>(from[8]) << 60;
    const __m512i upper = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512 levels = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i both = _mm512_castsi128_si512(_mm_cvtsi64_si128(static_cast<int64_t>(halves)));
    const __m512i wide = _mm512_srlv_epi32(_mm512_permutexvar_epi32(upper, both), shifts);
    return _mm512_permutexvar_ps(wide, levels);  // reads the low four bits of each lane
  } else {
    return take<type>(values, at, 16);
  }
}

template <Type type>
TINYCOMP_TARGET void dot_as(const void* values, int64_t (&start)[4], const uint16_t* const (&mask)[4], int64_t blocks,
                            const float* x, float* sums) {
  constexpr int64_t kAhead = 1024, kBytes = type == Type::f32 ? 8 : type == Type::i8 ? 2 : 1;
  // Named one by one: as an array they would be kept in memory.
  __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  int64_t at0 = start[0], at1 = start[1], at2 = start[2], at3 = start[3];
  for (int64_t b = 0; b < blocks; ++b) {
    const __m512 inputs = _mm512_loadu_ps(x + 16 * b);
    auto row = [&](const uint16_t* bits, int64_t& at, __m512& sum) TINYCOMP_TARGET {
      sum = _mm512_fmadd_ps(_mm512_maskz_expand_ps(bits[b], take16<type>(values, at)), inputs, sum);
      at += __builtin_popcount(bits[b]);
      prefetch(static_cast<const char*>(values) + at * kBytes / 2 + kAhead);
    };
    row(mask[0], at0, sum0), row(mask[1], at1, sum1), row(mask[2], at2, sum2), row(mask[3], at3, sum3);
  }
  start[0] = at0, start[1] = at1, start[2] = at2, start[3] = at3;
  sums[0] = _mm512_reduce_add_ps(sum0), sums[1] = _mm512_reduce_add_ps(sum1);
  sums[2] = _mm512_reduce_add_ps(sum2), sums[3] = _mm512_reduce_add_ps(sum3);
}

TINYCOMP_TARGET void expand_dot(Type type, const void* values, int64_t (&at)[4], const uint16_t* const (&mask)[4],
                                int64_t blocks, const float* x, float* sums) {
  switch (type) {
    case Type::f32:
      return dot_as<Type::f32>(values, at, mask, blocks, x, sums);
    case Type::bf16:
    case Type::f16:
      return lookup_dot(type, values, at, mask, blocks, x, sums);
    case Type::i8:
      return dot_as<Type::i8>(values, at, mask, blocks, x, sums);
    default:
      return dot_as<Type::u4>(values, at, mask, blocks, x, sums);
  }
}

template <Type type>
TINYCOMP_TARGET int64_t expand_as(const void* values, int64_t at, int64_t count, const uint16_t* mask, int64_t blocks,
                                  float* out) {
  for (int64_t b = 0; b < blocks; ++b) {
    const int n = __builtin_popcount(mask[b]);
    if (at + n > count) return -1;
    const __m512 some = at + 32 <= count ? take16<type>(values, at) : take<type>(values, at, n);
    _mm512_storeu_ps(out + 16 * b, _mm512_maskz_expand_ps(mask[b], some));
    at += n;
  }
  return at;
}

TINYCOMP_TARGET int64_t expand_bits(Type type, const void* values, int64_t at, int64_t count, const uint16_t* mask,
                                    int64_t blocks, float* out) {
  switch (type) {
    case Type::f32:
      return expand_as<Type::f32>(values, at, count, mask, blocks, out);
    case Type::bf16:
      return expand_as<Type::bf16>(values, at, count, mask, blocks, out);
    case Type::f16:
      return expand_as<Type::f16>(values, at, count, mask, blocks, out);
    case Type::i8:
      return expand_as<Type::i8>(values, at, count, mask, blocks, out);
    default:
      return expand_as<Type::u4>(values, at, count, mask, blocks, out);
  }
}

// At most 16 K inputs, with U sums for each: a sum waits for the one before it.
template <int K, int U>
TINYCOMP_TARGET void gather_lines(const float* values, const uint16_t* index, int64_t count, const float* x,
                                  int64_t ldx, int64_t inputs, float* sums) {
  __m512 sum[U][K];
  __mmask16 some[K];
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k) {
    const int64_t left = inputs - 16 * k;
    some[k] = static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0);
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) sum[u][k] = _mm512_setzero_ps();
  }
  int64_t i = 0;
  for (; i + U <= count; i += U)
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const __m512 value = _mm512_set1_ps(values[i + u]);
      const float* row = x + index[i + u] * ldx;
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k)
        sum[u][k] = _mm512_fmadd_ps(value, _mm512_maskz_loadu_ps(some[k], row + 16 * k), sum[u][k]);
    }
  for (; i < count; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k)
      sum[0][k] = _mm512_fmadd_ps(_mm512_set1_ps(values[i]),
                                  _mm512_maskz_loadu_ps(some[k], x + index[i] * ldx + 16 * k), sum[0][k]);
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k) {
#pragma GCC unroll 4
    for (int u = 1; u < U; ++u) sum[0][k] = _mm512_add_ps(sum[0][k], sum[u][k]);
    _mm512_mask_storeu_ps(sums + 16 * k, some[k], sum[0][k]);
  }
}

TINYCOMP_TARGET void gather_rows(const float* values, const uint16_t* index, int64_t count, const float* x, int64_t ldx,
                                 int64_t inputs, float* sums) {
  for (int64_t j = 0; j < inputs; j += 64) {
    const int64_t left = inputs - j;
    const auto gather = left <= 16 ? gather_lines<1, 4> : left <= 32 ? gather_lines<2, 2> : gather_lines<4, 1>;
    gather(values, index, count, x + j, ldx, left, sums + j);
  }
}

TINYCOMP_TARGET void gather_pairs(const float* values, const uint16_t* index, int64_t count, const uint32_t* x,
                                  float* sums) {
  __m512 low[4], high[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) low[k] = high[k] = _mm512_setzero_ps();
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const auto add = [&](int64_t i, __m512& first, __m512& second) TINYCOMP_TARGET {
    const __m512i both = _mm512_loadu_si512(x + 16 * index[i]);
    const __m512 value = _mm512_set1_ps(values[i]);
    first = _mm512_fmadd_ps(value, _mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), first);
    second = _mm512_fmadd_ps(value, _mm512_castsi512_ps(_mm512_and_si512(both, upper)), second);
  };
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) add(i + k, low[k], high[k]);
  for (; i < count; ++i) add(i, low[0], high[0]);
  const __m512 even = _mm512_add_ps(_mm512_add_ps(low[0], low[1]), _mm512_add_ps(low[2], low[3]));
  const __m512 odd = _mm512_add_ps(_mm512_add_ps(high[0], high[1]), _mm512_add_ps(high[2], high[3]));
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  _mm512_storeu_ps(sums, _mm512_permutex2var_ps(even, first, odd));
  _mm512_storeu_ps(sums + 16, _mm512_permutex2var_ps(even, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd));
}

TINYCOMP_TARGET int64_t count_bits(const uint16_t* mask, int64_t blocks) {
  int64_t bits = 0, b = 0;
  for (; b + 4 <= blocks; b += 4) {
    uint64_t four;
    __builtin_memcpy(&four, mask + b, 8);
    bits += __builtin_popcountll(four);
  }
  for (; b < blocks; ++b) bits += __builtin_popcount(mask[b]);
  return bits;
}

bool any(Type) { return true; }

}  // namespace

const ExpandTable avx512_expand = {expand_bits,  gather_scalars, nullptr,
                                   gather_rows,  gather_pairs,   count_bits,
                                   any,          expand_dot,     looked_up,
                                   lookup_pairs, arrange16,      16,
                                   nullptr,      code_bits,      portable_expand.columns};

}  // namespace tinycomp
#endif
