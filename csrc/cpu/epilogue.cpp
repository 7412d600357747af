// Batch norm with residual and activation (epilogue.h): Ioffe and Szegedy 2015, arXiv 1502.03167. Each loop is one pass over its samples.

#include "epilogue.h"

#include <algorithm>
#include <cmath>

#include "vec.h"

namespace {

using vec::kChunk;

template <Activation A>
FASTFF_INLINE float activate(float h) {
  switch (A) {
    case Activation::relu: return h < 0 ? 0.0f : h;  // NaN stays
    case Activation::relu6: return h < 0 ? 0.0f : h > 6 ? 6.0f : h;
    case Activation::hardswish: return h * (h < -3 ? 0.0f : h > 3 ? 6.0f : h + 3) * (1.0f / 6);
    case Activation::silu: return h / (1 + exp_of(-h));
    case Activation::gelu: return 0.5f * h * (1 + std::erf(h * 0.707106781f));
    default: return h;
  }
}

template <Activation A>
FASTFF_INLINE float derivative(float h) {
  switch (A) {
    case Activation::relu: return h > 0 ? 1.0f : 0.0f;
    case Activation::relu6: return h > 0 && h < 6 ? 1.0f : 0.0f;
    case Activation::hardswish: return h <= -3 ? 0.0f : h >= 3 ? 1.0f : h * (1.0f / 3) + 0.5f;
    case Activation::silu: {
      const float s = 1 / (1 + exp_of(-h));
      return s * (1 + h * (1 - s));
    }
    case Activation::gelu: return 0.5f * (1 + std::erf(h * 0.707106781f)) + h * 0.398942280f * std::exp(-0.5f * h * h);
    default: return 1.0f;
  }
}

// Calls f<activation, whether there is a residual>().
template <Activation A, typename F>
void with_residual(bool residual, const F& f) {
  residual ? f.template operator()<A, true>() : f.template operator()<A, false>();
}
template <typename F>
void with_activation(Activation activation, bool residual, const F& f) {
  switch (activation) {
    case Activation::relu: return with_residual<Activation::relu>(residual, f);
    case Activation::relu6: return with_residual<Activation::relu6>(residual, f);
    case Activation::hardswish: return with_residual<Activation::hardswish>(residual, f);
    case Activation::silu: return with_residual<Activation::silu>(residual, f);
    case Activation::gelu: return with_residual<Activation::gelu>(residual, f);
    default: return with_residual<Activation::none>(residual, f);
  }
}

template <Activation A, bool Residual, bool ChannelsLast>
FASTFF_INLINE void forward_line(const float* __restrict y, const float* __restrict residual, const float* __restrict m,
                                const float* __restrict a, const float* __restrict b, float* __restrict x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = ChannelsLast ? i : 0;
    float h = (y[i] - m[c]) * a[c] + b[c];
    if (Residual) h += residual[i];
    x[i] = activate<A>(h);
  }
}

template <Activation A, bool Residual>
FASTFF_INLINE void forward_samples(const EpilogueSamples& s, float* x) {
  for (int64_t i = 0; i < s.lines; ++i) {
    const int64_t at = i * s.length, c = s.channel(i);
    if (s.channels_last) {
      forward_line<A, Residual, true>(s.y + at, s.residual_at(at), s.mean, s.scale, s.shift, x + at, s.length);
    } else {
      forward_line<A, Residual, false>(s.y + at, s.residual_at(at), s.mean + c, s.scale + c, s.shift + c, x + at,
                                       s.length);
    }
  }
}

struct Pair {
  float first, second;
};

// Adds the two values of f(i, index of i's constants) to element i of the sums in channels_last, else to their only elements.
template <bool ChannelsLast, typename F>
FASTFF_INLINE void add_pairs(int64_t n, float* __restrict first, float* __restrict second, const F& f) {
  float sum = 0, product = 0;
  if constexpr (ChannelsLast) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const auto [p, q] = f(i, i);
      first[i] += p;
      second[i] += q;
    }
  } else {
#pragma omp simd reduction(+ : sum, product)
    for (int64_t i = 0; i < n; ++i) {
      const auto [p, q] = f(i, 0);
      sum += p;
      product += q;
    }
    *first += sum;
    *second += product;
  }
}

// dL/dh of n elements of a line, and their two sums; constants as in forward_line.
template <Activation A, bool Residual, bool ChannelsLast>
FASTFF_INLINE void backward_line(const float* __restrict y, const float* __restrict residual, const float* __restrict m,
                                 const float* __restrict a, const float* __restrict b, float* __restrict grad,
                                 float* __restrict first, float* __restrict second, int64_t n) {
  add_pairs<ChannelsLast>(n, first, second, [=](int64_t i, int64_t c) __attribute__((always_inline)) {
    const float off = y[i] - m[c];
    float h = off * a[c] + b[c];
    if (Residual) h += residual[i];
    const float g = grad[i] * derivative<A>(h);
    grad[i] = g;
    return Pair{g, g * off};
  });
}

