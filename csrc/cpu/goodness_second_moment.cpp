// Squares of a projection from the second moment of x, sample by sample:
//
//   S = x x^T and M = W^T diag(d) W by their upper halves;  t = W S,  g = w . t / P,  dL/dW = 2 d t / P,  dL/dx = 2 M x / P
//
// The bias adds 2 beta (w . mean of x) + beta^2 to g, and a constant vector to dL/dx.

#include "goodness.h"
#include "vec.h"

namespace goodness {
namespace {

// The lower half of a square matrix from its upper half.
void mirror(float* square, int64_t n) {
  for (int64_t i = 1; i < n; ++i)
    for (int64_t j = 0; j < i; ++j) square[i * n + j] = square[j * n + i];
}

class SecondMoment : public Squares {
 public:
  SecondMoment(const Problem& p, int64_t most)
      : p(p), square(p.C * p.C), t(most * p.K * p.C), means(most * p.C), constant(p.C), sum(p.C) {}

  void goodness(int64_t n, const float* x, float* g) override {
    for (int64_t i = 0; i < n; ++i)
      goodness_of(x + i * p.C * p.P, g + i * p.K, t.data() + i * p.K * p.C, means.data() + i * p.C);
  }

  void gradients(int64_t n, const float* x, const float* d, float* grad_x, bool add, const Sums& sums) override {
    for (int64_t i = 0; i < n; ++i) {
      float* ti = t.data() + i * p.K * p.C;
      parameter_gradients(d + i * p.K, ti, means.data() + i * p.C, sums);
      if (grad_x) input_gradient(x + i * p.C * p.P, ti, grad_x + i * p.C * p.P, add);
    }
  }

 private:
  const Problem& p;
  Buffer<float> square, t, means, constant;
  vec::LineSum sum;

  void goodness_of(const float* x, float* g, float* ti, float* mean) {
    float* S = square.data();
    if (p.channels_last)
      gemm::multiply(p.C, p.C, p.P, x, 1, p.C, x, p.C, S, p.C, false, true);
    else
      gemm::dots(p.C, p.C, p.P, x, p.P, x, p.P, S, p.C, true);
    mirror(S, p.C);
    gemm::multiply(p.K, p.C, p.C, p.weight, p.C, 1, S, p.C, ti, p.C);
    if (p.bias) mean_of(x, mean);
    for (int64_t k = 0; k < p.K; ++k) {
      const float* w = p.weight + k * p.C;
      double gk = vec::dot(ti + k * p.C, w, p.C) / p.P;
      if (p.bias) gk += p.bias[k] * (2 * vec::dot(w, mean, p.C) + p.bias[k]);
      g[k] = static_cast<float>(gk);
    }
  }

  void mean_of(const float* x, float* mean) {
    if (!p.channels_last) {
      for (int64_t c = 0; c < p.C; ++c) mean[c] = static_cast<float>(vec::total_of(x + c * p.P, p.P) / p.P);
      return;
    }
    for (int64_t q = 0; q < p.P; ++q) sum.add(x + q * p.C);
    sum.take([&](int64_t c, float total) { mean[c] = total / p.P; });
  }

  // Leaves 2 d w / P in ti, and the constant vector of dL/dx in `constant`.
  void parameter_gradients(const float* d, float* ti, const float* mean, const Sums& sums) {
    const float factor = 2.0f / p.P;
    std::fill(constant.begin(), constant.end(), 0.0f);
    for (int64_t k = 0; k < p.K; ++k) {
      const float* w = p.weight + k * p.C;
      vec::add_scaled(sums.weight + k * p.C, factor * d[k], ti + k * p.C, p.C);
      if (p.bias) {
        vec::add_scaled(sums.weight + k * p.C, 2 * d[k] * p.bias[k], mean, p.C);
        sums.bias[k] += static_cast<float>(2 * d[k] * (vec::dot(w, mean, p.C) + p.bias[k]));
        vec::add_scaled(constant.data(), factor * d[k] * p.bias[k], w, p.C);
      }
      vec::set_scaled(ti + k * p.C, factor * d[k], w, p.C);
    }
    sums.line->added();
  }

  void input_gradient(const float* x, const float* scaled_weight, float* grad_x, bool add) {
    float* M = square.data();
    gemm::multiply(p.C, p.C, p.K, scaled_weight, 1, p.C, p.weight, p.C, M, p.C, false, true);
    mirror(M, p.C);
    if (p.channels_last) {
      gemm::multiply(p.P, p.C, p.C, x, p.C, 1, M, p.C, grad_x, p.C, add);
      for (int64_t q = 0; p.bias && q < p.P; ++q) vec::add(grad_x + q * p.C, constant.data(), p.C);
    } else {
      gemm::multiply(p.C, p.P, p.C, M, p.C, 1, x, p.P, grad_x, p.P, add);
      for (int64_t c = 0; p.bias && c < p.C; ++c) vec::add_constant(grad_x + c * p.P, constant[c], p.P);
    }
  }
};

}  // namespace

std::unique_ptr<Squares> second_moment(const Problem& p, int64_t most) {
  return std::make_unique<SecondMoment>(p, most);
}

}  // namespace goodness
