// expand.h for AVX-512 VBMI2, which expands 32 values of 16 bits or 64 of 8 in one instruction; without and with that
// of products of bfloat16 (AVX-512 BF16). Everything else is as for AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

#include "expand.h"
#include "prefetch.h"

#define TINYCOMP_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512bf16,avx2,fma,f16c,popcnt")))

namespace tinycomp {
namespace {

// How 32 columns meet their inputs: as pairs of bfloat16, as halves of such pairs in float32, or widened from float16.
enum class By { kPairs, kHalves, kWidened };

constexpr int64_t kAhead = 8192, kMasksAhead = 4096;  // words of values, bytes of masks

// From a register: AMD's processors take many times longer from memory.
TINYCOMP_TARGET inline __m512i expanded(uint32_t bits, __m512i values) {
  asm("" : "+v"(values));
  return _mm512_maskz_expand_epi16(bits, values);
}

// sum += the products of 32 columns, expanded in `w`; inputs as `arrange` puts them.
template <By by>
TINYCOMP_TARGET inline void multiply(__m512i w, const float* x, __m512& sum) {
  if constexpr (by == By::kPairs) {
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(_mm512_loadu_ps(x)));
  } else if constexpr (by == By::kHalves) {
    const __m512i odd = _mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_loadu_ps(x), sum);
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(odd), _mm512_loadu_ps(x + 16), sum);
  } else {
    sum = _mm512_fmadd_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(w)), _mm512_loadu_ps(x), sum);
    sum = _mm512_fmadd_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(w, 1)), _mm512_loadu_ps(x + 16), sum);
  }
}

// `blocks` is even. Rows are named one by one: as arrays they would be kept in memory.
template <By by>
TINYCOMP_TARGET void dot_words(const uint16_t* values, int64_t (&start)[4], const uint16_t* const (&mask)[4],
                               int64_t blocks, const float* x, float* sums) {
  constexpr int64_t kFloats = by == By::kPairs ? 16 : 32;
  // Four rows after the next four, which follow these in memory, from end to end: a line or two for each step.
  const int64_t each = (start[3] - start[0]) * 4 / 3 * 2 / std::max<int64_t>(blocks / 2, 1);
  const auto* ahead = reinterpret_cast<const char*>(values + start[0] + (start[3] - start[0]) * 8 / 3);
  __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  const uint16_t *from0 = values + start[0], *from1 = values + start[1];
  const uint16_t *from2 = values + start[2], *from3 = values + start[3];
  const uint16_t *bits0 = mask[0], *bits1 = mask[1], *bits2 = mask[2], *bits3 = mask[3];
  for (int64_t b = 0; b < blocks; b += 2, x += kFloats) {
    const auto row = [&](const uint16_t* bits, const uint16_t*& from, __m512& sum) TINYCOMP_TARGET {
      uint32_t some;
      __builtin_memcpy(&some, bits + b, 4);
      const __m512i w = expanded(some, _mm512_loadu_si512(from));
      from += static_cast<uint64_t>(__builtin_popcount(some));
      asm("" : "+r"(from));  // GCC would keep the four of them in one register of vectors
      multiply<by>(w, x, sum);
    };
    prefetch(ahead);
    if (each > 64) prefetch(ahead + 64);
    ahead += each;
    row(bits0, from0, sum0), row(bits1, from1, sum1), row(bits2, from2, sum2), row(bits3, from3, sum3);
  }
  start[0] = from0 - values, start[1] = from1 - values, start[2] = from2 - values, start[3] = from3 - values;
  sums[0] = _mm512_reduce_add_ps(sum0), sums[1] = _mm512_reduce_add_ps(sum1);
  sums[2] = _mm512_reduce_add_ps(sum2), sums[3] = _mm512_reduce_add_ps(sum3);
}

