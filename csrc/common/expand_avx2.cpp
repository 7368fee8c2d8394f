// expand.h for AVX2, FMA and F16C: values of 16 bits are shuffled to their columns, eight at a time, as a table says.
#if defined(__x86_64__)
#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>

#include "expand.h"
#include "prefetch.h"

#define TINYCOMP_TARGET __attribute__((target("avx2,fma,f16c,popcnt")))

namespace tinycomp {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

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

// Four rows at once are what registers hold: each is a pointer to its mask (or codes), one to its values and a sum,
// named one by one, for as arrays they would be kept in memory.
template <Type type>
TINYCOMP_TARGET void dot_as(const uint16_t* values, int64_t (&start)[4], const uint16_t* const (&mask)[4],
                            int64_t blocks, const float* x, float* sums) {
  // The next four rows, which follow these.
  const int64_t ahead = (start[3] - start[0]) * 4 / 3;
  const bool far = on_amd;
  __m256 sum0 = _mm256_setzero_ps(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  const uint16_t *from0 = values + start[0], *from1 = values + start[1];
  const uint16_t *from2 = values + start[2], *from3 = values + start[3];
  const auto* bits0 = reinterpret_cast<const uint8_t*>(mask[0]);
  const int64_t to1 = reinterpret_cast<const uint8_t*>(mask[1]) - bits0;
  const int64_t to2 = reinterpret_cast<const uint8_t*>(mask[2]) - bits0;
  const int64_t to3 = reinterpret_cast<const uint8_t*>(mask[3]) - bits0;
  for (int64_t b = 0; b < blocks; ++b, bits0 += 2, x += 16) {
    const __m256 first = _mm256_loadu_ps(x), second = _mm256_loadu_ps(x + 8);
    const auto row = [&](const uint8_t* bits, const uint16_t*& from, __m256& sum) TINYCOMP_TARGET {
      const uint64_t low = bits[0], high = bits[1];
      const uint16_t* middle = from + __builtin_popcountll(low);
      const __m256i some = both(from, middle);
      from = middle + __builtin_popcountll(high);
      multiply<type>(_mm256_shuffle_epi8(some, both(&kBits[low], &kBits[high])), first, second, sum);
    };
    row(bits0, from0, sum0), row(bits0 + to1, from1, sum1), row(bits0 + to2, from2, sum2),
        row(bits0 + to3, from3, sum3);
    if (far) {
      __builtin_prefetch(from0 + ahead, 0, 2), __builtin_prefetch(from1 + ahead, 0, 2);
      __builtin_prefetch(from2 + ahead, 0, 2), __builtin_prefetch(from3 + ahead, 0, 2);
    } else {
      __builtin_prefetch(from0 + ahead), __builtin_prefetch(from1 + ahead);
      __builtin_prefetch(from2 + ahead), __builtin_prefetch(from3 + ahead);
    }
  }
  start[0] = from0 - values, start[1] = from1 - values, start[2] = from2 - values, start[3] = from3 - values;
  store_sums(sum0, sum1, sum2, sum3, sums);
}

template <Type type>
TINYCOMP_TARGET bool pairs_as(const uint16_t* values, const int64_t (&start)[4], const uint8_t* const (&codes)[4],
                              int64_t blocks, const float* x, float* sums) {
  const int64_t ahead = (start[3] - start[0]) * 4 / 3;
  const bool far = on_amd;
  __m256i seen = _mm256_setzero_si256();
  __m256 sum0 = _mm256_setzero_ps(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  const uint16_t* from0 = values + start[0];
  const int64_t at1 = start[1] - start[0], at2 = start[2] - start[0], at3 = start[3] - start[0];
  const uint8_t* codes0 = codes[0];
  const int64_t to1 = codes[1] - codes0, to2 = codes[2] - codes0, to3 = codes[3] - codes0;
  for (int64_t b = 0; b < blocks; ++b, codes0 += 2, from0 += 8, x += 16) {
    const __m256 first = _mm256_loadu_ps(x), second = _mm256_loadu_ps(x + 8);
    const auto row = [&](const uint8_t* code, const uint16_t* from, __m256& sum) TINYCOMP_TARGET {
      const __m256i some = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      const uint64_t low = code[0], high = code[1];
      const __m256i shuffle = both(&kPairs[0][low], &kPairs[1][high]);
      seen = _mm256_or_si256(seen, shuffle);
      multiply<type>(_mm256_shuffle_epi8(some, shuffle), first, second, sum);
    };
    row(codes0, from0, sum0), row(codes0 + to1, from0 + at1, sum1);
    row(codes0 + to2, from0 + at2, sum2), row(codes0 + to3, from0 + at3, sum3);
    const uint16_t* next = from0 + ahead;
    if (far) {
      __builtin_prefetch(next, 0, 2), __builtin_prefetch(next + at1, 0, 2);
      __builtin_prefetch(next + at2, 0, 2), __builtin_prefetch(next + at3, 0, 2);
    } else {
      __builtin_prefetch(next), __builtin_prefetch(next + at1);
      __builtin_prefetch(next + at2), __builtin_prefetch(next + at3);
    }
  }
  store_sums(sum0, sum1, sum2, sum3, sums);
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
  // Words 8 h + k hold inputs 16 h + 2 k in sum[h], and those that follow them in sum[h + 2].
  for (int h = 0; h < 2; ++h) {
    const __m256 low = _mm256_unpacklo_ps(sum[h], sum[h + 2]), high = _mm256_unpackhi_ps(sum[h], sum[h + 2]);
    _mm256_storeu_ps(sums + 16 * h, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(sums + 16 * h + 8, _mm256_permute2f128_ps(low, high, 0x31));
  }
}

TINYCOMP_TARGET int64_t count_bits(const uint16_t* mask, int64_t blocks) {
  int64_t bits = 0;
  for (int64_t b = 0; b < blocks; ++b) bits += __builtin_popcount(mask[b]);
  return bits;
}

}  // namespace

namespace {

TINYCOMP_TARGET inline __m128 load4(const float* p) { return _mm_loadu_ps(p); }
TINYCOMP_TARGET inline __m128 load4(const BFloat16* p) {
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16));
}
TINYCOMP_TARGET inline __m128 load4(const Half* p) {
  return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

// One load for each input: gathers are slow on AMD's processors and, where they must not leak data, on Intel's.
template <class T>
TINYCOMP_TARGET float gather_as(const T* values, const uint16_t* index, int64_t count, const float* x) {
  __m128 sum[4] = {_mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps(), _mm_setzero_ps()};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      uint64_t four;
      __builtin_memcpy(&four, index + i + 4 * k, 8);
      const __m128 inputs =
          _mm_setr_ps(x[four & 0xffff], x[four >> 16 & 0xffff], x[four >> 32 & 0xffff], x[four >> 48]);
      sum[k] = _mm_fmadd_ps(load4(values + i + 4 * k), inputs, sum[k]);
    }
  float rest = 0;
  for (; i < count; ++i) rest += static_cast<float>(values[i]) * x[index[i]];
  const __m128 all = _mm_add_ps(_mm_add_ps(sum[0], sum[1]), _mm_add_ps(sum[2], sum[3]));
  const __m128 two = _mm_add_ps(all, _mm_movehl_ps(all, all));
  return rest + _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace

float gather_scalars(Type type, const void* values, const uint16_t* index, int64_t count, const float* x) {
  switch (type) {
    case Type::f32:
      return gather_as(static_cast<const float*>(values), index, count, x);
    case Type::bf16:
      return gather_as(static_cast<const BFloat16*>(values), index, count, x);
    default:
      return gather_as(static_cast<const Half*>(values), index, count, x);
  }
}

bool looked_up(Type type) { return type == Type::bf16 || type == Type::f16; }

void arrange16(Type type, const float* x, int64_t blocks, float* to) {
  for (int64_t b = 0; b < blocks; ++b)
    for (int i = 0; i < 16; ++i) to[16 * b + i] = x[16 * b + (type == Type::bf16 ? 2 * (i % 8) + i / 8 : i)];
}

void lookup_dot(Type type, const void* values, int64_t (&at)[4], const uint16_t* const (&mask)[4], int64_t blocks,
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
                                 nullptr,
                                 portable_expand.gather_many,
                                 gather_pairs,
                                 count_bits,
                                 looked_up,
                                 lookup_dot,
                                 looked_up,
                                 lookup_pairs,
                                 arrange16,
                                 16,
                                 nullptr,
                                 code_bits,
                                 portable_expand.columns};

}  // namespace tinycomp
#endif
