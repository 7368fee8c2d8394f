// dot.h for AVX-512 BF16: products of two bfloat16 numbers in 32 bits each, on what is else the float32 code.
#if defined(__x86_64__)
#include <immintrin.h>

#define TINYCOMP_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")))

#include "avx512.h"
#include "dot_kernels.h"
#include "interleaved_avx512.h"

namespace tinycomp {
namespace {

struct Avx512Pairs : Avx512 {
  static constexpr int64_t panels_from = 32, chain = 1 << 30;  // bfloat16 results show nothing of it
  TINYCOMP_TARGET static Vec fma(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

}  // namespace

const PairsTable avx512_pairs = {dot_typed<Avx512Pairs, float>, dot_groups<Avx512Pairs>, interleave_words, nullptr};

}  // namespace tinycomp
#endif
