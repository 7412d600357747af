// Batch norm with residual and activation (batch_norm.h): Ioffe and Szegedy 2015, arXiv 1502.03167. Each loop is one pass over its samples.

#include "batch_norm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "common.h"

namespace {

FASTFF_INLINE float activate(Activation activation, float h) {
  switch (activation) {
    case kReLU: return h < 0 ? 0.0f : h;  // NaN stays
    case kReLU6: return h < 0 ? 0.0f : h > 6 ? 6.0f : h;
    case kHardswish: return h * (h < -3 ? 0.0f : h > 3 ? 6.0f : h + 3) * (1.0f / 6);
    case kSiLU: return h / (1 + exp_of(-h));
    case kGELU: return 0.5f * h * (1 + std::erf(h * 0.707106781f));
    default: return h;
  }
}

FASTFF_INLINE float derivative(Activation activation, float h) {
  switch (activation) {
    case kReLU: return h > 0 ? 1.0f : 0.0f;
    case kReLU6: return h > 0 && h < 6 ? 1.0f : 0.0f;
    case kHardswish: return h <= -3 ? 0.0f : h >= 3 ? 1.0f : h * (1.0f / 3) + 0.5f;
    case kSiLU: {
      const float s = 1 / (1 + exp_of(-h));
      return s * (1 + h * (1 - s));
    }
    case kGELU: return 0.5f * (1 + std::erf(h * 0.707106781f)) + h * 0.398942280f * std::exp(-0.5f * h * h);
    default: return 1.0f;
  }
}

// `lines` runs of n elements whose constants are m, a, b: per element for rows (a line is one position), one for all otherwise (a channel).
template <Activation A, bool Residual, bool Rows>
FASTFF_INLINE void forward_line(const float* __restrict y, const float* __restrict residual, const float* __restrict m, const float* __restrict a,
                                const float* __restrict b, float* __restrict x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = Rows ? i : 0;
    float h = (y[i] - m[c]) * a[c] + b[c];
    if (Residual) h += residual[i];
    x[i] = activate(A, h);
  }
}

template <Activation A, bool Residual>
FASTFF_INLINE void backward_row(const float* __restrict y, const float* __restrict residual, const float* __restrict m, const float* __restrict a,
                                const float* __restrict b, float* __restrict grad, float* __restrict first, float* __restrict second, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float off = y[i] - m[i];
    float h = off * a[i] + b[i];
    if (Residual) h += residual[i];
    const float g = grad[i] * derivative(A, h);
    grad[i] = g;
    first[i] += g;
    second[i] += g * off;
  }
}

template <Activation A, bool Residual>
FASTFF_INLINE void backward_channel(const float* __restrict y, const float* __restrict residual, float m, float a, float b, float* __restrict grad,
                                    float* first, float* second, int64_t n) {
  float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
  for (int64_t i = 0; i < n; ++i) {
    const float off = y[i] - m;
    float h = off * a + b;
    if (Residual) h += residual[i];
    const float g = grad[i] * derivative(A, h);
    grad[i] = g;
    sum += g;
    product += g * off;
  }
  *first += sum;
  *second += product;
}

// Everything a loop over samples of one memory layout needs: `lines` runs of `length` elements, each some positions (rows) or a channel of C.
struct Samples {
  int64_t lines, length, C;
  bool rows;
  const float *y, *residual, *mean, *scale, *shift;
};

template <Activation A, bool Residual>
FASTFF_INLINE void forward_samples(const Samples& s, float* x) {
  for (int64_t i = 0; i < s.lines; ++i) {
    const int64_t at = i * s.length, c = s.rows ? 0 : i % s.C;
    const float* residual = Residual ? s.residual + at : nullptr;
    if (s.rows) {
      forward_line<A, Residual, true>(s.y + at, residual, s.mean, s.scale, s.shift, x + at, s.length);
    } else {
      forward_line<A, Residual, false>(s.y + at, residual, s.mean + c, s.scale + c, s.shift + c, x + at, s.length);
    }
  }
}

template <Activation A, bool Residual>
FASTFF_INLINE void backward_samples(const Samples& s, float* grad, float* first, float* second) {
  for (int64_t i = 0; i < s.lines; ++i) {
    const int64_t at = i * s.length, c = s.rows ? 0 : i % s.C;
    const float* residual = Residual ? s.residual + at : nullptr;
    if (s.rows) {
      backward_row<A, Residual>(s.y + at, residual, s.mean, s.scale, s.shift, grad + at, first, second, s.length);
    } else {
      backward_channel<A, Residual>(s.y + at, residual, s.mean[c], s.scale[c], s.shift[c], grad + at, first + c, second + c, s.length);
    }
  }
}

template <Activation A>
FASTFF_INLINE void forward_of(const Samples& s, float* x) {
  s.residual ? forward_samples<A, true>(s, x) : forward_samples<A, false>(s, x);
}
template <Activation A>
FASTFF_INLINE void backward_of(const Samples& s, float* grad, float* first, float* second) {
  s.residual ? backward_samples<A, true>(s, grad, first, second) : backward_samples<A, false>(s, grad, first, second);
}

