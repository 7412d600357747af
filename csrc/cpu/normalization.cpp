// fastff::normalize_native (normalization.h) on the CPU, and layer norm: each sample, over all its n elements in whatever order they lie, becomes
// (x - mean) / sqrt(var + eps) with the biased variance. float32, float64, bfloat16, float16; arithmetic in float32 (float64 for float64).
//
// Memory: x once and y once from main memory while a row fits in the core's cache; three passes over it there.
//   1  m = mean, rounded
//   2  d = x - m:  delta = mean(d), var = mean(d^2) - delta^2      (the corrected two-pass formula: when mean >> std
//   3  y = ((x - m) - delta) / sqrt(var + eps)                      the rounding of m drops out of mean and variance)
// Sums run over chunks in vector lanes, and over the chunks in float64. One thread owns a sample, so the number
// of threads does not change a bit of the result.

#include "normalization.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

using vec::kLongChunk;

template <typename T>
void layer_norm(const T* __restrict x, T* __restrict y, int64_t n, double eps) {
  using A = typename Sample<T>::A;
  const A mean = static_cast<A>(vec::sum_of<A>(n, [=](int64_t i) { return load<A>(x[i]); }) / n);

  double total_d = 0, total_dd = 0;
  for (int64_t start = 0; start < n; start += kLongChunk) {
    const int64_t end = std::min(start + kLongChunk, n);
    A sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares)
    for (int64_t i = start; i < end; ++i) {
      const A d = load<A>(x[i]) - mean;
      sum += d;
      squares += d * d;
    }
    total_d += sum;
    total_dd += squares;
  }
  const double delta = total_d / n;
  double var = total_dd / n - delta * delta;
  var = var < 0 ? 0 : var;  // written so that NaN stays NaN
  const A rstd = static_cast<A>(1 / std::sqrt(var + eps));
  const A shift = static_cast<A>(delta);

#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(y + i, ((load<A>(x[i]) - mean) - shift) * rstd);
}

template void layer_norm(const float*, float*, int64_t, double);
template void layer_norm(const double*, double*, int64_t, double);
template void layer_norm(const BFloat16Bits*, BFloat16Bits*, int64_t, double);
template void layer_norm(const HalfBits*, HalfBits*, int64_t, double);

namespace {

struct Normalize : spec::Part {
  using Part::Part;
  Tensor x = input("x");
  spec::Normalization normalization{in, "normalization_"};
};

std::vector<Tensor> normalize_native(const Normalize& given) {
  const Tensor &x = given.x, y = empty_like(x, is_channels_last(x));
  with_type("normalize_native", x, [&]<typename T>(T*) {
    const int64_t size = x.numel() / x.size(0), grain = std::max<int64_t>(1, 32768 / size);
    parallel_for(0, x.size(0), grain, [&](int64_t begin, int64_t end) {
      Normalizer<T> normalize(given.normalization, x.size(1), x.size(2) * x.size(3), is_channels_last(x));
      for (int64_t at = begin * size; at < end * size; at += size)
        normalize(static_cast<const T*>(x.const_data_ptr()) + at, writable<T>(y) + at);
    });
  });
  return {y};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastff, m) { m.def(spec::schema<Normalize>("normalize_native", "Tensor").c_str()); }
STABLE_TORCH_LIBRARY_IMPL(fastff, CPU, m) { m.impl("normalize_native", &spec::boxed<Normalize, normalize_native>); }
