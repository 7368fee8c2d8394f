// rounded.h for AMX: tiles of 16 rows of 64 levels against 16 inputs rounded to 8 bits.
#include "amx.h"
#include "rounded.h"

#if TINYCOMP_HAS_AMX
#define TINYCOMP_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-int8,avx2,fma")))

#include "tiles.h"

namespace tinycomp {
namespace {

constexpr int64_t kLine = kTile * kWord;  // levels of a row of a tile
constexpr int64_t kGroupsAhead = 8;

TINYCOMP_TARGET void arrange(const RoundedRows& w, const int8_t* levels, int64_t inputs, int8_t* to) {
  const int64_t width = group_width(w), words = width / kWord;
  for (int64_t g = 0; g < w.groups; ++g)
    interleave_block(reinterpret_cast<const char*>(levels + g * width), input_width(w), inputs, words, 0, words,
                     reinterpret_cast<float*>(to + g * width * tile_width(inputs)));
}

// Levels of a group of some rows as signed bytes, rows `group_width` apart.
TINYCOMP_TARGET void unpack(const RoundedRows& w, const uint8_t* from, int64_t rows, int64_t stored, int8_t* to) {
  const __m512i low = _mm512_set1_epi8(15), middle = _mm512_set1_epi8(8);
  const int64_t half = half_width(w);
  for (int64_t r = 0; r < rows; ++r, from += w.stride, to += group_width(w))
    for (int64_t c = 0; c < half; c += kLine) {
      const int64_t left = std::clamp<int64_t>(stored - c, 0, kLine);
      const auto there = left == kLine ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
      const __m512i bytes = _mm512_maskz_loadu_epi8(there, from + c);
      if (!w.four_bits) {
        _mm512_storeu_si512(to + c, bytes);
        continue;
      }
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
      _mm512_storeu_si512(to + c, _mm512_sub_epi8(_mm512_and_si512(bytes, low), middle));
      _mm512_storeu_si512(to + half + c, _mm512_sub_epi8(high, middle));
    }
}

// Weights and inputs of a group.
struct Group {
  const int8_t* w;
  int64_t stride, steps;
  const int8_t *x, *second;
  int64_t width, second_width;
};

// totals[r][j] += sums[r][j] row_scales[r] scales[j].
TINYCOMP_TARGET inline void add_scaled(const int32_t* sums, const float* row_scales, __m512 scales, int64_t rows,
                                       float* totals) {
  for (int64_t r = 0; r < rows; ++r) {
    const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + r * kTile)), scales);
    const __m512 total = _mm512_load_ps(totals + r * kTile);
    _mm512_store_ps(totals + r * kTile, _mm512_fmadd_ps(scaled, _mm512_set1_ps(row_scales[r]), total));
  }
}

// The products of a group on top of the totals of a part, four tiles of them.
template <int R, int P>
TINYCOMP_TARGET void run_group(const Part& part, Group g, const float* row_scales, const float* scales, float* totals) {
  begin_sums<R, P>();
  for (int64_t s = 0; s < g.steps; ++s) {
    _tile_loadd(6, g.x, g.width * kWord);
    _tile_loadd(4, g.w, g.stride);
    _tile_dpbssd(0, 4, 6);
    if constexpr (R == 2) {
      _tile_loadd(5, g.w + kTile * g.stride, g.stride);
      _tile_dpbssd(2, 5, 6);
    }
    if constexpr (P == 2) {
      _tile_loadd(7, g.second, g.second_width * kWord);
      _tile_dpbssd(1, 4, 7);
      if constexpr (R == 2) _tile_dpbssd(3, 5, 7);
    }
    g.w += kLine, g.x += kLine * g.width, g.second += kLine * g.second_width;
  }
  alignas(64) int32_t sums[4][kTile * kTile];
  _tile_stored(0, sums[0], kLine);
  if constexpr (P == 2) _tile_stored(1, sums[1], kLine);
  if constexpr (R == 2) _tile_stored(2, sums[2], kLine);
  if constexpr (R == 2 && P == 2) _tile_stored(3, sums[3], kLine);
  for (int64_t p = 0; p < P; ++p) {
    const int64_t inputs = std::min(kTile, part.inputs - p * kTile);
    const __m512 some = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << inputs) - 1), scales + p * kTile);
    for (int64_t r = 0; r < R; ++r)
      add_scaled(sums[2 * r + p], row_scales + r * kTile, some, std::min(kTile, part.rows - r * kTile),
                 totals + (2 * r + p) * kTile * kTile);
  }
}

