// Rows of a weight against interleaved inputs (interleaved.h), written once against Avx512 or what derives from it, of
// which fma() multiplies words and `chain` of these may be added up one after another. The includer defines
// TINYCOMP_TARGET first.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "interleaved.h"
#include "transpose_avx512.h"

namespace tinycomp {
namespace {

// Words [first, last) of a piece's inputs, `distance` bytes apart and `words` long, put side by side.
template <int piece>
TINYCOMP_TARGET void interleave_piece(const char* from, int64_t distance, int64_t inputs, int64_t words, int64_t first,
                                      int64_t last, float* to) {
  constexpr int64_t kWord = sizeof(float), kLine = 16, kGroup = group_of(piece);
  int64_t w = first;
  if constexpr (piece >= 16)
    for (; inputs > 0 && w + kLine <= last; w += kLine)
      for (int64_t j = 0; j < piece; j += kLine) {
        __m512i some[kLine];
        for (int64_t i = 0; i < kLine; ++i)
          some[i] = j + i < inputs ? _mm512_loadu_si512(from + (j + i) * distance + w * kWord) : _mm512_setzero_si512();
        transpose16(some);
        for (int64_t i = 0; i < kLine; ++i) _mm512_store_si512(to + (w + i) * piece + j, some[i]);
      }
  for (; w < last; w += kGroup) {
    float* place = to + w * piece;
    const int64_t left = std::min(kGroup, words - w);
    if (inputs < piece || left < kGroup) std::fill_n(place, kGroup * piece, 0.0f);
    for (int64_t j = 0; j < inputs; ++j, place += kGroup) {
      const char* some = from + j * distance + w * kWord;
      if (left == kGroup)
        std::memcpy(place, some, kGroup * kWord);
      else
        std::memcpy(place, some, left * kWord);
    }
  }
}

TINYCOMP_TARGET inline void interleave_words(const char* from, int64_t distance, int64_t m, int64_t words,
                                             int64_t first, int64_t last, float* to) {
  for (int64_t start = 0, piece; start < m; start += piece, to += piece * padded_words(words)) {
    piece = piece_of(m - start);
    const auto put = piece == 32   ? interleave_piece<32>
                     : piece == 16 ? interleave_piece<16>
                     : piece == 8  ? interleave_piece<8>
                     : piece == 4  ? interleave_piece<4>
                                   : interleave_piece<2>;
    put(from + start * distance, distance, std::min(piece, m - start), words, first, last, to);
  }
}

// The first words of a register, a group, in every part of it.
template <int piece>
TINYCOMP_TARGET inline __m512 repeat_group(__m512 v) {
  if constexpr (piece == 2) return _mm512_broadcast_f32x8(_mm512_castps512_ps256(v));
  if constexpr (piece == 4) return _mm512_broadcast_f32x4(_mm512_castps512_ps128(v));
  if constexpr (piece == 8)
    return _mm512_castsi512_ps(_mm512_broadcastq_epi64(_mm_castps_si128(_mm512_castps512_ps128(v))));
  if constexpr (piece >= 16) return _mm512_broadcastss_ps(_mm512_castps512_ps128(v));
}

// The same of words in memory, as whole numbers: on Zen 4 the instructions for floats take a third longer beside
// products (16 inputs, 4096 x 3072: 0.67 and 0.91 ms).
template <int piece>
TINYCOMP_TARGET inline __m512 repeat_group(const char* p) {
  if constexpr (piece == 2)
    return _mm512_castsi512_ps(_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  if constexpr (piece == 4)
    return _mm512_castsi512_ps(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  if constexpr (piece == 8) {
    int64_t two;
    std::memcpy(&two, p, sizeof two);
    return _mm512_castsi512_ps(_mm512_set1_epi64(two));
  }
  if constexpr (piece >= 16) {
    int32_t one;
    std::memcpy(&one, p, sizeof one);
    return _mm512_castsi512_ps(_mm512_set1_epi32(one));
  }
}

// Sums of four rows by groups, the first R of them, to results of each input or (`add`) on top of them: out[j * ldo +
// r]; R is 1 or 4.
template <int piece, int R>
TINYCOMP_TARGET inline void finish_groups(const __m512 (&sums)[4], int64_t inputs, float* out, int64_t ldo, bool add) {
  const __m512 low01 = _mm512_unpacklo_ps(sums[0], sums[1]), high01 = _mm512_unpackhi_ps(sums[0], sums[1]);
  const __m512 low23 = _mm512_unpacklo_ps(sums[2], sums[3]), high23 = _mm512_unpackhi_ps(sums[2], sums[3]);
  // Number c of each quarter of the four rows.
  __m512 of[4] = {_mm512_shuffle_ps(low01, low23, 0x44), _mm512_shuffle_ps(low01, low23, 0xee),
                  _mm512_shuffle_ps(high01, high23, 0x44), _mm512_shuffle_ps(high01, high23, 0xee)};
  constexpr int each = piece >= 16 ? 4 : piece == 8 ? 2 : 1;  // inputs of a quarter
  if constexpr (each < 4) of[0] = _mm512_add_ps(of[0], of[1]), of[1] = _mm512_add_ps(of[2], of[3]);
  if constexpr (each == 1) of[0] = _mm512_add_ps(of[0], of[1]);
  if constexpr (piece == 2) of[0] = _mm512_add_ps(of[0], _mm512_shuffle_f32x4(of[0], of[0], 0xb1));
#pragma GCC unroll 16
  for (int j = 0; j < piece && j < 16; ++j) {
    if (j == inputs) return;
    constexpr auto quarter = [](__m512 v, int q) TINYCOMP_TARGET {
      return q == 0   ? _mm512_extractf32x4_ps(v, 0)
             : q == 1 ? _mm512_extractf32x4_ps(v, 1)
             : q == 2 ? _mm512_extractf32x4_ps(v, 2)
                      : _mm512_extractf32x4_ps(v, 3);
    };
    const __m128 four = quarter(of[j % each], piece == 2 ? 2 * j : j / each);
    float* to = out + j * ldo;
    if constexpr (R == 4)
      _mm_storeu_ps(to, add ? _mm_add_ps(_mm_loadu_ps(to), four) : four);
    else
      *to = add ? *to + _mm_cvtss_f32(four) : _mm_cvtss_f32(four);
  }
}

// The same of R rows, of which each input has S sums.
template <class V, int R, int piece, int S, int N>
TINYCOMP_TARGET inline void finish_rows(const __m512 (&sums)[S][R][N], int64_t inputs, float* out, int64_t ldo,
                                        bool add) {
#pragma GCC unroll 2
  for (int p = 0; p < N; ++p) {
    const int64_t n = std::min<int64_t>(inputs - 16 * p, 16);
    if (n <= 0) break;
#pragma GCC unroll 2
    for (int r = 0; r < R; r += 4) {
      __m512 all[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int from = (r + i) % R;  // of one row itself again
        all[i] = S == 2 ? V::add(sums[0][from][p], sums[S - 1][from][p]) : sums[0][from][p];
      }
      finish_groups<piece, std::min(R, 4)>(all, n, out + 16 * p * ldo + r, ldo, add);
    }
  }
}

// R rows against a piece of the inputs. Every other group has sums of its own where there are S = 2, for rows too few
// to keep multiply-adds busy.
template <class V, int R, int piece, int S>
TINYCOMP_TARGET void groups_tile(const char* w, int64_t stride, int64_t words, const float* x, int64_t inputs,
                                 float* out, int64_t ldo, bool first, bool add) {
  constexpr int kGroup = group_of(piece), kRegisters = piece < 16 ? 1 : piece / 16;
  constexpr int64_t kLine = 16, kWord = sizeof(float);
  __m512 sums[S][R][kRegisters];
#pragma GCC unroll 2
  for (int s = 0; s < S; ++s)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int p = 0; p < kRegisters; ++p) sums[s][r][p] = V::zero();
  // The next rows, or if they are nearer those so many bytes on.
  constexpr int64_t kAtLeast = R == 8 ? 8192 : 16384;
  const int64_t next = std::max<int64_t>(R * stride, 1);
  Lines<char, R> row(w, stride), later(w + (kAtLeast + next - 1) / next * next, stride);
  int64_t c = 0;
  for (; c + kLine <= words; c += kLine) {
    if (first) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) __builtin_prefetch(later.line(r), 0, 2);
      later.move(kLine * kWord);
    }
#pragma GCC unroll 16
    for (int g = 0; g < kLine; g += kGroup, x += kRegisters * kLine) {
      __m512 some[kRegisters];
#pragma GCC unroll 2
      for (int p = 0; p < kRegisters; ++p) some[p] = V::load(x + p * kLine);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512 weights = repeat_group<piece>(row.line(r) + g * kWord);
#pragma GCC unroll 2
        for (int p = 0; p < kRegisters; ++p) {
          __m512& sum = sums[g / kGroup % S][r][p];
          sum = V::fma(weights, some[p], sum);
        }
      }
    }
    row.move(kLine * kWord);
  }
  for (; c < words; c += kGroup, x += kRegisters * kLine, row.move(kGroup * kWord)) {
    const auto left = static_cast<__mmask16>((1u << std::min<int64_t>(kGroup, words - c)) - 1);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512 weights = repeat_group<piece>(_mm512_maskz_loadu_ps(left, row.line(r)));
#pragma GCC unroll 2
      for (int p = 0; p < kRegisters; ++p) sums[0][r][p] = V::fma(weights, V::load(x + p * kLine), sums[0][r][p]);
    }
  }
  finish_rows<V, R, piece, S>(sums, inputs, out, ldo, add);
}