// The same in pairs, one row after another in the order of memory: see rows_in_order in dot_kernels.h. `blocks` is a
// multiple of four.
TINYCOMP_TARGET void words_in_order(const uint16_t* values, int64_t (&start)[4], const uint16_t* const (&mask)[4],
                                    int64_t blocks, const float* x, float* sums) {
  const bool two_lines = start[3] - start[0] > 3 * 8 * blocks;  // of values for 64 columns
  for (int r = 0; r < 4; ++r) {
    const uint16_t* from = values + start[r];
    const float* inputs = x;
    __m512 first = _mm512_setzero_ps(), second = first;
#pragma GCC unroll 1
    for (int64_t b = 0; b < blocks; b += 4, inputs += 32) {
      uint64_t bits;
      __builtin_memcpy(&bits, mask[r] + b, 8);
      __builtin_prefetch(from + kAhead, 0, 2);
      if (two_lines) __builtin_prefetch(from + kAhead + 32, 0, 2);
      if (b % 32 == 0) __builtin_prefetch(mask[r] + b + kMasksAhead / 2, 0, 2);
      const uint16_t* half = from + static_cast<uint64_t>(__builtin_popcount(static_cast<uint32_t>(bits)));
      const __m512i low = _mm512_loadu_si512(from), high = _mm512_loadu_si512(half);
      multiply<By::kPairs>(expanded(static_cast<uint32_t>(bits), low), inputs, first);
      multiply<By::kPairs>(expanded(static_cast<uint32_t>(bits >> 32), high), inputs + 16, second);
      from += static_cast<uint64_t>(__builtin_popcountll(bits));
    }
    start[r] = from - values;
    sums[r] = _mm512_reduce_add_ps(_mm512_add_ps(first, second));
  }
}

// How 32 words take two bits each of 64, and the first of the four columns that each of them is one of.
struct Choice {
  alignas(64) uint8_t shifts[64] = {};
  alignas(64) uint16_t places[32];
  Choice() {
    for (int k = 0; k < 32; ++k)
      shifts[2 * k] = static_cast<uint8_t>(2 * k), places[k] = static_cast<uint16_t>(k / 2 * 4);
  }
};

// Rows of 2:4 in pairs: inputs are chosen for the weights, not weights put in their places. `blocks` is a multiple of
// four: 64 columns have 32 weights.
TINYCOMP_TARGET bool choose_dot(Type, const void* values, const int64_t (&at)[4], const uint8_t* const (&codes)[4],
                                int64_t blocks, const float* x, float* sums) {
  static const Choice choice;
  const __m512i shift = _mm512_load_si512(choice.shifts), four = _mm512_load_si512(choice.places);
  const __m512i two_bits = _mm512_set1_epi16(3);
  __m512i least = two_bits;  // by which a second column is behind the first one, in words of odd number
  for (int r = 0; r < 4; ++r) {
    const uint16_t* from = static_cast<const uint16_t*>(values) + at[r];
    const float* inputs = x;
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 1
    for (int64_t b = 0; b < blocks; b += 4, from += 32, inputs += 32) {
      __builtin_prefetch(from + kAhead, 0, 2);
      if (b % 32 == 0) __builtin_prefetch(codes[r] + 2 * b + kMasksAhead, 0, 2);
      const __m512i code = _mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes[r] + 2 * b)));
      const __m512i bits = _mm512_multishift_epi64_epi8(shift, code);
      const __m512i column = _mm512_ternarylogic_epi64(bits, two_bits, four, 0xea);  // bits & two_bits | four
      const __m512i low = _mm512_loadu_si512(inputs), high = _mm512_loadu_si512(inputs + 16);
      const auto w = reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
      sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(low, column, high)), w);
      least = _mm512_min_epi16(least, _mm512_sub_epi16(column, _mm512_slli_epi32(column, 16)));
    }
    sums[r] = _mm512_reduce_add_ps(sum);
  }
  return _mm512_mask_cmp_epi16_mask(0xaaaaaaaa, least, _mm512_setzero_si512(), _MM_CMPINT_LE) == 0;
}

// 64 levels from number `at` on, as signed bytes; up to as many are read, whether used or not.
template <Type type>
TINYCOMP_TARGET inline __m512i levels64(const uint8_t* values, int64_t at) {
  if constexpr (type == Type::i8) {
    return _mm512_loadu_si512(values + at);
  } else {
    // Eight halves of a byte, from an even or an odd one on, lie in the five bytes from every fourth on.
    const __m512i raw = _mm512_maskz_loadu_epi8((1ull << 33) - 1, values + at / 2);
    const __m512i eighth = _mm512_set_epi64(28, 24, 20, 16, 12, 8, 4, 0);
    const __m512i byte = _mm512_shuffle_epi8(eighth, _mm512_broadcast_i32x4(_mm_set_epi64x(0x0808080808080808, 0)));
    const __m512i places = _mm512_add_epi8(byte, _mm512_set1_epi64(0x0706050403020100));
    const __m512i shifts = _mm512_set1_epi64(at % 2 ? 0x201c1814100c0804 : 0x1c1814100c080400);
    const __m512i halves = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(places, raw));
    return _mm512_sub_epi8(_mm512_and_si512(halves, _mm512_set1_epi8(15)), _mm512_set1_epi8(8));
  }
}

