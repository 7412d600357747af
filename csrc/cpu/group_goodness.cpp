// fastff::group_goodness_native: goodness without weights, its loss, its local gradient and the normalised output, one pass over whole samples on the CPU.
//
// x [B, C, H, W] -> g[b, j] = sum or mean over group j of x^power: groups of neighbouring channels with all their positions, or single positions with all
// channels. Losses over classes (cross-entropy), or over batches whose first half is positive and second half negative. Formulas: fastff/reference.py.
//
// A task takes one sample (a pair of them for the losses of differences) from goodness to gradient and next input while it is in its cache. Samples are read
// as matrices of what lies together in memory: [C, P], or [P, C] in channels_last. Arithmetic in float32 (float64 for float64), chunks of
// sums in float64; a sample belongs to one thread, so the number of threads changes no bit.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "common.h"
#include "tensors.h"

namespace {

using torch::headeronly::ScalarType;

enum Mode : int64_t { kGoodness = 0, kStep = 1, kBackward = 2, kNormalize = 3 };
enum Loss : int64_t { kCrossEntropy = 0, kSoftplus = 1, kSwish = 2, kSymba = 3, kSwishSymba = 4 };
enum Norm : int64_t { kNone = 0, kLayerNorm, kGroupNorm, kL2, kRms, kLayerNormChannels, kL2Channels, kRmsChannels };

constexpr int64_t kChunk = 256;

// Indices 0 .. n - 1 (channels, or positions) in groups bounds[j] .. bounds[j + 1] - 1; each index stands for `each` elements of a sample.
struct Groups {
  bool channels;
  int64_t each;
  std::vector<int64_t> bounds;

  int64_t count() const { return bounds.size() - 1; }
  int64_t elements(int64_t j) const { return (bounds[j + 1] - bounds[j]) * each; }
};

// The first C % K of K groups of channels have one channel more.
Groups channel_groups(int64_t C, int64_t P, int64_t K) {
  Groups groups{true, P, {0}};
  for (int64_t k = 0; k < K; ++k) groups.bounds.push_back(groups.bounds.back() + C / K + (k < C % K));
  return groups;
}

Groups single_positions(int64_t C, int64_t P) {
  Groups groups{false, C, {}};
  for (int64_t p = 0; p <= P; ++p) groups.bounds.push_back(p);
  return groups;
}

struct Problem {
  int64_t B, C, P, power, norm;
  bool rows, mean;
  Mode mode;
  Loss loss;
  double theta, tau, margin, smoothing, scale, eps;  // theta: alpha for the losses of differences
  const int64_t* target;
  Groups of_goodness, of_norm;

  bool paired() const { return loss == kSymba || loss == kSwishSymba; }
};

// One sample and what is made of it. T: its type, A: that of arithmetic.
template <typename T, typename A>
struct Sample {
  const Problem& p;
  int64_t outer, inner;  // the matrix in memory
  std::vector<A> lanes, first, second;
  std::vector<double> index_sums;

  explicit Sample(const Problem& problem)
      : p(problem), outer(p.rows ? p.P : p.C), inner(p.rows ? p.C : p.P), lanes(inner), first(std::max(p.C, p.P)), second(first.size()),
        index_sums(first.size()) {}

