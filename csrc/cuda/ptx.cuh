// Every PTX instruction the kernels use, once for the device and once for the emulation on the CPU; and the words in
// which device code is written for both. sm_80 instructions only.
#pragma once

#if defined(TINYCOMP_EMULATION)
#include "../emulation/cuda_on_cpu.h"
#define TINYCOMP_SHARED_MEMORY(T, name) T* name = reinterpret_cast<T*>(emulation::context.dynamic_shared)
#define TINYCOMP_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  emulation::launch(kernel, grid, block, shared_bytes, __VA_ARGS__)
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#define TINYCOMP_SHARED_MEMORY(T, name)                                    \
  extern __shared__ __align__(128) unsigned char tinycomp_shared_memory[]; \
  T* name = reinterpret_cast<T*>(tinycomp_shared_memory)
#define TINYCOMP_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#endif

namespace tinycomp::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(f16 v) { return __half2float(v); }
template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
  return __float2bfloat16(v);
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float v) {
  return __float2half(v);
}

// Eight numbers: what a thread moves at a time, 16 bytes in 16-bit types.
template <class T>
struct alignas(16) Eight {
  T at[8];
};

namespace ptx {

#if !defined(TINYCOMP_EMULATION)

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
// Copies 16 bytes to shared memory in the background; zeros if not `valid`.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of transposed matrices: what lies in a row of shared memory becomes a column.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
#define TINYCOMP_MMA(T, name)                                                                             \
  __device__ __forceinline__ void mma(T, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                   \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                             \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                     \
  }
TINYCOMP_MMA(bf16, "bf16")
TINYCOMP_MMA(f16, "f16")
#undef TINYCOMP_MMA
// The same on int8: 32 columns, four to a word.
__device__ __forceinline__ void mma(int8_t, int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Reads 16 bytes that nobody writes and that will not be read again: past the first-level cache.
__device__ __forceinline__ uint4 load_streamed(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
// The same value, of which the compiler knows nothing: what follows from it is not computed ahead.
__device__ __forceinline__ int64_t opaque(int64_t v) {
  asm volatile("" : "+l"(v));
  return v;
}
__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

#else

inline void aligned(const void* p, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emulation::fail(std::string(what) + " is not aligned to 16 bytes");
}
inline void copy_async(void* to, const void* from, bool valid) {
  aligned(to, "the target of an asynchronous copy");
  if (valid) aligned(from, "the source of an asynchronous copy");
  auto& pending = emulation::context.current->pending;
  pending.push_back({to, from, valid ? 16 : 0, valid ? 0 : 16});
  if (!emulation::options.lazy_copies) {
    std::vector<emulation::Copy> now;
    now.swap(pending);
    emulation::land(now);
  }
}
inline void commit_copies() {
  auto* t = emulation::context.current;
  t->groups.push_back(std::move(t->pending));
  t->pending.clear();
}
template <int N>
void wait_copies() {
  auto& groups = emulation::context.current->groups;
  while (static_cast<int>(groups.size()) > N) {
    emulation::land(groups.front());
    groups.erase(groups.begin());
  }
}
struct Matrices {
  const void* row;
  uint32_t* registers;
};
inline void load_matrices_of_warp(void** lanes, unsigned) {
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int lane = 0; lane < 32; ++lane) {
      const auto* row = static_cast<const char*>(static_cast<Matrices*>(lanes[matrix * 8 + lane / 4])->row);
      memcpy(&static_cast<Matrices*>(lanes[lane])->registers[matrix], row + lane % 4 * 4, 4);
    }
}
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  aligned(row, "a row of ldmatrix");
  Matrices m{row, r};
  emulation::collective(~0u, &m, load_matrices_of_warp, -1);
}
inline void load_transposed_of_warp(void** lanes, unsigned) {
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int lane = 0; lane < 32; ++lane)
      for (int h = 0; h < 2; ++h) {
        const int k = lane % 4 * 2 + h;
        const auto* row = static_cast<const char*>(static_cast<Matrices*>(lanes[matrix * 8 + k])->row);
        auto* to = reinterpret_cast<char*>(&static_cast<Matrices*>(lanes[lane])->registers[matrix]);
        memcpy(to + 2 * h, row + lane / 4 * 2, 2);
      }
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  aligned(row, "a row of ldmatrix");
  Matrices m{row, r};
  emulation::collective(~0u, &m, load_transposed_of_warp, -4);
}
template <class Sum>
struct Product {
  Sum* c;
  const uint32_t *a, *b;
};
inline int wide(int8_t v) { return v; }
template <class T>
float wide(T v) {
  return to_float(v);
}
template <class T>
auto part_of(uint32_t word, int part) {
  T value;
  memcpy(&value, reinterpret_cast<const char*>(&word) + sizeof(T) * part, sizeof(T));
  return wide(value);
}
template <class T, class Sum>
void mma_of_warp(void** lanes, unsigned) {
  constexpr int kParts = 4 / sizeof(T), kColumns = 8 * kParts;  // of a word; of the product
  Sum a[16][kColumns], b[kColumns][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* p = static_cast<Product<Sum>*>(lanes[lane]);
    for (int r = 0; r < 4; ++r)
      for (int i = 0; i < kParts; ++i)
        a[lane / 4 + 8 * (r & 1)][lane % 4 * kParts + i + 4 * kParts * (r >> 1)] = part_of<T>(p->a[r], i);
    for (int r = 0; r < 2; ++r)
      for (int i = 0; i < kParts; ++i) b[lane % 4 * kParts + i + 4 * kParts * r][lane / 4] = part_of<T>(p->b[r], i);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int r = 0; r < 4; ++r) {
      Sum sum = 0;
      for (int k = 0; k < kColumns; ++k) sum += a[lane / 4 + 8 * (r >> 1)][k] * b[k][lane % 4 * 2 + (r & 1)];
      static_cast<Product<Sum>*>(lanes[lane])->c[r] += sum;
    }
}
template <class T, class Sum>
void mma(T, Sum (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Product<Sum> p{c, a, b};
  emulation::collective(~0u, &p, mma_of_warp<T, Sum>, -2);
}
inline uint4 load_streamed(const uint4* p) {
  aligned(p, "a 16-byte load");
  return *p;
}
inline int64_t opaque(int64_t v) { return v; }
inline unsigned load_acquire(const unsigned* p) { return *p; }

#endif

}  // namespace ptx
}  // namespace tinycomp::cuda