TINYCOMP_TARGET inline __m512i expanded64(uint64_t bits, __m512i levels) {
  asm("" : "+v"(levels));
  return _mm512_maskz_expand_epi8(bits, levels);
}

// Sixteen of 64 signed bytes in float32.
template <int quarter>
TINYCOMP_TARGET inline __m512 floats(__m512i bytes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(bytes, quarter)));
}

// As dot_words. `blocks` is a multiple of four.
template <Type type>
TINYCOMP_TARGET void dot_bytes(const void* from, int64_t (&start)[4], const uint16_t* const (&mask)[4], int64_t blocks,
                               const float* x, float* sums) {
  const auto* values = static_cast<const uint8_t*>(from);
  constexpr int64_t kShare = type == Type::u4 ? 2 : 1;  // values in a byte
  const int64_t each = (start[3] - start[0]) * 4 / 3 / kShare / std::max<int64_t>(blocks / 4, 1);
  const auto* ahead = reinterpret_cast<const char*>(values) + (start[0] + (start[3] - start[0]) * 8 / 3) / kShare;
  __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0, sum2 = sum0, sum3 = sum0;
  int64_t at0 = start[0], at1 = start[1], at2 = start[2], at3 = start[3];
  for (int64_t b = 0; b < blocks; b += 4, x += 64) {
    const __m512 first = _mm512_loadu_ps(x), second = _mm512_loadu_ps(x + 16);
    const __m512 third = _mm512_loadu_ps(x + 32), fourth = _mm512_loadu_ps(x + 48);
    const auto row = [&](const uint16_t* bits, int64_t& at, __m512& sum) TINYCOMP_TARGET {
      uint64_t some;
      __builtin_memcpy(&some, bits + b, 8);
      const __m512i w = expanded64(some, levels64<type>(values, at));
      at += __builtin_popcountll(some);
      asm("" : "+r"(at));
      const __m512 low = _mm512_fmadd_ps(floats<1>(w), second, _mm512_mul_ps(floats<0>(w), first));
      const __m512 high = _mm512_fmadd_ps(floats<3>(w), fourth, _mm512_mul_ps(floats<2>(w), third));
      sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
    };
    prefetch(ahead);
    if (each > 64) prefetch(ahead + 64);
    ahead += each;
    row(mask[0], at0, sum0), row(mask[1], at1, sum1), row(mask[2], at2, sum2), row(mask[3], at3, sum3);
  }
  start[0] = at0, start[1] = at1, start[2] = at2, start[3] = at3;
  sums[0] = _mm512_reduce_add_ps(sum0), sums[1] = _mm512_reduce_add_ps(sum1);
  sums[2] = _mm512_reduce_add_ps(sum2), sums[3] = _mm512_reduce_add_ps(sum3);
}

template <Type type>
TINYCOMP_TARGET int64_t expand_bytes(const void* from, int64_t at, int64_t count, const uint16_t* mask, int64_t blocks,
                                     float* out) {
  const auto* values = static_cast<const uint8_t*>(from);
  for (int64_t b = 0; b < blocks; b += 4, out += 64) {
    const int64_t taken = std::min<int64_t>(4, blocks - b);
    uint64_t bits = 0;
    __builtin_memcpy(&bits, mask + b, 2 * taken);
    const int64_t n = __builtin_popcountll(bits);
    // The last levels are followed by nothing that may be read.
    if (at + 128 > count || taken < 4) {
      const int64_t end = avx512_expand.expand(type, from, at, count, mask + b, taken, out);
      if (end < 0) return end;
      at = end;
      continue;
    }
    const __m512i w = expanded64(bits, levels64<type>(values, at));
    at += n;
    _mm512_storeu_ps(out, floats<0>(w)), _mm512_storeu_ps(out + 16, floats<1>(w));
    _mm512_storeu_ps(out + 32, floats<2>(w)), _mm512_storeu_ps(out + 48, floats<3>(w));
  }
  return at;
}

