// Vectors of floats as wide as the instruction set has them, and loops over contiguous floats that the operators share.
//
// Sums over positions are made in floats for kChunk of them and added up in doubles, so that their error does not grow with the number of positions.
#pragma once

#include <algorithm>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "common.h"

namespace vec {

// Vectors of 8 floats whatever the instruction set.
namespace eight {

typedef float Vector __attribute__((vector_size(32)));
typedef float Unaligned __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int64_t kLanes = 8;

FASTFF_INLINE Vector read(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
FASTFF_INLINE void write(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }

}  // namespace eight

// Range of lanes to store in the last, partial vector.
struct Lanes {
  int64_t from, to;
};

#ifdef __AVX512F__

typedef float Vector __attribute__((vector_size(64)));
typedef float Unaligned __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int64_t kLanes = 16;
constexpr bool kMasks = true;  // vectors may reach past the last column: the lanes there are neither read nor written

FASTFF_INLINE Vector read(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
FASTFF_INLINE void write(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }

// Lanes 0 .. lanes.to - 1, zeros behind them.
FASTFF_INLINE __mmask16 mask_of(Lanes lanes) { return static_cast<__mmask16>((1u << lanes.to) - 1); }
FASTFF_INLINE Vector read_some(const float* p, Lanes lanes) { return (Vector)_mm512_maskz_loadu_ps(mask_of(lanes), p); }
FASTFF_INLINE void write_some(float* p, Vector v, bool add, Lanes lanes) {
  _mm512_mask_storeu_ps(p, mask_of(lanes), (__m512)(add ? read_some(p, lanes) + v : v));
}

#else

using eight::kLanes;
using eight::read;
using eight::Vector;
using eight::write;
constexpr bool kMasks = false;

FASTFF_INLINE Vector read_some(const float* p, Lanes) { return read(p); }
FASTFF_INLINE void write_some(float* p, Vector v, bool add, Lanes lanes) {
  float some[kLanes];
  write(some, v);
  for (int64_t l = lanes.from; l < lanes.to; ++l) p[l] = add ? p[l] + some[l] : some[l];
}

#endif

// y = x, y += x, y += factor * x, y = factor * x, y += constant
inline void copy(float* __restrict y, const float* __restrict x, int64_t n) { std::copy_n(x, n, y); }
inline void add(float* __restrict y, const float* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += x[i];
}
inline void add_scaled(float* __restrict y, float factor, const float* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}
inline void set_scaled(float* __restrict y, float factor, const float* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = factor * x[i];
}
inline void add_constant(float* y, float constant, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += constant;
}

// Terms of a sum of floats in one lane, and of one in all lanes that the compiler gives a loop (sanitizers keep it from giving more than one).
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kLoopLanes = 1;
#elif defined(__AVX512F__)
constexpr int64_t kLoopLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLoopLanes = 8;
#else
constexpr int64_t kLoopLanes = 4;
#endif
constexpr int64_t kChunk = 256, kLongChunk = kLoopLanes * kChunk;

// Sum of f(0) .. f(n - 1): in A for a chunk of them, and in doubles.
template <typename A = float, typename F>
FASTFF_INLINE double sum_of(int64_t n, const F& f, int64_t chunk = kLongChunk) {
  double total = 0;
  for (int64_t start = 0; start < n; start += chunk) {
    const int64_t end = std::min(start + chunk, n);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < end; ++i) sum += f(i);
    total += sum;
  }
  return total;
}
inline double dot(const float* x, const float* y, int64_t n) {
  return sum_of(n, [=](int64_t i) { return x[i] * y[i]; });
}
inline double total_of(const float* x, int64_t n) {
  return sum_of(n, [=](int64_t i) { return x[i]; });
}

// Sum of lines of C floats: in floats for `most` terms, and in doubles, which take memory only where there are more.
class LineSum {
 public:
  explicit LineSum(int64_t C, int64_t most = kChunk) : line(C), most(most) {}

  void add(const float* x) {
    vec::add(line.data(), x, line.size());
    added();
  }
  // What others add terms to, and what they tell then.
  float* data() { return line.data(); }
  void added(int64_t terms = 1) {
    if ((count += terms) >= most) flush();
  }
  // The sums so far.
  const float* result() {
    for (size_t c = 0; c < totals.size(); ++c) line[c] = static_cast<float>(totals[c] + line[c]);
    totals.clear();
    return line.data();
  }
  // Calls f(c, sum since the last call of this).
  template <typename F>
  void take(const F& f) {
    result();
    for (size_t c = 0; c < line.size(); ++c) f(c, line[c]);
    std::fill(line.begin(), line.end(), 0.0f);
    count = 0;
  }

 private:
  Buffer<float> line;
  Buffer<double> totals;
  int64_t most, count = 0;

  void flush() {
    totals.resize(line.size());  // zeros at first
    for (size_t c = 0; c < line.size(); ++c) totals[c] += line[c];
    std::fill(line.begin(), line.end(), 0.0f);
    count = 0;
  }
};

}  // namespace vec
