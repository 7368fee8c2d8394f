// rounded.h for AVX-512 F, BW, DQ, VL and VNNI.
#if defined(__x86_64__)
#define TINYCOMP_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))
#define TINYCOMP_VNNI 1

#include "rounded_avx512.h"

namespace tinycomp {

const RoundedTable avx512vnni_rounded = make_avx512_rounded();

}  // namespace tinycomp
#endif