int64_t expand_levels(Type type, const void* values, int64_t at, int64_t count, const uint16_t* mask, int64_t blocks,
                      float* out) {
  if (type == Type::i8) return expand_bytes<Type::i8>(values, at, count, mask, blocks, out);
  if (type == Type::u4) return expand_bytes<Type::u4>(values, at, count, mask, blocks, out);
  return avx512_expand.expand(type, values, at, count, mask, blocks, out);
}

template <By bf16, bool in_order>
void expand_dot(Type type, const void* values, int64_t (&at)[4], const uint16_t* const (&mask)[4], int64_t blocks,
                const float* x, float* sums) {
  const auto* from = static_cast<const uint16_t*>(values);
  if (type == Type::bf16 && in_order) return words_in_order(from, at, mask, blocks, x, sums);
  if (type == Type::bf16) return dot_words<bf16>(from, at, mask, blocks, x, sums);
  if (type == Type::f16) return dot_words<By::kWidened>(from, at, mask, blocks, x, sums);
  if (type == Type::i8) return dot_bytes<Type::i8>(values, at, mask, blocks, x, sums);
  if (type == Type::u4) return dot_bytes<Type::u4>(values, at, mask, blocks, x, sums);
  avx512_expand.expand_dot(type, values, at, mask, blocks, x, sums);
}

// bfloat16 inputs: those of even number in 32 come first, or all in 16 bits.
template <By bf16>
void arrange(Type type, const float* x, int64_t blocks, float* to) {
  for (int64_t i = 0; i < 16 * blocks; ++i) {
    if (type != Type::bf16)
      to[i] = x[i];
    else if (bf16 == By::kHalves)
      to[i] = x[i / 32 * 32 + 2 * (i % 16) + i / 16 % 2];
  }
  if (type == Type::bf16 && bf16 == By::kPairs) narrow(Type::bf16, x, to, 16 * blocks);
}

// 32 columns at a time; see Words.
TINYCOMP_TARGET int64_t expand_words(const uint16_t* values, int64_t at, int64_t count, const uint16_t* mask,
                                     int64_t blocks, uint16_t* out) {
  for (int64_t b = 0; b < blocks; b += 2) {
    uint32_t bits;
    __builtin_memcpy(&bits, mask + b, 4);
    const int n = __builtin_popcount(bits);
    if (at + n > count) return -1;
    const auto some = static_cast<__mmask32>(n == 32 ? ~0u : (1u << n) - 1);
    const __m512i v = at + 32 <= count ? _mm512_loadu_si512(values + at) : _mm512_maskz_loadu_epi16(some, values + at);
    _mm512_storeu_si512(out + 16 * b, expanded(bits, v));
    at += n;
  }
  return at;
}

// Codes of 2:4 are half a byte, and so are the bits that they name.
TINYCOMP_TARGET void code_bits(const uint8_t* codes, int64_t n, uint8_t* bits) {
  const __m512i named = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 9, 3, 2, 6, 10, 5, 6, 4, 12, 9, 10, 12, 8));
  const __m512i half = _mm512_set1_epi8(15);
  for (int64_t i = 0; i < n; i += 64) {
    const __mmask64 some = n - i >= 64 ? ~0ull : (1ull << (n - i)) - 1;
    const __m512i v = _mm512_maskz_loadu_epi8(some, codes + i);
    const __m512i low = _mm512_shuffle_epi8(named, _mm512_and_si512(v, half));
    const __m512i high = _mm512_shuffle_epi8(named, _mm512_and_si512(_mm512_srli_epi16(v, 4), half));
    _mm512_mask_storeu_epi8(bits + i, some, _mm512_or_si512(low, _mm512_slli_epi16(high, 4)));
  }
}

