// dot.h for AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
#include <immintrin.h>

#define TINYCOMP_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))

#include "avx512.h"
#include "dot_kernels.h"
#include "interleaved_avx512.h"

namespace tinycomp {

const DotTable avx512_dot = make_table<Avx512>(dot_groups<Avx512>, interleave_words);

}  // namespace tinycomp
#endif