// R rows against all inputs, fewer at a time where that reads memory faster: on Zen 4 where four or fewer inputs leave
// time to read ahead, and with 8 where rows lie 1 or 2 KiB apart (a sixth).
template <class V, int R>
TINYCOMP_TARGET void all_pieces(const char* w, int64_t stride, int64_t words, const float* x, int64_t m, float* out,
                                int64_t ldo) {
  constexpr int kFew = std::min<int>(R, kBlockRows);
  constexpr int64_t kWord = sizeof(float);
  for (int64_t j = 0, piece; j < m; j += piece) {
    piece = piece_of(m - j);
    const bool few = piece < 8 || (piece == 8 && (stride == 1024 || stride == 2048));
    const auto tile = piece == 32   ? groups_tile<V, R, 32, 1>
                      : piece == 16 ? groups_tile<V, R, 16, 1>
                      : piece == 4  ? groups_tile<V, kFew, 4, 2>
                      : piece == 2  ? groups_tile<V, kFew, 2, 2>
                      : few         ? groups_tile<V, kFew, 8, 2>
                                    : groups_tile<V, R, 8, 1>;
    for (int64_t r = 0; r < R; r += few ? kFew : R)
      for (int64_t c = 0; c == 0 || c < words; c += V::chain)
        tile(w + r * stride + c * kWord, stride, std::min(V::chain, words - c), x + c * piece, std::min(piece, m - j),
             out + j * ldo + r, ldo, j == 0, c > 0);
    x += piece * padded_words(words);
  }
}

template <class V>
TINYCOMP_TARGET void dot_groups(const char* w, int64_t stride, int64_t rows, int64_t words, const float* x, int64_t m,
                                float* out, int64_t ldo) {
  constexpr int64_t kRows = 2 * kBlockRows;
  for (int64_t i = 0; i < rows && rows >= kRows; i += kRows) {
    i = std::min(i, rows - kRows);  // the last rows once more, to the same results
    all_pieces<V, kRows>(w + i * stride, stride, words, x, m, out + i, ldo);
  }
  for (int64_t i = 0; i < rows && rows < kRows; ++i)
    all_pieces<V, 1>(w + i * stride, stride, words, x, m, out + i, ldo);
}

}  // namespace
}  // namespace tinycomp