  // Of each group, the sum of f(value, index).
  template <typename F>
  FASTFF_INLINE std::vector<double> sums(const T* x, const Groups& groups, F f) {
    if (groups.channels != p.rows) {
      for (int64_t o = 0; o < outer; ++o) {
        double total = 0;
        for (int64_t start = 0; start < inner; start += kChunk) {
          A sum = 0;
          const T* row = x + o * inner;
          const int64_t end = std::min(start + kChunk, inner);
#pragma omp simd reduction(+ : sum)
          for (int64_t i = start; i < end; ++i) sum += f(load<A>(row[i]), o);
          total += sum;
        }
        index_sums[o] = total;
      }
    } else {
      std::fill_n(index_sums.begin(), inner, 0.0);
      for (int64_t start = 0; start < outer; start += kChunk) {
        std::fill(lanes.begin(), lanes.end(), A(0));
        A* __restrict to = lanes.data();
        for (int64_t o = start; o < std::min(start + kChunk, outer); ++o) {
          const T* row = x + o * inner;
#pragma omp simd
          for (int64_t i = 0; i < inner; ++i) to[i] += f(load<A>(row[i]), i);
        }
        for (int64_t i = 0; i < inner; ++i) index_sums[i] += to[i];
      }
    }
    std::vector<double> totals(groups.count());
    for (int64_t j = 0; j < groups.count(); ++j) {
      for (int64_t i = groups.bounds[j]; i < groups.bounds[j + 1]; ++i) totals[j] += index_sums[i];
    }
    return totals;
  }