// own[c] += the sum of v[c], v[C + c], ...: adds up a vector that holds C elements several times, and clears it.
void fold(float* v, int64_t size, int64_t C, double* own) {
  for (int64_t start = 0; start < size; start += C)
    for (int64_t c = 0; c < C; ++c) own[c] += v[start + c];
  std::fill_n(v, size, 0.0f);
}

// One sample. totals [2, C]; line: zeros, two lines long.
template <Activation A, bool Residual>
FASTFF_INLINE void backward_sample(const EpilogueSamples& s, float* grad, double* totals, float* line) {
  for (int64_t c = 0; !s.channels_last && c < s.C; ++c) {
    for (int64_t start = 0; start < s.length; start += vec::kLongChunk) {
      const int64_t at = c * s.length + start, n = std::min(vec::kLongChunk, s.length - start);
      float first = 0, second = 0;
      backward_line<A, Residual, false>(s.y + at, s.residual_at(at), s.mean + c, s.scale + c, s.shift + c, grad + at,
                                        &first, &second, n);
      totals[c] += first;
      totals[s.C + c] += second;
    }
  }
  const int64_t chunk = std::max<int64_t>(1, kChunk * s.C / s.length);
  for (int64_t start = 0; s.channels_last && start < s.lines; start += chunk) {
    for (int64_t i = start; i < std::min(start + chunk, s.lines); ++i) {
      const int64_t at = i * s.length;
      const float *y = s.y + at, *residual = s.residual_at(at);
      backward_line<A, Residual, true>(y, residual, s.mean, s.scale, s.shift, grad + at, line, line + s.length,
                                       s.length);
    }
    fold(line, s.length, s.C, totals);
    fold(line + s.length, s.length, s.C, totals + s.C);
  }
}

// Adds y - pivot and its square to the sums.
template <bool ChannelsLast>
FASTFF_INLINE void add_line(const float* __restrict y, const float* __restrict pivot, float* __restrict sums,
                            float* __restrict squares, int64_t n) {
  add_pairs<ChannelsLast>(n, sums, squares, [=](int64_t i, int64_t c) __attribute__((always_inline)) {
    const float d = y[i] - pivot[c];
    return Pair{d, d * d};
  });
}

// grad_y = (grad_h - first - (y - mean) second) scale, constants as in forward_line.
template <bool ChannelsLast>
FASTFF_INLINE void finish_line(const float* __restrict y, const float* __restrict m, const float* __restrict a,
                               const float* __restrict first, const float* __restrict second, const float* grad_h,
                               float* grad_y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const int64_t c = ChannelsLast ? i : 0;
    grad_y[i] = (grad_h[i] - first[c] - (y[i] - m[c]) * second[c]) * a[c];
  }
}
void finish_samples(const EpilogueSamples& s, const float* first, const float* second, const float* grad_h,
                    float* grad_y) {
  for (int64_t i = 0; i < s.lines; ++i) {
    const int64_t at = i * s.length, c = s.channel(i);
    if (s.channels_last)
      finish_line<true>(s.y + at, s.mean, s.scale, first, second, grad_h + at, grad_y + at, s.length);
    else
      finish_line<false>(s.y + at, s.mean + c, s.scale + c, first + c, second + c, grad_h + at, grad_y + at, s.length);
  }
}

// Positions per inner loop in channels_last. With few channels, a loop over C alone is too short to hide the latency of its accumulators.
int64_t positions_of_a_line(int64_t C, int64_t P) {
  int64_t repeat = 1;
  while (C * repeat < 64 && P % (2 * repeat) == 0) repeat *= 2;
  return repeat;
}

void repeat_in_place(Buffer<float>& v, int64_t times) {
  const size_t n = v.size();
  v.resize(n * times);
  for (size_t i = n; i < v.size(); ++i) v[i] = v[i - n];
}

}  // namespace

Epilogue::Epilogue(Floats y, Floats residual, const float* weight, const float* bias, float eps, EpilogueShape shape,
                   Activation activation, float* mean, float* var, bool known)
    : y(y), residual(residual), B(shape.B), C(shape.C), P(shape.P),
      repeat(shape.channels_last ? positions_of_a_line(C, P) : 1), channels_last(shape.channels_last),
      activation(activation), rstds(C), centre(C), scale(C), shift(C) {
  if (!known) statistics(some_means(), mean, var, true);
  for (int64_t c = 0; c < C; ++c) {
    centre[c] = mean[c];
    rstds[c] = static_cast<float>(1 / std::sqrt(static_cast<double>(var[c]) + eps));
    scale[c] = rstds[c] * (weight ? weight[c] : 1.0f);
    shift[c] = bias ? bias[c] : 0.0f;
  }
  for (Buffer<float>* v : {&centre, &scale, &shift}) repeat_in_place(*v, repeat);
}

// The mean of each channel at some positions of the first sample.
Buffer<float> Epilogue::some_means() const {
  Buffer<float> means(C, 0.0f);
  const int64_t seen = std::min<int64_t>(P, 32), step = P / seen;
  Buffer<float> scratch;
  const float* const sample = y.at(0, C * P, scratch);
  for (int64_t i = 0; i < seen; ++i)
    for (int64_t c = 0; c < C; ++c) means[c] += sample[channels_last ? i * step * C + c : c * P + i * step] / seen;
  return means;
}

