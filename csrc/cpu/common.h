// Shared by the CPU operators. The whole folder is compiled once for each instruction set of setup.py's LEVELS, as one library each.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#define FASTFF_INLINE inline __attribute__((always_inline))
#define FASTFF_UNROLL _Pragma("GCC unroll 16")  // before a loop over registers: none has more turns

// Numbers in memory of the operators' own. Where there is none left, an error says how much was asked for.
template <typename T>
struct Memory {
  using value_type = T;

  T* allocate(size_t n) {
    void* memory = ::operator new(n * sizeof(T), std::nothrow);
    STD_TORCH_CHECK(memory, "not enough memory: the compiled library could not allocate ", n * sizeof(T), " bytes");
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) { ::operator delete(memory); }
  bool operator==(const Memory&) const { return true; }
};
template <typename T>
using Buffer = std::vector<T, Memory<T>>;

// 16-bit floats as bits, and their conversions as branch-free integer arithmetic, which GCC vectorises; it leaves the
// conversions of torch's own BFloat16 and Half scalar (layer norm took 5 and 3.5 times as long with them).
struct BFloat16Bits {
  uint16_t bits;
};
struct HalfBits {
  uint16_t bits;
};

FASTFF_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTFF_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename A>
FASTFF_INLINE A load(float value) {
  return value;
}
template <typename A>
FASTFF_INLINE A load(double value) {
  return value;
}
template <typename A>
FASTFF_INLINE A load(BFloat16Bits value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}
template <typename A>
FASTFF_INLINE A load(HalfBits value) {
  const uint32_t magnitude = value.bits & 0x7fffu, sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t scaled = bits_of(float_of(magnitude << 13) * 0x1p112f);  // moves the exponent's bias; exact
  const uint32_t infinite = magnitude >= 0x7c00u ? 0x7f800000u : 0u;      // infinity, NaN
  return float_of(scaled | infinite | sign);
}

// Rounding to nearest, ties to even; NaN stays NaN.
FASTFF_INLINE void store(float* target, float value) { *target = value; }
FASTFF_INLINE void store(double* target, double value) { *target = value; }
FASTFF_INLINE void store(BFloat16Bits* target, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  target->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
FASTFF_INLINE void store(HalfBits* target, float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu, sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // below 2^-14: in units of 2^-24
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds to 2^16 or more: infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  target->bits = static_cast<uint16_t>(half | sign);
}

// e^x to about one unit in the last place, branch-free, for loops that GCC vectorises (std::exp is a call an element): x = n ln 2 + r,
// |r| <= ln 2 / 2, a polynomial of degree 6 for e^r (Taylor's), 2^n through the exponent's bits.
FASTFF_INLINE float exp_of(float x) {
  const float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to whole numbers
  const float n = shifted - 12582912.0f;
  const float r = (bounded - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  const float value = (p * r * r + r) + 1.0f;
  const uint32_t exponent = (bits_of(shifted) << 23) + (127u << 23);  // the low bits of `shifted` are n
  const float result = value * float_of(exponent);
  return x != x ? x : result;
}
