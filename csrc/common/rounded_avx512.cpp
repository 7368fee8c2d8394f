// rounded.h for AVX-512 F, BW, DQ and VL without VNNI.
#if defined(__x86_64__)
#define TINYCOMP_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define TINYCOMP_VNNI 0

#include "rounded_avx512.h"

namespace tinycomp {

const RoundedTable avx512_rounded = make_avx512_rounded();

}  // namespace tinycomp
#endif