// Two kept weights, in bfloat16, meet their lines of inputs together.
TINYCOMP_TARGET void gather_bf16(const float* values, const uint16_t* index, int64_t count, const uint32_t* x,
                                 float* sums) {
  constexpr int64_t kSome = 512;
  alignas(64) uint16_t narrowed[kSome];
  alignas(64) uint32_t lines[kSome];  // where those of the inputs begin
  __m512 low[2], high[2];
  for (int k = 0; k < 2; ++k) low[k] = high[k] = _mm512_setzero_ps();
  const auto add = [&](const uint16_t* pair, int64_t first, int64_t second, int k) TINYCOMP_TARGET {
    uint32_t both;
    __builtin_memcpy(&both, pair, 4);
    const __m512i one = _mm512_loadu_si512(x + first), other = _mm512_loadu_si512(x + second);
    const auto w = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(both)));
    low[k] = _mm512_dpbf16_ps(low[k], w, reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(one, other)));
    high[k] = _mm512_dpbf16_ps(high[k], w, reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(one, other)));
  };
  for (int64_t start = 0; start < count; start += kSome) {
    const int64_t n = count - start < kSome ? count - start : kSome;
    narrow(Type::bf16, values + start, narrowed, n);
    for (int64_t i = 0; i < n; ++i) lines[i] = 16u * index[start + i];
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
#pragma GCC unroll 4
      for (int k = 0; k < 8; k += 2) add(narrowed + i + k, lines[i + k], lines[i + k + 1], k / 2 % 2);
    for (; i + 2 <= n; i += 2) add(narrowed + i, lines[i], lines[i + 1], 0);
    if (i < n) {
      const uint16_t last[] = {narrowed[i], 0};
      add(last, lines[i], lines[i], 0);
    }
  }
  const __m512 even = _mm512_add_ps(low[0], low[1]), odd = _mm512_add_ps(high[0], high[1]);
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  _mm512_storeu_ps(sums, _mm512_permutex2var_ps(even, first, odd));
  _mm512_storeu_ps(sums + 16, _mm512_permutex2var_ps(even, second, odd));
}

// The inputs of eight kept weights, by one load and one insertion each.
TINYCOMP_TARGET inline __m128bh gathered(const uint16_t* x, const uint16_t* index) {
  uint64_t low, high;
  __builtin_memcpy(&low, index, 8), __builtin_memcpy(&high, index + 4, 8);
  const auto at = [](uint64_t four, int k) { return static_cast<uint16_t>(four >> 16 * k); };
  __m128i words = _mm_loadu_si16(x + at(low, 0));
  words = _mm_insert_epi16(words, x[at(low, 1)], 1);
  words = _mm_insert_epi16(words, x[at(low, 2)], 2);
  words = _mm_insert_epi16(words, x[at(low, 3)], 3);
  words = _mm_insert_epi16(words, x[at(high, 0)], 4);
  words = _mm_insert_epi16(words, x[at(high, 1)], 5);
  words = _mm_insert_epi16(words, x[at(high, 2)], 6);
  words = _mm_insert_epi16(words, x[at(high, 3)], 7);
  return reinterpret_cast<__m128bh>(words);
}

// Nothing is asked for ahead: values and columns are two streams that the processor follows by itself (with prefetches
// 0.46 ns for a kept weight from memory, without 0.27).
TINYCOMP_TARGET float gather_words(const uint16_t* values, const uint16_t* index, int64_t count, const uint16_t* x,
                                   uint16_t& most) {
  __m128 sums[2] = {_mm_setzero_ps(), _mm_setzero_ps()};
  __m128i largest = _mm_set1_epi16(static_cast<int16_t>(most));
  const auto eight = [&](const uint16_t* w, const uint16_t* at, __m128bh inputs, int k) TINYCOMP_TARGET {
    const auto* weights = reinterpret_cast<const __m128i*>(w);
    const auto* columns = reinterpret_cast<const __m128i*>(at);
    largest = _mm_max_epu16(largest, _mm_loadu_si128(columns));
    sums[k] = _mm_dpbf16_ps(sums[k], inputs, reinterpret_cast<__m128bh>(_mm_loadu_si128(weights)));
  };
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    eight(values + i, index + i, gathered(x, index + i), 0);
    eight(values + i + 8, index + i + 8, gathered(x, index + i + 8), 1);
  }
  for (; i < count; i += 8) {
    uint16_t w[8] = {}, at[8] = {}, inputs[8] = {};  // zeros meet zeros: an input may be infinite
    const int64_t n = std::min<int64_t>(count - i, 8);
    std::copy_n(values + i, n, w), std::copy_n(index + i, n, at);
    for (int64_t k = 0; k < n; ++k) inputs[k] = x[at[k]];
    eight(w, at, reinterpret_cast<__m128bh>(_mm_loadu_si128(reinterpret_cast<const __m128i*>(inputs))), 0);
  }
  // The largest number is what the smallest complement stands for.
  most = static_cast<uint16_t>(~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(largest, _mm_set1_epi8(-1)))));
  const __m128 quad = _mm_add_ps(sums[0], sums[1]), pair = _mm_add_ps(quad, _mm_movehl_ps(quad, quad));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

