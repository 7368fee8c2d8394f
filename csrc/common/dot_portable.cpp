// Fallback of dot.h for any processor: vector extensions of GCC and Clang, whatever the target makes of them.
#define TINYCOMP_TARGET

#include "dot_kernels.h"

namespace tinycomp {
namespace {

struct Portable {
  typedef float Vec __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  static constexpr int width = 4, inputs = 2, panel_inputs = 4;
  static constexpr int64_t panels_from = kPanelInputs;
  static constexpr bool narrows = false;

  static Vec zero() { return Vec{}; }
  static Vec set1(float v) { return Vec{v, v, v, v}; }
  static Vec add(Vec a, Vec b) { return a + b; }
  static void transpose(Vec (&v)[4]) {
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < i; ++j) {
        const float value = v[i][j];
        v[i][j] = v[j][i], v[j][i] = value;
      }
  }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  template <class T>
  static Vec load(const T* p) {
    Vec v;
    for (int i = 0; i < width; ++i) v[i] = static_cast<float>(p[i]);
    return v;
  }
  static Vec load_pairs(const torch::headeronly::BFloat16* p) {
    Vec v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  // The first of two numbers in memory is the lower half of 32 bits only where bytes ascend.
  static Vec lower(Vec v) { return reinterpret_cast<Vec>(reinterpret_cast<Bits>(v) << 16); }
  static Vec upper(Vec v) { return reinterpret_cast<Vec>(reinterpret_cast<Bits>(v) & 0xffff0000); }
  static constexpr bool ascending = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
  static Vec first(Vec v) { return ascending ? lower(v) : upper(v); }
  static Vec second(Vec v) { return ascending ? upper(v) : lower(v); }
  template <class T>
  static Vec load_first(const T* p, int64_t n) {
    T padded[width] = {};
    std::copy_n(p, n, padded);
    return load(padded);
  }
  static void store(float* p, Vec v) {
    for (int i = 0; i < width; ++i) p[i] = v[i];
  }
  static float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
  }
};

}  // namespace

const DotTable portable_dot = make_table<Portable>();

}  // namespace tinycomp
