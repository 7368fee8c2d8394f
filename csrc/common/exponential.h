// exp(x), vectorised by compilers.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace tinycomp {

// exp(x) of x <= 0, by Cody and Waite's reduction and the polynomial of the Cephes library; below -87 zero, NaN stays.
inline float exponential(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // its lowest bits are the power of two, rounded
  const float power = shifted - 12582912.0f;
  const float r = (x - power * 0.693359375f) + power * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    sum = sum * r + next;
  sum = sum * (r * r) + (r + 1.0f);
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = static_cast<int32_t>((static_cast<uint32_t>(bits) + 127u) << 23);
  float factor;
  std::memcpy(&factor, &bits, 4);
  return x < -87.0f ? 0.0f : sum * factor;
}

}  // namespace tinycomp