  // y = f(x, index), indices as of the groups.
  template <typename F>
  FASTFF_INLINE void transform(const T* x, T* y, const Groups& groups, F f) {
    const bool by_row = groups.channels != p.rows;
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

  static void spread(const Groups& groups, const std::vector<double>& values, std::vector<A>& to) {
    for (int64_t j = 0; j < groups.count(); ++j) {
      std::fill(to.begin() + groups.bounds[j], to.begin() + groups.bounds[j + 1], static_cast<A>(values[j]));
    }
  }

  std::vector<double> goodness(const T* x) {
    std::vector<double> g = p.power == 2 ? sums(x, p.of_goodness, [](A v, int64_t) { return v * v; })
                                         : sums(x, p.of_goodness, [](A v, int64_t) { return v; });
    for (int64_t j = 0; p.mean && j < p.of_goodness.count(); ++j) g[j] /= p.of_goodness.elements(j);
    return g;
  }

  // dL/dx from d = dL/dg.
  void gradient(const T* x, std::vector<double> d, T* grad) {
    for (int64_t j = 0; j < p.of_goodness.count(); ++j) d[j] *= static_cast<double>(p.power) / (p.mean ? p.of_goodness.elements(j) : 1);
    spread(p.of_goodness, d, first);
    const A* factor = first.data();
    if (p.power == 2) {
      transform(x, grad, p.of_goodness, [=](A v, int64_t i) { return factor[i] * v; });
    } else {
      transform(x, grad, p.of_goodness, [=](A, int64_t i) { return factor[i]; });
    }
  }

  void normalize(const T* x, T* y) {
    const Groups& groups = p.of_norm;
    const bool centred = p.norm == kLayerNorm || p.norm == kGroupNorm || p.norm == kLayerNormChannels;
    const bool length = p.norm == kL2 || p.norm == kL2Channels;
    std::vector<double> mean(groups.count(), 0.0);
    if (centred) mean = sums(x, groups, [](A v, int64_t) { return v; });
    for (int64_t j = 0; centred && j < groups.count(); ++j) mean[j] /= groups.elements(j);
    spread(groups, mean, first);
    const A* centre = first.data();
    std::vector<double> factor = sums(x, groups, [=](A v, int64_t i) { return (v - centre[i]) * (v - centre[i]); });
    for (int64_t j = 0; j < groups.count(); ++j) {
      factor[j] = 1 / (length ? std::sqrt(factor[j]) + p.eps : std::sqrt(factor[j] / groups.elements(j) + p.eps));
    }
    spread(groups, factor, second);
    const A* by = second.data();
    transform(x, y, groups, [=](A v, int64_t i) { return (v - centre[i]) * by[i]; });
  }
};

double softplus(double z) { return z > 0 ? z + std::log1p(std::exp(-z)) : std::log1p(std::exp(z)); }
double sigmoid(double z) { return z >= 0 ? 1 / (1 + std::exp(-z)) : std::exp(z) / (1 + std::exp(z)); }

// The value of softplus or swish, and its derivative.
std::pair<double, double> threshold(Loss loss, double z) {
  const double s = sigmoid(z);
  if (loss == kSoftplus || loss == kSymba) return {softplus(z), s};
  return {z * s, s * (1 + z * (1 - s))};
}

// Loss of one sample over classes; d = scale dL/dg.
double cross_entropy(const Problem& p, const std::vector<double>& g, int64_t target, std::vector<double>& d) {
  const int64_t K = g.size();
  double top = -std::numeric_limits<double>::infinity(), total = 0, all = 0;
  std::vector<double> u(K);
  for (int64_t k = 0; k < K; ++k) {
    u[k] = p.tau * g[k] - (k == target ? p.margin : 0);
    top = u[k] > top || u[k] != u[k] ? u[k] : top;
    all += u[k];
  }
  for (int64_t k = 0; k < K; ++k) total += std::exp(u[k] - top);
  for (int64_t k = 0; k < K; ++k) {
    const double wanted = (k == target ? 1 - p.smoothing : 0) + p.smoothing / K;
    d[k] = p.scale * p.tau * (std::exp(u[k] - top) / total - wanted);
  }
  return top + std::log(total) - (1 - p.smoothing) * u[target] - p.smoothing / K * all;
}

// Losses of a sample of the positive (sign 1) or negative (-1) half, or of a pair.
double threshold_loss(const Problem& p, double sign, const std::vector<double>& g, std::vector<double>& d) {
  double total = 0;
  const double n = g.size();
  for (size_t j = 0; j < g.size(); ++j) {
    const auto [value, slope] = threshold(p.loss, sign * (p.theta - g[j]));
    total += value;
    d[j] = -sign * slope * p.scale / n;
  }
  return total / n;
}
double pair_loss(const Problem& p, const std::vector<double>& positive, const std::vector<double>& negative, std::vector<double>& d_positive,
                 std::vector<double>& d_negative) {
  double total = 0;
  const double n = positive.size();
  for (size_t j = 0; j < positive.size(); ++j) {
    const auto [value, slope] = threshold(p.loss, -p.theta * (positive[j] - negative[j]));
    total += value;
    d_negative[j] = p.theta * slope * p.scale / n;
    d_positive[j] = -d_negative[j];
  }
  return total / n;
}

template <typename T, typename A>
void run(const Problem& p, const Tensor& x, const MaybeTensor& d_given, const Tensor& g, const Tensor& losses, const Tensor& grad, const Tensor& normalized) {
  const int64_t n = p.C * p.P, J = p.of_goodness.count(), half = p.B / 2, units = p.mode == kStep && p.paired() ? half : p.B;
  const auto data = [](const Tensor& t) { return t.numel() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr; };
  const T* source = static_cast<const T*>(x.const_data_ptr());
  T *to_grad = data(grad), *to_normalized = data(normalized);
  A* to_g = g.numel() ? static_cast<A*>(g.mutable_data_ptr()) : nullptr;
  A* to_loss = losses.numel() ? static_cast<A*>(losses.mutable_data_ptr()) : nullptr;
  const A* given = d_given ? static_cast<const A*>(d_given->const_data_ptr()) : nullptr;
  torch::stable::parallel_for(0, units, std::max<int64_t>(1, 32768 / n), [&](int64_t begin, int64_t end) {
    Sample<T, A> sample(p);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t members = units < p.B ? 2 : 1;
      std::vector<double> score[2], d[2];
      for (int64_t m = 0; m < members; ++m) {
        const int64_t b = unit + m * half;
        d[m].resize(J);
        if (p.mode == kNormalize) continue;
        if (p.mode == kBackward) {
          std::copy_n(given + b * J, J, d[m].begin());
          continue;
        }
        score[m] = sample.goodness(source + b * n);
        for (int64_t j = 0; j < J; ++j) to_g[b * J + j] = static_cast<A>(score[m][j]);
      }
      if (p.mode == kGoodness) continue;
      if (p.mode == kStep) {
        double loss;
        if (p.loss == kCrossEntropy) {
          loss = cross_entropy(p, score[0], p.target[unit], d[0]);
        } else {
          loss = members == 2 ? pair_loss(p, score[0], score[1], d[0], d[1]) : threshold_loss(p, unit < half ? 1 : -1, score[0], d[0]);
        }
        to_loss[unit] = static_cast<A>(loss);
      }
      for (int64_t m = 0; m < members; ++m) {
        const int64_t b = unit + m * half;
        if (to_grad) sample.gradient(source + b * n, d[m], to_grad + b * n);
        if (to_normalized) sample.normalize(source + b * n, to_normalized + b * n);
      }
    }
  });
}

// x [B, C, H, W], not empty, on the CPU; target [B] int64 in 0 .. K - 1 for cross-entropy; d [B, J]; scale_factor one float32: as
// fastff/kernels/native/group_goodness.py sees to. Absent results are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> group_goodness_native(
    Tensor x, MaybeTensor target, MaybeTensor d, MaybeTensor scale_factor, int64_t mode, int64_t groups, int64_t power, bool mean, bool positions,
    int64_t loss, double theta, double tau, double margin, double smoothing, double scale, int64_t norm, double eps, bool need_x) {
  x = dense(x), target = packed(target), d = packed(d);
  const int64_t B = x.size(0), C = x.size(1), P = x.size(2) * x.size(3);
  if (scale_factor) scale *= *floats(scale_factor);
  const bool by_position = norm == kLayerNormChannels || norm == kL2Channels || norm == kRmsChannels;
  Problem p{B, C, P, power, norm, is_rows(x), mean, static_cast<Mode>(mode), static_cast<Loss>(loss), theta, tau, margin, smoothing, scale, eps,
            target ? static_cast<const int64_t*>(target->const_data_ptr()) : nullptr,
            positions ? single_positions(C, P) : channel_groups(C, P, groups),
            by_position ? single_positions(C, P) : channel_groups(C, P, norm == kGroupNorm ? groups : 1)};

  const int32_t numbers = x.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const bool step = p.mode == kStep;
  Tensor g = empty(x, p.mode == kGoodness || step ? std::vector<int64_t>{B, p.of_goodness.count()} : std::vector<int64_t>{0}, numbers);
  Tensor losses = empty(x, {step ? (p.paired() ? B / 2 : B) : 0}, numbers);
  Tensor grad = need_x && (step || p.mode == kBackward) ? empty_like(x, p.rows) : absent(x);
  Tensor normalized = norm != kNone && (step || p.mode == kNormalize) ? empty_like(x, p.rows) : absent(x);
  switch (x.scalar_type()) {
    case ScalarType::Float: run<float, float>(p, x, d, g, losses, grad, normalized); break;
    case ScalarType::Double: run<double, double>(p, x, d, g, losses, grad, normalized); break;
    case ScalarType::BFloat16: run<BFloat16Bits, float>(p, x, d, g, losses, grad, normalized); break;
    case ScalarType::Half: run<HalfBits, float>(p, x, d, g, losses, grad, normalized); break;
    default: STD_TORCH_CHECK(false, "group_goodness_native: x must be float32, float64, bfloat16 or float16, got ",
                             torch::headeronly::toString(x.scalar_type()));
  }
  return {g, losses, grad, normalized};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastff, m) {
  m.def(
      "group_goodness_native(Tensor x, Tensor? target, Tensor? d, Tensor? scale_factor, int mode, int groups, int power, bool mean, bool positions, "
      "int loss, float theta, float tau, float margin, float smoothing, float scale, int norm, float eps, bool need_x) "
      "-> (Tensor g, Tensor losses, Tensor grad_x, Tensor normalized)");
}
STABLE_TORCH_LIBRARY_IMPL(fastff, CPU, m) { m.impl("group_goodness_native", TORCH_BOX(&group_goodness_native)); }
