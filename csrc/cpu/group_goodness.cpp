// fastff::group_goodness_native: goodness without weights, its loss, its local gradient and the normalised output, one pass over whole samples on the CPU.
//
// x [B, C, H, W] -> g[b, j] = sum or mean over group j of x^power: groups of neighbouring channels with all their positions, or single positions with all
// channels. Losses over classes (cross-entropy), or over batches whose first half is positive and second half negative. Formulas: fastff/reference.py.
//
// A task takes one sample (a pair of them for the losses of differences) from goodness to gradient and next input while it is in its cache. Samples are read
// as matrices of what lies together in memory: [C, P], or [P, C] in channels_last. Arithmetic in float32 (float64 for float64), chunks of
// sums in float64; a sample belongs to one thread, so the number of threads changes no bit.
//
// fastff::group_tail_native: the same on x = activation(batch_norm(y) + residual), float32, with the gradients back to y (batch_norm.h): x stays in the
// task's cache. Reads y three times and the residual twice, writes dL/dy twice and the next input.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "batch_norm.h"
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
    std::vector<double> totals(groups.count());
    if (outer == 1 && groups.channels) {  // features: a group lies together, and single sums of its channels would cost more than all else
      for (int64_t j = 0; j < groups.count(); ++j) {
        for (int64_t start = groups.bounds[j]; start < groups.bounds[j + 1]; start += kChunk) {
          A sum = 0;
          const int64_t end = std::min(start + kChunk, groups.bounds[j + 1]);
#pragma omp simd reduction(+ : sum)
          for (int64_t i = start; i < end; ++i) sum += f(load<A>(x[i]), i);
          totals[j] += sum;
        }
      }
      return totals;
    }
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

// With a `tail` x is what it gives, and its two sums [2, C] go to tail_sums. Its sums are kept for 16 shares of the batch, whatever the threads.
template <typename T, typename A>
void run(const Problem& p, const T* source, const BatchNorm* tail, float* tail_sums, const MaybeTensor& d_given, const Tensor& g, const Tensor& losses,
         const Tensor& grad, const Tensor& normalized) {
  const int64_t n = p.C * p.P, J = p.of_goodness.count(), half = p.B / 2, units = p.mode == kStep && p.paired() ? half : p.B;
  const auto data = [](const Tensor& t) { return t.numel() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr; };
  T *to_grad = data(grad), *to_normalized = data(normalized);
  A* to_g = g.numel() ? static_cast<A*>(g.mutable_data_ptr()) : nullptr;
  A* to_loss = losses.numel() ? static_cast<A*>(losses.mutable_data_ptr()) : nullptr;
  const A* given = d_given ? static_cast<const A*>(d_given->const_data_ptr()) : nullptr;
  const int64_t shares = tail ? std::min<int64_t>(units, 16) : units, members = units < p.B ? 2 : 1;
  std::vector<float> sums(tail ? shares * 2 * p.C : 0);
  torch::stable::parallel_for(0, shares, tail ? 1 : std::max<int64_t>(1, 32768 / n), [&](int64_t begin, int64_t end) {
    Sample<T, A> sample(p);
    std::vector<T> made(tail ? members * n : 0);
    for (int64_t share = begin; share < end; ++share) {
      for (int64_t unit = share * units / shares; unit < (share + 1) * units / shares; ++unit) {
        std::vector<double> score[2], d[2];
        const T* x[2];
        for (int64_t m = 0; m < members; ++m) {
          const int64_t b = unit + m * half;
          x[m] = tail ? made.data() + m * n : source + b * n;
          if constexpr (std::is_same_v<T, float>) {
            if (tail) tail->forward(b, 1, made.data() + m * n);
          }
          d[m].resize(J);
          if (p.mode == kNormalize) continue;
          if (p.mode == kBackward) {
            std::copy_n(given + b * J, J, d[m].begin());
            continue;
          }
          score[m] = sample.goodness(x[m]);
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
          if (to_grad) sample.gradient(x[m], d[m], to_grad + b * n);
          if (to_normalized) sample.normalize(x[m], to_normalized + b * n);
          if constexpr (std::is_same_v<T, float>) {
            if (tail) tail->backward(b, 1, to_grad + b * n, sums.data() + share * 2 * p.C);
          }
        }
      }
    }
  });
  for (int64_t share = 0; tail && share < shares; ++share) {
    for (int64_t i = 0; i < 2 * p.C; ++i) tail_sums[i] += sums[share * 2 * p.C + i];
  }
}

Problem problem_of(const Tensor& x, const MaybeTensor& target, const MaybeTensor& scale_factor, int64_t mode, int64_t groups, int64_t power, bool mean,
                   bool positions, int64_t loss, double theta, double tau, double margin, double smoothing, double scale, int64_t norm, double eps) {
  const int64_t B = x.size(0), C = x.size(1), P = x.size(2) * x.size(3);
  if (scale_factor) scale *= *floats(scale_factor);
  const bool by_position = norm == kLayerNormChannels || norm == kL2Channels || norm == kRmsChannels;
  return {B, C, P, power, norm, is_rows(x), mean, static_cast<Mode>(mode), static_cast<Loss>(loss), theta, tau, margin, smoothing, scale, eps,
          target ? static_cast<const int64_t*>(target->const_data_ptr()) : nullptr,
          positions ? single_positions(C, P) : channel_groups(C, P, groups),
          by_position ? single_positions(C, P) : channel_groups(C, P, norm == kGroupNorm ? groups : 1)};
}