void forward_any(const Samples& s, Activation activation, float* x) {
  switch (activation) {
    case kReLU: return forward_of<kReLU>(s, x);
    case kReLU6: return forward_of<kReLU6>(s, x);
    case kHardswish: return forward_of<kHardswish>(s, x);
    case kSiLU: return forward_of<kSiLU>(s, x);
    case kGELU: return forward_of<kGELU>(s, x);
    default: return forward_of<kNone>(s, x);
  }
}
void backward_any(const Samples& s, Activation activation, float* grad, float* first, float* second) {
  switch (activation) {
    case kReLU: return backward_of<kReLU>(s, grad, first, second);
    case kReLU6: return backward_of<kReLU6>(s, grad, first, second);
    case kHardswish: return backward_of<kHardswish>(s, grad, first, second);
    case kSiLU: return backward_of<kSiLU>(s, grad, first, second);
    case kGELU: return backward_of<kGELU>(s, grad, first, second);
    default: return backward_of<kNone>(s, grad, first, second);
  }
}

// sums[c] += y - pivot[c], squares[c] += its square, over n lines of C elements.
void add_rows(const float* __restrict y, const float* __restrict pivot, float* __restrict sums, float* __restrict squares, int64_t n,
                            int64_t C) {
  for (int64_t q = 0; q < n; ++q) {
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) {
      const float d = y[q * C + c] - pivot[c];
      sums[c] += d;
      squares[c] += d * d;
    }
  }
}
void add_channel(const float* __restrict y, float pivot, float* sums, float* squares, int64_t n) {
  float sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
  for (int64_t i = 0; i < n; ++i) {
    const float d = y[i] - pivot;
    sum += d;
    square += d * d;
  }
  *sums += sum;
  *squares += square;
}

// grad_y = (grad_h - first - (y - mean) second) scale, constants as in forward_line.
template <bool Rows>
FASTFF_INLINE void finish_line(const float* __restrict y, const float* __restrict m, const float* __restrict a, const float* __restrict first,
                               const float* __restrict second, const float* grad_h, float* grad_y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = Rows ? i : 0;
    grad_y[i] = (grad_h[i] - first[c] - (y[i] - m[c]) * second[c]) * a[c];
  }
}
void finish_samples(const Samples& s, const float* first, const float* second, const float* grad_h, float* grad_y) {
  for (int64_t i = 0; i < s.lines; ++i) {
    const int64_t at = i * s.length, c = s.rows ? 0 : i % s.C;
    if (s.rows) {
      finish_line<true>(s.y + at, s.mean, s.scale, first, second, grad_h + at, grad_y + at, s.length);
    } else {
      finish_line<false>(s.y + at, s.mean + c, s.scale + c, first + c, second + c, grad_h + at, grad_y + at, s.length);
    }
  }
}

// Positions whose float sums are added to double ones together.
constexpr int64_t kChunk = 256;

// Positions to a line of contiguous channels: few channels make short loops, and sums that wait for themselves.
int64_t positions_of_a_line(int64_t C, int64_t P) {
  int64_t repeat = 1;
  while (C * repeat < 64 && P % (2 * repeat) == 0) repeat *= 2;
  return repeat;
}

void repeat_in_place(std::vector<float>& v, int64_t times) {
  const size_t n = v.size();
  v.resize(n * times);
  for (size_t i = n; i < v.size(); ++i) v[i] = v[i - n];
}

// sum[c] of a vector that holds C elements several times.
void fold(const float* v, int64_t C, int64_t repeat, float* sum) {
  for (int64_t i = 0; i < C * repeat; ++i) sum[i % C] += v[i];
}

}  // namespace

