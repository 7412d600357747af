// The next block's input: a sample brought to length or variance 1, for operators that have it in their cache. Formulas: fastff/reference.py.
#pragma once

#include <cmath>

#include "sample.h"
#include "spec.h"

// Layer norm over all n elements of a sample, in whatever order they lie (normalization.cpp). T: float, double, BFloat16Bits or HalfBits.
template <typename T>
void layer_norm(const T* x, T* y, int64_t n, double eps);

template <typename T>
class Normalizer {
 public:
  Normalizer(const spec::Normalization& given, int64_t C, int64_t P, bool channels_last)
      : name(given.name), eps(given.eps), size(C * P), sample(C, P, channels_last),
        groups(is_of_positions() ? Partition::of_positions(C, P)
                                 : Partition::of_channels(C, P, name == Name::group_norm ? given.groups : 1)) {}

  void operator()(const T* x, T* y) {
    if (name == Name::layer_norm) return layer_norm(x, y, size, eps);
    const bool centred = name == Name::group_norm || name == Name::layer_norm_channels;
    const bool length = name == Name::l2 || name == Name::l2_channels;
    Buffer<double> mean(groups.count(), 0.0);
    if (centred) mean = sample.sums(x, groups, [](A v, int64_t) { return v; });
    for (int64_t j = 0; centred && j < groups.count(); ++j) mean[j] /= groups.elements(j);
    sample.spread(groups, mean, centres);
    const A* centre = centres.data();
    Buffer<double> factor = sample.sums(x, groups, [=](A v, int64_t i) { return (v - centre[i]) * (v - centre[i]); });
    for (int64_t j = 0; j < groups.count(); ++j)
      factor[j] = length && factor[j] == 0  // zeros stay zero
                      ? 0
                      : 1 / (length ? std::sqrt(factor[j]) + eps : std::sqrt(factor[j] / groups.elements(j) + eps));
    sample.spread(groups, factor, factors);
    const A* by = factors.data();
    sample.transform(x, y, groups, [=](A v, int64_t i) { return (v - centre[i]) * by[i]; });
  }

 private:
  using A = typename Sample<T>::A;
  using Name = spec::NormalizationName;

  Name name;
  double eps;
  int64_t size;
  Sample<T> sample;
  Partition groups;
  Buffer<A> centres, factors;

  bool is_of_positions() const {
    return name == Name::layer_norm_channels || name == Name::l2_channels || name == Name::rms_channels;
  }
};