TINYCOMP_TARGET void dot_tile_levels(const RoundedRows& w, int64_t rows, const RoundedLevels& inputs, int64_t m,
                                     float* out, int64_t ldo) {
  constexpr int64_t kTwo = 2 * kTile, kTotals = 4 * kTile * kTile;
  const int64_t passes = (m + kTwo - 1) / kTwo, width = group_width(w), all = input_width(w);
  const Scratch memory(kTileSlot, passes * kTotals + kTwo * width / kWord);
  float* const totals = memory.data();
  auto* const unpacked = reinterpret_cast<int8_t*>(totals + passes * kTotals);
  Part part{0, 0};
  for (int64_t i = 0; i < rows; i += kTwo) {
    const int64_t n = std::min(kTwo, rows - i);
    std::fill_n(totals, passes * kTotals, 0.0f);
    for (int64_t g = 0; g < w.groups; ++g) {
      const uint8_t* from = group_of(w, g) + i * w.stride;
      // Levels beyond the group meet inputs that are zero, but beyond the row there may be no memory.
      const bool in_place = !w.four_bits && g * w.group + width <= w.cols;
      if (!in_place) {
        unpack(w, from, n, w.four_bits ? (w.size(g) + 1) / 2 : w.size(g), unpacked);
        tiles_read(unpacked);
      }
      // Memory is asked for what comes some groups later, of these rows or of the next ones; short rows follow one
      // another so closely that the processor asks by itself.
      const int64_t later = g + kGroupsAhead, bytes = w.four_bits ? half_width(w) : width;
      const auto* ahead =
          later < w.groups ? group_of(w, later) + i * w.stride : group_of(w, later % w.groups) + (i + kTwo) * w.stride;
      for (int64_t r = 0; r < n && w.groups > kGroupsAhead; ++r)
        for (int64_t c = 0; c < bytes; c += kLine) __builtin_prefetch(ahead + r * w.stride + c, 0, 2);
      float row_scales[kTwo];
      for (int64_t r = 0; r < n; ++r)
        row_scales[r] = w.scales[(i + r) * w.scale_groups + (w.scale_groups == 1 ? 0 : g)];
      for (int64_t pass = 0; pass < passes; ++pass) {
        const int64_t j = pass * kTwo;
        const Part next{n, std::min(kTwo, m - j)};
        if (next.rows != part.rows || next.inputs != part.inputs) part = next, set_shapes(part);
        const int64_t one = tile_width(Part::first(part.inputs)), other = tile_width(Part::second(part.inputs));
        const int8_t* const x = inputs.levels + j * all;
        const Group group{in_place ? reinterpret_cast<const int8_t*>(from) : unpacked,
                          in_place ? w.stride : width,
                          width / kLine,
                          x + g * width * one,
                          x + kTile * all + g * width * other,
                          one,
                          other};
        const auto run = n > kTile ? (part.inputs > kTile ? run_group<2, 2> : run_group<2, 1>)
                                   : (part.inputs > kTile ? run_group<1, 2> : run_group<1, 1>);
        run(part, group, row_scales, inputs.scales + g * inputs.scale_step + j, totals + pass * kTotals);
      }
    }
    for (int64_t j = 0; j < m; j += kTile)
      for (int64_t r = 0; r < n; r += kTile)
        store_turned(totals + j / kTwo * kTotals + (r / kTile * 2 + j / kTile % 2) * kTile * kTile,
                     std::min(kTile, n - r), std::min(kTile, m - j), out + j * ldo + i + r, ldo, false);
  }
  _tile_release();
}

RoundedTable with_tiles(RoundedTable table) {
  table.dot_many_levels = dot_tile_levels, table.arrange = arrange;
  return table;
}

}  // namespace

// Made when it is first asked for: the other table may not be there before.
const RoundedTable& amx_rounded() {
  static const RoundedTable table = with_tiles(avx512vnni_rounded);
  return table;
}

}  // namespace tinycomp
#elif defined(__x86_64__)
namespace tinycomp {

const RoundedTable& amx_rounded() { return avx512vnni_rounded; }

}  // namespace tinycomp
#endif