// x [B, C, H, W], not empty, on the CPU; target [B] int64 in 0 .. K - 1 for cross-entropy; d [B, J]; scale_factor one float32: as
// fastff/kernels/native/group_goodness.py sees to. Absent results are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> group_goodness_native(
    Tensor x, MaybeTensor target, MaybeTensor d, MaybeTensor scale_factor, int64_t mode, int64_t groups, int64_t power, bool mean, bool positions,
    int64_t loss, double theta, double tau, double margin, double smoothing, double scale, int64_t norm, double eps, bool need_x) {
  x = dense(x), target = packed(target), d = packed(d);
  const Problem p = problem_of(x, target, scale_factor, mode, groups, power, mean, positions, loss, theta, tau, margin, smoothing, scale, norm, eps);
  const int64_t B = p.B;
  const int32_t numbers = x.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const bool step = p.mode == kStep;
  Tensor g = empty(x, p.mode == kGoodness || step ? std::vector<int64_t>{B, p.of_goodness.count()} : std::vector<int64_t>{0}, numbers);
  Tensor losses = empty(x, {step ? (p.paired() ? B / 2 : B) : 0}, numbers);
  Tensor grad = need_x && (step || p.mode == kBackward) ? empty_like(x, p.rows) : absent(x);
  Tensor normalized = norm != kNone && (step || p.mode == kNormalize) ? empty_like(x, p.rows) : absent(x);
  const void* const from = x.const_data_ptr();
  switch (x.scalar_type()) {
    case ScalarType::Float: run<float, float>(p, static_cast<const float*>(from), nullptr, nullptr, d, g, losses, grad, normalized); break;
    case ScalarType::Double: run<double, double>(p, static_cast<const double*>(from), nullptr, nullptr, d, g, losses, grad, normalized); break;
    case ScalarType::BFloat16: run<BFloat16Bits, float>(p, static_cast<const BFloat16Bits*>(from), nullptr, nullptr, d, g, losses, grad, normalized); break;
    case ScalarType::Half: run<HalfBits, float>(p, static_cast<const HalfBits*>(from), nullptr, nullptr, d, g, losses, grad, normalized); break;
    default: STD_TORCH_CHECK(false, "group_goodness_native: x must be float32, float64, bfloat16 or float16, got ",
                             torch::headeronly::toString(x.scalar_type()));
  }
  return {g, losses, grad, normalized};
}

// y [B, C, H, W] float32, the residual of its shape; the rest as above.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_tail_native(
    Tensor y, MaybeTensor residual, MaybeTensor bn_weight, MaybeTensor bn_bias, double bn_eps, int64_t activation, bool need_residual,
    MaybeTensor target, MaybeTensor scale_factor, int64_t groups, int64_t power, bool mean, bool positions, int64_t loss, double theta, double tau,
    double margin, double smoothing, double scale, int64_t norm, double eps) {
  y = dense(y), target = packed(target), bn_weight = packed(bn_weight), bn_bias = packed(bn_bias);
  residual = lying_as(residual, y);
  const Problem p = problem_of(y, target, scale_factor, kStep, groups, power, mean, positions, loss, theta, tau, margin, smoothing, scale, norm, eps);
  Tensor g = empty(y, {p.B, p.of_goodness.count()}), losses = empty(y, {p.paired() ? p.B / 2 : p.B}), grad = empty_like(y, p.rows);
  Tensor normalized = norm != kNone ? empty_like(y, p.rows) : absent(y), averages = empty(y, {p.C}), variances = empty(y, {p.C});
  Tensor grad_bn_weight = empty(y, {p.C}), grad_bn_bias = empty(y, {p.C}), grad_y = need_residual ? empty_like(y, p.rows) : grad;
  const BatchNorm tail(floats(y), floats(residual), floats(bn_weight), floats(bn_bias), static_cast<float>(bn_eps), p.B, p.C, p.P, p.rows,
                       static_cast<Activation>(activation), writable(averages), writable(variances));
  std::vector<float> sums(2 * p.C);
  run<float, float>(p, nullptr, &tail, sums.data(), {}, g, losses, grad, normalized);
  tail.finish(writable(grad), sums.data(), writable(grad_y));
  tail.parameter_gradients(sums.data(), writable(grad_bn_weight), writable(grad_bn_bias));
  return {g, losses, grad_y, normalized, need_residual ? grad : absent(y), grad_bn_weight, grad_bn_bias, averages, variances};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastff, m) {
  m.def(
      "group_goodness_native(Tensor x, Tensor? target, Tensor? d, Tensor? scale_factor, int mode, int groups, int power, bool mean, bool positions, "
      "int loss, float theta, float tau, float margin, float smoothing, float scale, int norm, float eps, bool need_x) "
      "-> (Tensor g, Tensor losses, Tensor grad_x, Tensor normalized)");
  m.def(
      "group_tail_native(Tensor y, Tensor? residual, Tensor? bn_weight, Tensor? bn_bias, float bn_eps, int activation, bool need_residual, "
      "Tensor? target, Tensor? scale_factor, int groups, int power, bool mean, bool positions, int loss, float theta, float tau, float margin, "
      "float smoothing, float scale, int norm, float eps) -> (Tensor g, Tensor losses, Tensor grad_y, Tensor normalized, Tensor grad_residual, "
      "Tensor grad_bn_weight, Tensor grad_bn_bias, Tensor mean, Tensor var)");
}
STABLE_TORCH_LIBRARY_IMPL(fastff, CPU, m) {
  m.impl("group_goodness_native", TORCH_BOX(&group_goodness_native));
  m.impl("group_tail_native", TORCH_BOX(&group_tail_native));
}