// The same by the processor's own gathers, the faster way where it has tiles. They read the next word as well.
TINYCOMP_TARGET float gather_double_words(const uint16_t* values, const uint16_t* index, int64_t count,
                                          const uint16_t* x, uint16_t& most) {
  constexpr int64_t kWidth = 16, kSums = 4, kNext = 1024;
  __m512 sums[kSums];
#pragma GCC unroll 4
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  __m256i largest = _mm256_set1_epi16(static_cast<int16_t>(most));
  const auto add = [&](int64_t i, __mmask16 there, __m512& sum) TINYCOMP_TARGET {
    const __m256i columns = _mm256_maskz_loadu_epi16(there, index + i), w = _mm256_maskz_loadu_epi16(there, values + i);
    largest = _mm256_max_epu16(largest, columns);
    const __m512i none = _mm512_setzero_si512(), at = _mm512_cvtepu16_epi32(columns);
    const __m512i two = _mm512_mask_i32gather_epi32(none, there, at, x, sizeof(uint16_t));
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(w), 16)),
                          _mm512_castsi512_ps(_mm512_slli_epi32(two, 16)), sum);
  };
  int64_t i = 0;
  for (; i + kSums * kWidth <= count; i += kSums * kWidth) {
    // Values and columns of the rows that follow: two lines of memory are too few for the processor to ask for enough.
    for (int64_t c = kNext; c < kNext + kSums * kWidth; c += 32) {
      __builtin_prefetch(values + i + c, 0, 2);
      __builtin_prefetch(index + i + c, 0, 2);
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < kSums; ++k) add(i + k * kWidth, 0xffff, sums[k]);
  }
  for (; i < count; i += kWidth) add(i, static_cast<__mmask16>((1u << std::min(kWidth, count - i)) - 1), sums[0]);
  const __m128i half = _mm_max_epu16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  most = static_cast<uint16_t>(~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi8(-1)))));
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

bool any(Type) { return true; }
bool none(Type) { return false; }
bool only_bf16(Type type) { return type == Type::bf16; }

TINYCOMP_TARGET void kept_columns(const uint16_t* mask, int64_t blocks, uint16_t* to) {
  alignas(64) uint16_t first[32];
  for (int i = 0; i < 32; ++i) first[i] = static_cast<uint16_t>(i);
  __m512i columns = _mm512_load_si512(first);
  const auto some = [&](uint32_t bits) TINYCOMP_TARGET {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi16(bits, columns));
    to += __builtin_popcount(bits);
    columns = _mm512_add_epi16(columns, _mm512_set1_epi16(32));
  };
  for (int64_t b = 0; b + 2 <= blocks; b += 2) {
    uint32_t bits;
    __builtin_memcpy(&bits, mask + b, 4);
    some(bits);
  }
  if (blocks % 2 == 1) some(mask[blocks - 1]);
}

template <By bf16>
ExpandTable table(GatherWords gather_words, GatherPairs gather_pairs, Words words) {
  ExpandTable made = avx512_expand;
  made.gather_words = gather_words, made.gather_pairs = gather_pairs, made.words = words;
  made.dots = any, made.expand_dot = expand_dot<bf16, false>, made.arrange = arrange<bf16>, made.together = 64;
  made.expand = expand_levels;
  made.pairs = none, made.pairs_dot = nullptr, made.code_bits = code_bits, made.columns = kept_columns;
  return made;
}

// What is faster with tiles, and was not tried without.
ExpandTable with_tiles(ExpandTable made) {
  made.gather_words = gather_double_words, made.expand_dot = expand_dot<By::kPairs, true>;
  made.pairs = only_bf16, made.pairs_dot = choose_dot;
  return made;
}

}  // namespace

const ExpandTable avx512vbmi2_expand = table<By::kHalves>(nullptr, avx512_expand.gather_pairs, nullptr);
const ExpandTable avx512bf16_expand = table<By::kPairs>(gather_words, gather_bf16, expand_words);
const ExpandTable amx_expand = with_tiles(avx512bf16_expand);

}  // namespace tinycomp
#endif