// By sums about the pivot [C]: where it is not near a channel's mean, the squares cancel, and all is done once more about the means. Not more
// often: floats near 1e-45 are so coarse that even the rounded mean is not near.
void Epilogue::statistics(Buffer<float> pivot, float* mean, float* var, bool again) const {
  repeat_in_place(pivot, repeat);
  const int64_t groups = std::min<int64_t>(B, 16), width = C * repeat;  // groups: whatever the number of threads
  Buffer<double> partial(groups * 2 * C, 0.0);
  parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> sums(2 * width), scratch;
    for (int64_t group = begin; group < end; ++group) {
      double* own = partial.data() + group * 2 * C;
      for (int64_t b = group * B / groups; b < (group + 1) * B / groups; ++b) {
        const float* const sample = y.at(b * C * P, C * P, scratch);
        for (int64_t start = 0; start < P; start += kChunk) {
          const int64_t n = std::min(kChunk, P - start);  // whole lines: `repeat` is a power of two that divides P
          for (int64_t q = 0; channels_last && q < n; q += repeat)
            add_line<true>(sample + (start + q) * C, pivot.data(), sums.data(), sums.data() + width, width);
          for (int64_t c = 0; !channels_last && c < C; ++c)
            add_line<false>(sample + c * P + start, &pivot[c], &sums[c], &sums[C + c], n);
          fold(sums.data(), width, C, own);
          fold(sums.data() + width, width, C, own + C);
        }
      }
    }
  });
  bool far = false;
  for (int64_t c = 0; c < C; ++c) {
    double sum = 0, square = 0;
    for (int64_t group = 0; group < groups; ++group) {
      sum += partial[group * 2 * C + c];
      square += partial[group * 2 * C + C + c];
    }
    const double off = sum / (B * P), variance = square / (B * P) - off * off;
    mean[c] = static_cast<float>(pivot[c] + off);
    var[c] = static_cast<float>(variance < 0 ? 0 : variance);  // NaN stays
    far |= is_far(off, variance, mean[c]);
  }
  if (far && again) statistics({mean, mean + C}, mean, var, false);
}

void Epilogue::forward(int64_t first, int64_t n, float* x) const {
  Scratch scratch;
  const EpilogueSamples s = samples(first, n, scratch);
  with_activation(activation, s.residual, [&]<Activation A, bool Residual>() { forward_samples<A, Residual>(s, x); });
}

void Epilogue::backward(int64_t first, int64_t n, float* grad, double* sums) const {
  Buffer<float> line(2 * C * repeat, 0.0f);
  Scratch scratch;
  with_activation(activation, static_cast<bool>(residual), [&]<Activation A, bool Residual>() {
    for (int64_t i = 0; i < n; ++i)
      backward_sample<A, Residual>(samples(first + i, 1, scratch), grad + i * C * P, sums, line.data());
  });
}

void Epilogue::finish(const Floats& grad_h, const double* sums, const Results<>& grad_y) const {
  Buffer<float> first(C), second(C);
  for (int64_t c = 0; c < C; ++c) {
    first[c] = static_cast<float>(sums[c] / (B * P));
    second[c] = static_cast<float>(sums[C + c] * rstds[c] * rstds[c] / (B * P));
  }
  repeat_in_place(first, repeat);
  repeat_in_place(second, repeat);
  parallel_for(0, B, std::max<int64_t>(1, 32768 / (C * P)), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    Buffer<float> widened, result;
    const int64_t together = y.are_narrow() ? 1 : end - begin, n = together * C * P;
    for (int64_t b = begin; b < end; b += together) {
      const int64_t at = b * C * P;
      float* const to = grad_y.at(at, n, result);
      finish_samples(samples(b, together, scratch), first.data(), second.data(), grad_h.at(at, n, widened), to);
      grad_y.keep(at, n, to);
    }
  });
}

void Epilogue::parameter_gradients(const double* sums, float* grad_weight, float* grad_bias) const {
  for (int64_t c = 0; c < C; ++c) {
    grad_bias[c] = static_cast<float>(sums[c]);
    grad_weight[c] = static_cast<float>(sums[C + c] * rstds[c]);
  }
}

void Epilogue::add_parameter_gradients(const float* grad_weight, const float* grad_bias, double* sums) const {
  for (int64_t c = 0; c < C; ++c) {
    sums[c] += grad_bias[c];
    sums[C + c] += grad_weight[c] / rstds[c];
  }
}

EpilogueSamples Epilogue::samples(int64_t first, int64_t n, Scratch& scratch) const {
  const int64_t at = first * C * P, size = n * C * P;
  return {channels_last ? n * P / repeat : n * C,
          channels_last ? C * repeat : P,
          C,
          channels_last,
          y.at(at, size, scratch.y),
          residual ? residual.at(at, size, scratch.residual) : nullptr,
          centre.data(),
          scale.data(),
          shift.data()};
}