BatchNorm::BatchNorm(const float* y, const float* residual, const float* weight, const float* bias, float eps, int64_t B, int64_t C, int64_t P,
                     bool rows, Activation activation, float* mean, float* var)
    : y(y), residual(residual), B(B), C(C), P(P), repeat(rows ? positions_of_a_line(C, P) : 1), rows(rows), activation(activation), rstds(C),
      centre(C), scale(C), shift(C) {
  // Relative to about the mean of each channel, lest the squares cancel: that of some positions of the first sample.
  std::vector<float> pivot(C, 0.0f);
  const int64_t seen = std::min<int64_t>(P, 32), step = P / seen;
  for (int64_t i = 0; i < seen; ++i) {
    for (int64_t c = 0; c < C; ++c) pivot[c] += y[rows ? i * step * C + c : c * P + i * step] / seen;
  }
  repeat_in_place(pivot, repeat);
  const int64_t groups = std::min<int64_t>(B, 16);  // whatever the number of threads
  std::vector<double> partial(groups * 2 * C, 0.0);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const int64_t width = C * repeat;
    std::vector<float> sums(2 * width);
    for (int64_t group = begin; group < end; ++group) {
      double* own = partial.data() + group * 2 * C;
      for (int64_t b = group * B / groups; b < (group + 1) * B / groups; ++b) {
        for (int64_t start = 0; start < P; start += kChunk) {
          const int64_t n = std::min(kChunk, P - start);  // whole lines: `repeat` is a power of two that divides P
          std::fill(sums.begin(), sums.end(), 0.0f);
          if (rows) {
            add_rows(y + (b * P + start) * C, pivot.data(), sums.data(), sums.data() + width, n / repeat, width);
          } else {
            for (int64_t c = 0; c < C; ++c) add_channel(y + (b * C + c) * P + start, pivot[c], &sums[c], &sums[C + c], n);
          }
          for (int64_t i = 0; i < width; ++i) {
            own[i % C] += sums[i];
            own[C + i % C] += sums[width + i];
          }
        }
      }
    }
  });
  for (int64_t c = 0; c < C; ++c) {
    double sum = 0, square = 0;
    for (int64_t group = 0; group < groups; ++group) {
      sum += partial[group * 2 * C + c];
      square += partial[group * 2 * C + C + c];
    }
    const double off = sum / (B * P), variance = square / (B * P) - off * off;
    mean[c] = static_cast<float>(pivot[c] + off);
    var[c] = static_cast<float>(variance < 0 ? 0 : variance);  // NaN stays
    set_channel(c, mean[c], variance < 0 ? 0 : variance, eps, weight, bias);
  }
  repeat_constants();
}

BatchNorm::BatchNorm(const float* y, const float* residual, const float* weight, const float* bias, float eps, int64_t B, int64_t C, int64_t P,
                     bool rows, Activation activation, const float* mean, const float* var)
    : y(y), residual(residual), B(B), C(C), P(P), repeat(rows ? positions_of_a_line(C, P) : 1), rows(rows), activation(activation), rstds(C),
      centre(C), scale(C), shift(C) {
  for (int64_t c = 0; c < C; ++c) set_channel(c, mean[c], var[c], eps, weight, bias);
  repeat_constants();
}

void BatchNorm::set_channel(int64_t c, float mean, double var, float eps, const float* weight, const float* bias) {
  centre[c] = mean;
  rstds[c] = static_cast<float>(1 / std::sqrt(var + eps));
  scale[c] = rstds[c] * (weight ? weight[c] : 1.0f);
  shift[c] = bias ? bias[c] : 0.0f;
}

void BatchNorm::repeat_constants() {
  for (std::vector<float>* v : {&centre, &scale, &shift}) repeat_in_place(*v, repeat);
}

void BatchNorm::forward(int64_t first, int64_t n, float* x) const {
  const int64_t at = first * C * P;
  const Samples s{rows ? n * P / repeat : n * C, rows ? C * repeat : P, C, rows, y + at, residual ? residual + at : nullptr, centre.data(),
                  scale.data(), shift.data()};
  forward_any(s, activation, x);
}

void BatchNorm::backward(int64_t first, int64_t n, float* grad, float* sums) const {
  const int64_t width = C * repeat;
  std::vector<float> own(2 * width);
  for (int64_t i = 0; i < n; ++i) {  // float sums over one sample, then over samples
    const int64_t at = (first + i) * C * P;
    std::fill(own.begin(), own.end(), 0.0f);
    const Samples s{rows ? P / repeat : C, rows ? width : P, C, rows, y + at, residual ? residual + at : nullptr, centre.data(), scale.data(),
                    shift.data()};
    backward_any(s, activation, grad + i * C * P, own.data(), own.data() + width);
    fold(own.data(), C, repeat, sums);
    fold(own.data() + width, C, repeat, sums + C);
  }
}

void BatchNorm::finish(const float* grad_h, const float* sums, float* grad_y) const {
  std::vector<float> first(C), second(C);
  for (int64_t c = 0; c < C; ++c) {
    first[c] = sums[c] / (B * P);
    second[c] = sums[C + c] * rstds[c] * rstds[c] / (B * P);
  }
  repeat_in_place(first, repeat);
  repeat_in_place(second, repeat);
  torch::stable::parallel_for(0, B, std::max<int64_t>(1, 32768 / (C * P)), [&](int64_t begin, int64_t end) {
    const int64_t at = begin * C * P, n = end - begin;
    const Samples s{rows ? n * P / repeat : n * C, rows ? C * repeat : P, C, rows, y + at, nullptr, centre.data(), scale.data(), shift.data()};
    finish_samples(s, first.data(), second.data(), grad_h + at, grad_y + at);
  });
}

void BatchNorm::parameter_gradients(const float* sums, float* grad_weight, float* grad_bias) const {
  for (int64_t c = 0; c < C; ++c) {
    grad_bias[c] = sums[c];
    grad_weight[c] = sums[C + c] * rstds[c];
  }
}

void BatchNorm::add_parameter_gradients(const float* grad_weight, const float* grad_bias, float* sums) const {
  for (int64_t c = 0; c < C; ++c) {
    sums[c] += grad_bias[c];
    sums[C + c] += grad_weight[c] / rstds[c];
  }
}
