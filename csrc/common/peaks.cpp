// Peaks for the benchmark's ceilings: loops of one core over registers alone, and of torch's threads over memory alone.
#include "peaks.h"

#include <algorithm>
#include <numeric>

#include "amx.h"
#include "lanes.h"
#include "parallel.h"
#include "prefetch.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tinycomp {
namespace {

#if defined(__x86_64__)
constexpr int kChains = 12;  // independent sums: latency times throughput of either instruction is at most 10

__attribute__((target("avx512f,avx512vnni"))) double vnni512(int64_t n) {
  __m512i sums[kChains], a = _mm512_set1_epi8(1);
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; ++i) {
    for (auto& sum : sums) sum = _mm512_dpbusd_epi32(sum, a, a);
    asm volatile("" : "+v"(a));
  }
  for (int c = 1; c < kChains; ++c) sums[0] = _mm512_add_epi32(sums[0], sums[c]);
  return _mm512_reduce_add_epi32(sums[0]) == 1 ? 0 : 2.0 * 64 * kChains * n;
}

__attribute__((target("avx512f,avx512bf16"))) double bf16_512(int64_t n) {
  __m512 sums[kChains];
  __m512i a = _mm512_set1_epi32(0x3f003f00);  // halves
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; ++i) {
    const auto pairs = reinterpret_cast<__m512bh>(a);
    for (auto& sum : sums) sum = _mm512_dpbf16_ps(sum, pairs, pairs);
    asm volatile("" : "+v"(a));
  }
  for (int c = 1; c < kChains; ++c) sums[0] = _mm512_add_ps(sums[0], sums[c]);
  return _mm512_reduce_add_ps(sums[0]) == 1 ? 0 : 2.0 * 32 * kChains * n;
}

#if TINYCOMP_HAS_AMX
// Four tiles of sums, as many as one step of the kernels has: of 32 pairs of bfloat16, or of 64 bytes, in each row.
__attribute__((target("amx-tile,amx-bf16,amx-int8"))) double amx(int64_t n, bool bytes) {
  constexpr double kOperations = 4 * 2.0 * 16 * 16;
  TileShapes shapes;
  for (int tile = 0; tile < 8; ++tile) shapes.set(tile, kTile, kTile);
  shapes.use();
  for (int64_t i = 0; i < n && !bytes; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  for (int64_t i = 0; i < n && bytes; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return kOperations * (bytes ? 64 : 32) * n;
}
#endif

__attribute__((target("avx512f"))) double fma512(int64_t n) {
  __m512 sums[kChains], a = _mm512_set1_ps(0.5f);
  for (auto& sum : sums) sum = a;
  for (int64_t i = 0; i < n; ++i) {
    for (auto& sum : sums) sum = _mm512_fmadd_ps(sum, a, a);
    asm volatile("" : "+v"(a));
  }
  for (int c = 1; c < kChains; ++c) sums[0] = _mm512_add_ps(sums[0], sums[c]);
  return _mm512_reduce_add_ps(sums[0]) == 1 ? 0 : 2.0 * 16 * kChains * n;
}

__attribute__((target("avx2,fma"))) double fma256(int64_t n) {
  __m256 sums[kChains], a = _mm256_set1_ps(0.5f);
  for (auto& sum : sums) sum = a;
  for (int64_t i = 0; i < n; ++i) {
    for (auto& sum : sums) sum = _mm256_fmadd_ps(sum, a, a);
    asm volatile("" : "+x"(a));
  }
  for (int c = 1; c < kChains; ++c) sums[0] = _mm256_add_ps(sums[0], sums[c]);
  return _mm256_cvtss_f32(sums[0]) == 1 ? 0 : 2.0 * 8 * kChains * n;
}
#endif

}  // namespace

double run_peak(const std::string& instruction, int64_t n) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (instruction == "fma512" && __builtin_cpu_supports("avx512f")) return fma512(n);
  if (instruction == "vnni512" && __builtin_cpu_supports("avx512vnni")) return vnni512(n);
  if (instruction == "bf16_512" && __builtin_cpu_supports("avx512bf16")) return bf16_512(n);
  if (instruction == "fma256" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return fma256(n);
#endif
#if TINYCOMP_HAS_AMX
  if (instruction == "amx_bf16" && may_use_tiles()) return amx(n, false);
  if (instruction == "amx_int8" && may_use_tiles()) return amx(n, true);
#endif
  return 0;
}

namespace {

constexpr int64_t kLine = 16;  // words

uint32_t read_span(const uint32_t* from, int64_t n, int64_t rows) {
  constexpr int64_t kRow = 4096, kAhead = 2048;  // words: rows of 16 KB, 8 KB ahead
  uint32_t some[kLine] = {};
  vectorised([&] {
    uint32_t sums[kLine] = {};
    auto add = [&](const uint32_t* line) {
      for (int64_t k = 0; k < kLine; ++k) sums[k] += line[k];
    };
    int64_t i = 0;
    for (; rows > 1 && i + kRow * rows <= n; i += kRow * rows)
      for (int64_t c = 0; c < kRow; c += kLine)
        for (int64_t r = 0; r < rows; ++r) {
          const uint32_t* line = from + i + r * kRow + c;
          prefetch(line + rows * kRow);
          add(line);
        }
    for (; i + kLine <= n; i += kLine) {
      __builtin_prefetch(from + i + kAhead, 0, 2);
      add(from + i);
    }
    for (; i < n; ++i) sums[0] += from[i];
    std::copy_n(sums, kLine, some);
  });
  return std::accumulate(some, some + kLine, uint32_t{0});
}

}  // namespace

uint32_t read_words(const uint32_t* from, int64_t n, int64_t rows) {
  const int64_t threads =
      microseconds(4.0 * static_cast<double>(n), 0) < kWorthwhile ? 1 : torch::stable::get_num_threads();
  if (threads == 1) return read_span(from, n, rows);
  std::atomic<uint32_t> sum{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    const int64_t begin = n * first / threads / kLine * kLine,
                  end = last == threads ? n : n * last / threads / kLine * kLine;
    sum += read_span(from + begin, end - begin, rows);
  });
  return sum;
}

}  // namespace tinycomp
