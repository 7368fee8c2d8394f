// Fallback of rounded.h for any processor: plain loops over small vectors, whatever the compiler makes of them.
#define TINYCOMP_TARGET

#include "rounded_kernels.h"

namespace tinycomp {
namespace {

struct Portable {
  typedef float Vec __attribute__((vector_size(16)));
  struct Int {
    int32_t sums[4];
    uint8_t levels[16];
  };
  static constexpr int width = 4, bytes = 16, inputs = 2;

  static Vec zero() { return Vec{}; }
  static Vec set1(float v) { return Vec{v, v, v, v}; }
  static Vec mul(Vec a, Vec b) { return a * b; }
  static void store(float* p, Vec v) {
    for (int i = 0; i < width; ++i) p[i] = v[i];
  }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
  }
  static Vec load(const float* p) { return Vec{p[0], p[1], p[2], p[3]}; }
  static Vec load_i8(const uint8_t* p, int64_t n) {
    Vec v{};
    for (int i = 0; i < width && i < n; ++i) v[i] = static_cast<float>(static_cast<int8_t>(p[i]));
    return v;
  }
  static void load_u4(const uint8_t* p, int64_t n, Vec& low, Vec& high) {
    for (int i = 0; i < width; ++i) {
      const int byte = i < n ? p[i] : 0;
      low[i] = static_cast<float>((byte & 15) - 8);
      high[i] = static_cast<float>((byte >> 4) - 8);
    }
  }
  static Int no_sums() { return {}; }
  static Int load_sums(const int32_t* p) { return {{p[0], p[1], p[2], p[3]}, {}}; }
  static void store_sums(int32_t* p, const Int& v) { std::copy_n(v.sums, 4, p); }
  static Int set_bytes(int v) {
    return each({}, [v](int) { return v; });
  }
  static Int dot(Int to, const Int& levels, const Int& inputs) {
    for (int i = 0; i < bytes; ++i) to.sums[i / 4] += levels.levels[i] * static_cast<int8_t>(inputs.levels[i]);
    return to;
  }
  static Int dot_halves(const Int& to, const Int& v, const Int& even, const Int& odd) {
    const Int low = each(v, [](int level) { return level & 15; }), high = each(v, [](int level) { return level >> 4; });
    return dot(dot(to, low, even), high, odd);
  }
  static Int load_bytes(const uint8_t* p, int64_t n) {
    Int v{};
    std::copy_n(p, std::min<int64_t>(n, bytes), v.levels);
    return v;
  }
  template <class Change>
  static Int each(Int v, Change change) {
    for (uint8_t& level : v.levels) level = static_cast<uint8_t>(change(level));
    return v;
  }
  static Int offset(const Int& v) {
    return each(v, [](int level) { return level ^ 128; });
  }
  static Vec to_float(const Int& v) {
    Vec wide;
    for (int i = 0; i < width; ++i) wide[i] = static_cast<float>(v.sums[i]);
    return wide;
  }
  static float largest(const float* x, int64_t n) {
    float most = 0;
    for (int64_t i = 0; i < n; ++i) most = std::max(most, std::fabs(x[i]));
    return most;
  }
  static void round(const float* x, float factor, int64_t n, int8_t* levels) {
    for (int64_t i = 0; i < n; ++i) levels[i] = static_cast<int8_t>(std::nearbyint(x[i] * factor));
  }
};

}  // namespace

const RoundedTable portable_rounded = make_rounded<Portable>();

}  // namespace tinycomp
