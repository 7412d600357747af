// Losses of goodness and their gradients, for both kinds of goodness, with the arguments that describe them. Arithmetic is in double; formulas: fastff/reference.py.
//
//   cross_entropy        logsumexp(u) - sum_k q[k] u[k],  u = tau g, lowered by the margin at the target;  d = tau scale (softmax(u) - q)
//   softplus, swish      mean over j of f(theta - g[j]) of a positive sample, f(g[j] - theta) of a negative one
//   symba, swish_symba   mean over j of f(-alpha (g_positive[j] - g_negative[j])), one loss a pair
#pragma once

#include <cmath>
#include <limits>
#include <utility>

#include "common.h"
#include "spec.h"

namespace spec {

enum class LossName { cross_entropy, softplus, swish, symba, swish_symba };
enum class Reduction { mean, sum, none };

struct Loss : Part {
  using Part::Part;
  LossName name = choice<LossName>("name");
  MaybeTensor target = tensor("target");  // [B] int64
  double tau = number("tau");
  MaybeTensor learned_tau = tensor("learned_tau");
  double margin = number("margin");
  double label_smoothing = number("label_smoothing");
  double theta = number("theta");
  double theta_gap = number("theta_gap");
  double alpha = number("alpha");
  Reduction reduction = choice<Reduction>("reduction");
  MaybeTensor grad_scale = tensor("grad_scale");
};

}  // namespace spec

class Loss {
 public:
  Loss(const spec::Loss& given, int64_t B)
      : given(given), half(B / 2),
        target(given.target ? static_cast<const int64_t*>(given.target->const_data_ptr()) : nullptr),
        tau(given.tau * value_or_one(given.learned_tau)), members(is(Name::symba) || is(Name::swish_symba) ? 2 : 1),
        units(B / members),
        scale(value_or_one(given.grad_scale) / (given.reduction == spec::Reduction::mean ? units : 1)) {}

  // A loss is of a unit: one sample, or the pair of samples `unit` and `unit` + B / 2.
  int64_t count() const { return units; }
  int64_t samples() const { return members; }
  int64_t sample(int64_t unit, int64_t member) const { return unit + member * half; }

  // Loss of a unit whose samples have goodness g [samples, J]. d: scale dloss/dg; grad_tau: scale dloss/dlearned_tau, 0 without a tau.
  template <typename T>
  double operator()(int64_t unit, int64_t J, const T* g, T* d, double* grad_tau) const {
    *grad_tau = 0;
    if (is(Name::cross_entropy)) return cross_entropy(target[unit], J, g, d, grad_tau);
    return members == 2 ? of_pair(J, g, g + J, d, d + J) : of_sample(unit < half ? 1 : -1, J, g, d);
  }

 private:
  using Name = spec::LossName;
  const spec::Loss& given;
  int64_t half;
  const int64_t* target;
  double tau;
  int64_t members, units;
  double scale;

  bool is(Name name) const { return given.name == name; }

  static float exponential(float z) { return exp_of(z); }
  static double exponential(double z) { return std::exp(z); }

  template <typename T>
  double cross_entropy(int64_t hit, int64_t K, const T* g, T* d, double* grad_tau) const {
    const double t = tau, m = given.margin, factor = scale, label_smoothing = given.label_smoothing,
                 smooth = label_smoothing / K;
    const auto logit = [&](int64_t k) { return t * g[k] - (k == hit ? m : 0); };
    double top = -std::numeric_limits<double>::infinity(), sum = 0, total = 0, product = 0;
    for (int64_t k = 0; k < K; ++k) {
      const double u = logit(k);
      top = u > top || u != u ? u : top;
    }
    for (int64_t k = 0; k < K; ++k) d[k] = exponential(static_cast<T>(logit(k) - top));
#pragma omp simd reduction(+ : sum, total)
    for (int64_t k = 0; k < K; ++k) {
      sum += logit(k);
      total += d[k];
    }
    const double over = factor / total;
#pragma omp simd reduction(+ : product)
    for (int64_t k = 0; k < K; ++k) {
      const double dk = over * d[k] - factor * ((k == hit ? 1 - label_smoothing : 0) + smooth);
      product += dk * g[k];
      d[k] = static_cast<T>(t * dk);
    }
    *grad_tau = given.tau * product;
    return top + std::log(total) - (1 - label_smoothing) * logit(hit) - smooth * sum;
  }

  // The value of softplus or swish at z, and its derivative.
  std::pair<double, double> f(double z) const {
    const double s = z >= 0 ? 1 / (1 + std::exp(-z)) : std::exp(z) / (1 + std::exp(z));
    if (is(Name::swish) || is(Name::swish_symba)) return {z * s, s * (1 + z * (1 - s))};
    return {z > 0 ? z + std::log1p(std::exp(-z)) : std::log1p(std::exp(z)), s};
  }

  template <typename T>
  double of_sample(double sign, int64_t J, const T* g, T* d) const {
    const double theta = given.theta + (sign < 0 ? given.theta_gap : 0);
    double total = 0;
    for (int64_t j = 0; j < J; ++j) {
      const auto [value, slope] = f(sign * (theta - g[j]));
      total += value;
      d[j] = static_cast<T>(-sign * slope * scale / J);
    }
    return total / J;
  }

  template <typename T>
  double of_pair(int64_t J, const T* positive, const T* negative, T* d_positive, T* d_negative) const {
    double total = 0;
    for (int64_t j = 0; j < J; ++j) {
      const auto [value, slope] = f(-given.alpha * (static_cast<double>(positive[j]) - negative[j]));
      total += value;
      d_negative[j] = static_cast<T>(given.alpha * slope * scale / J);
      d_positive[j] = -d_negative[j];
    }
    return total / J;
  }
};
