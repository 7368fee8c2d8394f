// expand.h for AVX2, FMA and F16C: values of 16 bits are shuffled to their columns, eight at a time, as a table says.
#if defined(__x86_64__)
#include <immintrin.h>

#include <array>

#include "expand.h"
#include "prefetch.h"

#define TINYCOMP_TARGET __attribute__((target("avx2,fma,f16c,popcnt")))

namespace tinycomp {
namespace {

// For each byte, 16 bytes of a shuffle: where the two bytes of each of eight columns come from, 0x80 for none.
using Shuffles = std::array<std::array<uint8_t, 16>, 256>;

constexpr void place(std::array<uint8_t, 16>& shuffle, int column, int value) {
  shuffle[2 * column] = static_cast<uint8_t>(2 * value), shuffle[2 * column + 1] = static_cast<uint8_t>(2 * value + 1);
}

// A byte of a bit mask.
alignas(64) constexpr Shuffles kBits = [] {
  Shuffles shuffles{};
  for (int byte = 0; byte < 256; ++byte) {
    for (uint8_t& from : shuffles[byte]) from = 0x80;
    for (int column = 0, value = 0; column < 8; ++column)
      if (byte >> column & 1) place(shuffles[byte], column, value++);
  }
  return shuffles;
}();

// A byte of codes of 2:4, for values from number `first` on. kWrong, which shuffles ignore, where a code is none.
constexpr uint8_t kWrong = 0x40;
constexpr Shuffles pair_shuffles(int first) {
  Shuffles shuffles{};
  for (int byte = 0; byte < 256; ++byte) {
    for (uint8_t& from : shuffles[byte]) from = 0x80;
    for (int i = 0; i < 4; ++i) place(shuffles[byte], i / 2 * 4 + (byte >> (2 * i) & 3), first + i);
    if ((byte & 3) >= (byte >> 2 & 3) || (byte >> 4 & 3) >= byte >> 6)
      for (uint8_t& from : shuffles[byte]) from |= kWrong;
  }
  return shuffles;
}
alignas(64) constexpr Shuffles kPairs[2] = {pair_shuffles(0), pair_shuffles(4)};

TINYCOMP_TARGET inline __m256i both(const void* low, const void* high) {
  const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(low)));
  return _mm256_inserti128_si256(first, _mm_loadu_si128(static_cast<const __m128i*>(high)), 1);
}

// sum += the products of 16 columns.
template <Type type>
TINYCOMP_TARGET inline void multiply(__m256i w, __m256 first, __m256 second, __m256& sum) {
  if constexpr (type == Type::bf16) {
    const __m256i odd = _mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
    sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), first, sum);
    sum = _mm256_fmadd_ps(_mm256_castsi256_ps(odd), second, sum);
  } else {
    sum = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(w)), first, sum);
    sum = _mm256_fmadd_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(w, 1)), second, sum);
  }
}

TINYCOMP_TARGET inline void store_sums(__m256 a, __m256 b, __m256 c, __m256 d, float* sums) {
  const __m256 quads = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
}

template <Type type>
TINYCOMP_TARGET void dot_as(const uint16_t* values, const int64_t (&start)[4], const uint16_t* const (&mask)[4],
                            int64_t blocks, const float* x, float* sums) {
  // The next four rows, which follow these.
  const int64_t ahead = (start[3] - start[0]) * 4 / 3;
  // Named one by one: as an array they would be kept in memory.
  __m256 sum0 = _mm256_setzero_ps(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  int64_t at0 = start[0], at1 = start[1], at2 = start[2], at3 = start[3];
  for (int64_t b = 0; b < blocks; ++b) {
    const __m256 first = _mm256_loadu_ps(x + 16 * b), second = _mm256_loadu_ps(x + 16 * b + 8);
    auto row = [&](const uint16_t* bits, int64_t& at, __m256& sum) TINYCOMP_TARGET {
      const unsigned word = bits[b], low = word & 255;
      const __m256i some = both(values + at, values + at + __builtin_popcount(low));
      multiply<type>(_mm256_shuffle_epi8(some, both(&kBits[low], &kBits[word >> 8])), first, second, sum);
      prefetch(values + at + ahead);
      at += __builtin_popcount(word);
    };
    row(mask[0], at0, sum0), row(mask[1], at1, sum1), row(mask[2], at2, sum2), row(mask[3], at3, sum3);
  }
  store_sums(sum0, sum1, sum2, sum3, sums);
}

template <Type type>
TINYCOMP_TARGET bool pairs_as(const uint16_t* values, const int64_t (&start)[4], const uint8_t* const (&codes)[4],
                              int64_t blocks, const float* x, float* sums) {
  const int64_t ahead = (start[3] - start[0]) * 4 / 3;
  __m256i seen = _mm256_setzero_si256();
  __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t b = 0; b < blocks; ++b) {
    const __m256 first = _mm256_loadu_ps(x + 16 * b), second = _mm256_loadu_ps(x + 16 * b + 8);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const uint16_t* from = values + start[r] + 8 * b;
      const __m256i some = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      const __m256i shuffle = both(&kPairs[0][codes[r][2 * b]], &kPairs[1][codes[r][2 * b + 1]]);
      seen = _mm256_or_si256(seen, shuffle);
      multiply<type>(_mm256_shuffle_epi8(some, shuffle), first, second, sum[r]);
      prefetch(from + ahead);
    }
  }
  store_sums(sum[0], sum[1], sum[2], sum[3], sums);
  return _mm256_testz_si256(seen, _mm256_set1_epi8(kWrong)) != 0;
}

