// One sample as a matrix of what lies together in memory, [C, P], or [P, C] in channels_last: sums over groups of its channels or positions, and
// elementwise maps with a value for each channel or position. T: the type in memory; arithmetic in float32 (float64 for float64), chunks of sums in
// float64.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common.h"
#include "vec.h"

// Indices 0 .. n - 1 (channels, or positions) in groups bounds[j] .. bounds[j + 1] - 1; each index stands for `each` elements of a sample.
struct Partition {
  bool channels;
  int64_t each;
  Buffer<int64_t> bounds;

  int64_t count() const { return bounds.size() - 1; }
  int64_t elements(int64_t j) const { return (bounds[j + 1] - bounds[j]) * each; }

  // K groups of neighbouring channels: the first C % K have one channel more.
  static Partition of_channels(int64_t C, int64_t P, int64_t K) {
    Partition groups{true, P, {0}};
    for (int64_t k = 0; k < K; ++k) groups.bounds.push_back(groups.bounds.back() + C / K + (k < C % K));
    return groups;
  }
  static Partition of_positions(int64_t C, int64_t P) {
    Partition groups{false, C, {}};
    for (int64_t p = 0; p <= P; ++p) groups.bounds.push_back(p);
    return groups;
  }
};

template <typename T>
class Sample {
 public:
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;

  Sample(int64_t C, int64_t P, bool channels_last)
      : channels_last(channels_last), outer(channels_last ? P : C), inner(channels_last ? C : P), lanes(inner),
        index_sums(std::max(C, P)) {}

  // Of each group, the sum of f(value, index).
  template <typename F>
  FASTFF_INLINE Buffer<double> sums(const T* x, const Partition& groups, const F& f) {
    Buffer<double> totals(groups.count());
    if (outer == 1 &&
        groups
            .channels) {  // features: a group lies together, and single sums of its channels would cost more than all else
      for (int64_t j = 0; j < groups.count(); ++j) {
        totals[j] = row_sum(x + groups.bounds[j], groups.bounds[j + 1] - groups.bounds[j],
                            [&](A v, int64_t i) { return f(v, groups.bounds[j] + i); });
      }
      return totals;
    }
    if (index_is_row(groups))
      for (int64_t o = 0; o < outer; ++o)
        index_sums[o] = row_sum(x + o * inner, inner, [&](A v, int64_t) { return f(v, o); });
    else
      column_sums(x, f);
    for (int64_t j = 0; j < groups.count(); ++j)
      for (int64_t i = groups.bounds[j]; i < groups.bounds[j + 1]; ++i) totals[j] += index_sums[i];
    return totals;
  }

  // y = f(x, index), indices as of the groups.
  template <typename F>
  FASTFF_INLINE void transform(const T* x, T* y, const Partition& groups, const F& f) {
    const bool by_row = index_is_row(groups);
    for (int64_t o = 0; o < outer; ++o) {
      const T* __restrict from = x + o * inner;
      T* __restrict to = y + o * inner;
      if (by_row) {
#pragma omp simd
        for (int64_t i = 0; i < inner; ++i) store(to + i, f(load<A>(from[i]), o));
      } else {
#pragma omp simd
        for (int64_t i = 0; i < inner; ++i) store(to + i, f(load<A>(from[i]), i));
      }
    }
  }

  // to[i]: the value of the group of index i.
  static void spread(const Partition& groups, const Buffer<double>& values, Buffer<A>& to) {
    to.resize(groups.bounds.back());
    for (int64_t j = 0; j < groups.count(); ++j)
      std::fill(to.begin() + groups.bounds[j], to.begin() + groups.bounds[j + 1], static_cast<A>(values[j]));
  }

 private:
  bool channels_last;
  int64_t outer, inner;  // the matrix in memory
  Buffer<A> lanes;
  Buffer<double> index_sums;

  bool index_is_row(const Partition& groups) const { return groups.channels != channels_last; }

  template <typename F>
  FASTFF_INLINE static double row_sum(const T* row, int64_t n, const F& f) {
    return vec::sum_of<A>(n, [&](int64_t i) { return f(load<A>(row[i]), i); }, vec::kChunk);
  }

  // index_sums[i] = sum over rows of f(value, i)
  template <typename F>
  FASTFF_INLINE void column_sums(const T* x, const F& f) {
    std::fill_n(index_sums.begin(), inner, 0.0);
    for (int64_t start = 0; start < outer; start += vec::kChunk) {
      std::fill(lanes.begin(), lanes.end(), A(0));
      A* __restrict to = lanes.data();
      for (int64_t o = start; o < std::min(start + vec::kChunk, outer); ++o) {
        const T* row = x + o * inner;
#pragma omp simd
        for (int64_t i = 0; i < inner; ++i) to[i] += f(load<A>(row[i]), i);
      }
      for (int64_t i = 0; i < inner; ++i) index_sums[i] += to[i];
    }
  }
};
