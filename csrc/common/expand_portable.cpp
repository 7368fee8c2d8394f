// expand.h for any processor.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>

#include "expand.h"

namespace tinycomp {
namespace {

float value(Type type, const void* values, int64_t i) {
  switch (type) {
    case Type::f32:
      return static_cast<const float*>(values)[i];
    case Type::bf16:
      return static_cast<const torch::headeronly::BFloat16*>(values)[i];
    case Type::f16:
      return static_cast<const torch::headeronly::Half*>(values)[i];
    case Type::i8:
      return static_cast<const int8_t*>(values)[i];
    default: {
      const uint8_t byte = static_cast<const uint8_t*>(values)[i / 2];
      return static_cast<float>((i % 2 ? byte >> 4 : byte & 15) - 8);
    }
  }
}

int64_t expand_bits(Type type, const void* values, int64_t at, int64_t count, const uint16_t* mask, int64_t blocks,
                    float* out) {
  for (int64_t b = 0; b < blocks; ++b)
    for (int bit = 0; bit < 16; ++bit) {
      const bool kept = mask[b] >> bit & 1;
      if (kept && at >= count) return -1;
      out[16 * b + bit] = kept ? value(type, values, at++) : 0.0f;
    }
  return at;
}

float gather_scalar(Type type, const void* values, const uint16_t* index, int64_t count, const float* x) {
  float sums[8] = {};
  for (int64_t i = 0; i < count; ++i) sums[i % 8] += value(type, values, i) * x[index[i]];
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

void gather_rows(const float* values, const uint16_t* index, int64_t count, const float* x, int64_t ldx, int64_t inputs,
                 float* sums) {
  for (int64_t j = 0; j < inputs; ++j) sums[j] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float* row = x + index[i] * ldx;
    for (int64_t j = 0; j < inputs; ++j) sums[j] += values[i] * row[j];
  }
}

int64_t count_bits(const uint16_t* mask, int64_t blocks) {
  int64_t bits = 0;
  for (int64_t b = 0; b < blocks; ++b) bits += __builtin_popcount(mask[b]);
  return bits;
}

void gather_pairs(const float* values, const uint16_t* index, int64_t count, const uint32_t* x, float* sums) {
  for (int j = 0; j < 32; ++j) sums[j] = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int k = 0; k < 16; ++k) {
      const uint32_t word = x[16 * index[i] + k], low = word << 16, high = word & 0xffff0000;
      float both[2];
      __builtin_memcpy(&both[0], &low, 4), __builtin_memcpy(&both[1], &high, 4);
      sums[2 * k] += values[i] * both[0], sums[2 * k + 1] += values[i] * both[1];
    }
}

bool none(Type) { return false; }

// Two codes as the bits that they name.
constexpr std::array<uint8_t, 256> two_of_four = [] {
  std::array<uint8_t, 256> bits{};
  for (int byte = 0; byte < 256; ++byte) {
    const int low = 1 << (byte & 3) | 1 << (byte >> 2 & 3), high = 1 << (byte >> 4 & 3) | 1 << (byte >> 6 & 3);
    bits[byte] = static_cast<uint8_t>(low | high << 4);
  }
  return bits;
}();

// Set bits of a byte, in order, and how many they are.
struct SetBits {
  uint16_t places[8];
  int64_t count;
};
constexpr std::array<SetBits, 256> set_bits = [] {
  std::array<SetBits, 256> bits{};
  for (int byte = 0; byte < 256; ++byte)
    for (int i = 0; i < 8; ++i)
      if (byte >> i & 1) bits[byte].places[bits[byte].count++] = static_cast<uint16_t>(i);
  return bits;
}();

// Eight are written for each byte, wherever its own end.
void kept_columns(const uint16_t* mask, int64_t blocks, uint16_t* to) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(mask);
  for (int64_t b = 0; b < 2 * blocks; ++b) {
    const SetBits& bits = set_bits[bytes[b]];
    for (int i = 0; i < 8; ++i) to[i] = static_cast<uint16_t>(bits.places[i] + 8 * b);
    to += bits.count;
  }
}

}  // namespace

void code_bits(const uint8_t* codes, int64_t n, uint8_t* bits) {
  for (int64_t i = 0; i < n; ++i) bits[i] = two_of_four[codes[i]];
}

const ExpandTable portable_expand = {expand_bits, gather_scalar, nullptr,     gather_rows, gather_pairs, count_bits,
                                     none,        nullptr,       none,        nullptr,     nullptr,      16,
                                     nullptr,     code_bits,     kept_columns};

}  // namespace tinycomp