TINYCOMP_TARGET void gather_pairs(const float* values, const uint16_t* index, int64_t count, const uint32_t* x,
                                  float* sums) {
  __m256 sum[4];
  for (__m256& s : sum) s = _mm256_setzero_ps();
  for (int64_t i = 0; i < count; ++i) {
    const auto* words = reinterpret_cast<const __m256i*>(x + 16 * index[i]);
    const __m256 value = _mm256_set1_ps(values[i]);
    for (int h = 0; h < 2; ++h) {
      const __m256i both = _mm256_loadu_si256(words + h);
      const __m256i high = _mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
      sum[h] = _mm256_fmadd_ps(value, _mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), sum[h]);
      sum[h + 2] = _mm256_fmadd_ps(value, _mm256_castsi256_ps(high), sum[h + 2]);
    }
  }
  for (int h = 0; h < 4; ++h) _mm256_storeu_ps(sums + 8 * h, sum[h]);
}

TINYCOMP_TARGET int64_t count_bits(const uint16_t* mask, int64_t blocks) {
  int64_t bits = 0;
  for (int64_t b = 0; b < blocks; ++b) bits += __builtin_popcount(mask[b]);
  return bits;
}

}  // namespace

// One load for each input: gathers are slow on AMD's processors and, where they must not leak data, on Intel's.
TINYCOMP_TARGET float gather_scalars(const float* values, const uint16_t* index, int64_t count, const float* x) {
  __m128 sum[4] = {_mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps()};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      uint64_t four;
      __builtin_memcpy(&four, index + i + 4 * k, 8);
      const __m128 inputs =
          _mm_setr_ps(x[four & 0xffff], x[four >> 16 & 0xffff], x[four >> 32 & 0xffff], x[four >> 48]);
      sum[k] = _mm_fmadd_ps(_mm_loadu_ps(values + i + 4 * k), inputs, sum[k]);
    }
  float rest = 0;
  for (; i < count; ++i) rest += values[i] * x[index[i]];
  const __m128 all = _mm_add_ps(_mm_add_ps(sum[0], sum[1]), _mm_add_ps(sum[2], sum[3]));
  const __m128 two = _mm_add_ps(all, _mm_movehl_ps(all, all));
  return rest + _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

bool looked_up(Type type) { return type == Type::bf16 || type == Type::f16; }

void lookup_dot(Type type, const void* values, const int64_t (&at)[4], const uint16_t* const (&mask)[4], int64_t blocks,
                const float* x, float* sums) {
  const auto* from = static_cast<const uint16_t*>(values);
  type == Type::bf16 ? dot_as<Type::bf16>(from, at, mask, blocks, x, sums)
                     : dot_as<Type::f16>(from, at, mask, blocks, x, sums);
}

bool lookup_pairs(Type type, const void* values, const int64_t (&at)[4], const uint8_t* const (&codes)[4],
                  int64_t blocks, const float* x, float* sums) {
  const auto* from = static_cast<const uint16_t*>(values);
  return type == Type::bf16 ? pairs_as<Type::bf16>(from, at, codes, blocks, x, sums)
                            : pairs_as<Type::f16>(from, at, codes, blocks, x, sums);
}

const ExpandTable avx2_expand = {portable_expand.expand,
                                 gather_scalars,
                                 portable_expand.gather_many,
                                 gather_pairs,
                                 count_bits,
                                 looked_up,
                                 lookup_dot,
                                 looked_up,
                                 lookup_pairs};

}  // namespace tinycomp
#endif
