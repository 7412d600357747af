// fastff::epilogue_native and fastff::epilogue_backward_native: batch norm, residual, activation and the next input's layer norm at the end of a
// block or between its convolutions, forward and backward, float32 on the CPU.
//
//   forward    h = batch_norm(y) + residual, x = activation(h), normalized = layer_norm(x)     reads y twice, the residual once; writes x or normalized
//   backward   from dL/dx, dL/dnormalized or both:
//              one task a sample: x again, layer norm's backward, dL/dh and its two sums       reads y, the residual, the gradients; writes dL/dh
//              dL/dy from the sums over the whole batch                                        reads y and dL/dh, writes dL/dy over dL/dh
//
// A sample's x and all that lies between stay in the cache. The gradients of another loss at the same h may be added (`added_*`), so that
// a block which two losses train runs this once for both. Formulas: fastff/reference.py.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "batch_norm.h"
#include "layer_norm.h"
#include "tensors.h"

namespace {

// grad_x += dL/dx of y = (x - mean) / sqrt(var + eps) over the n elements of a sample, from grad = dL/dy.
void add_layer_norm_gradient(const float* __restrict x, const float* __restrict grad, float* __restrict grad_x, int64_t n, double eps) {
  constexpr int64_t kChunk = 1024;
  double sum = 0, square = 0, sum_grad = 0, product = 0;
  const float pivot = x[0];
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t end = std::min(start + kChunk, n);
    float s = 0, q = 0, g = 0, p = 0;
#pragma omp simd reduction(+ : s, q, g, p)
    for (int64_t i = start; i < end; ++i) {
      const float off = x[i] - pivot;
      s += off;
      q += off * off;
      g += grad[i];
      p += grad[i] * off;
    }
    sum += s, square += q, sum_grad += g, product += p;
  }
  const double off = sum / n, variance = std::max(square / n - off * off, 0.0), rstd = 1 / std::sqrt(variance + eps);
  const double mean_grad = sum_grad / n, mean_product = (product - off * sum_grad) / n * rstd * rstd;
  const float mean = static_cast<float>(pivot + off), a = static_cast<float>(rstd), b = static_cast<float>(mean_grad),
              c = static_cast<float>(mean_product);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) grad_x[i] += a * (grad[i] - b - (x[i] - mean) * c);
}

// y float32, dense after `dense`; absent results are empty.
// known_mean, known_var [C]: the batch's statistics where they are known already.
std::tuple<Tensor, Tensor, Tensor, Tensor> epilogue_native(Tensor y, MaybeTensor weight, MaybeTensor bias, MaybeTensor residual, double eps,
                                                           int64_t activation, MaybeTensor known_mean, MaybeTensor known_var, bool need_x,
                                                           bool normalize, double normalization_eps) {
  y = dense(y), weight = packed(weight), bias = packed(bias);
  residual = lying_as(residual, y);
  const bool rows = is_rows(y), known = known_mean && known_var;
  const int64_t B = y.size(0), C = y.size(1), P = y.size(2) * y.size(3), n = C * P;
  Tensor mean = known ? torch::stable::contiguous(*known_mean) : empty(y, {C}), var = known ? torch::stable::contiguous(*known_var) : empty(y, {C});
  Tensor x = need_x ? empty_like(y, rows) : absent(y), normalized = normalize ? empty_like(y, rows) : absent(y);
  const float epsilon = static_cast<float>(eps);
  const Activation kind = static_cast<Activation>(activation);
  const BatchNorm epilogue =
      known ? BatchNorm(floats(y), floats(residual), floats(weight), floats(bias), epsilon, B, C, P, rows, kind, floats(mean), floats(var))
            : BatchNorm(floats(y), floats(residual), floats(weight), floats(bias), epsilon, B, C, P, rows, kind, writable(mean), writable(var));
  float *const to_x = writable(x), *const to_normalized = writable(normalized);
  torch::stable::parallel_for(0, B, std::max<int64_t>(1, 32768 / n), [&](int64_t begin, int64_t end) {
    std::vector<float> sample(need_x ? 0 : n);
    for (int64_t b = begin; b < end; ++b) {
      float* const at = need_x ? to_x + b * n : sample.data();
      epilogue.forward(b, 1, at);
      if (normalize) normalize_sample(at, to_normalized + b * n, n, normalization_eps);
    }
  });
  return {x, normalized, known ? absent(y) : mean, known ? absent(y) : var};
}

// mean, var [C]: the batch's. Returns dL/dy, dL/dh (which is the residual's gradient; empty unless asked for), dL/dweight and dL/dbias [C].
std::tuple<Tensor, Tensor, Tensor, Tensor> epilogue_backward_native(
    Tensor y, MaybeTensor weight, MaybeTensor bias, MaybeTensor residual, double eps, int64_t activation, Tensor mean, Tensor var, MaybeTensor grad_x,
    MaybeTensor grad_normalized, double normalization_eps, MaybeTensor added_grad_h, MaybeTensor added_grad_weight, MaybeTensor added_grad_bias,
    bool need_grad_h) {
  y = dense(y), weight = packed(weight), bias = packed(bias), mean = torch::stable::contiguous(mean), var = torch::stable::contiguous(var);
  residual = lying_as(residual, y), grad_x = lying_as(grad_x, y), grad_normalized = lying_as(grad_normalized, y), added_grad_h = lying_as(added_grad_h, y);
  added_grad_weight = packed(added_grad_weight), added_grad_bias = packed(added_grad_bias);
  const bool rows = is_rows(y);
  const int64_t B = y.size(0), C = y.size(1), P = y.size(2) * y.size(3), n = C * P;
  Tensor grad_h = empty_like(y, rows), grad_weight = empty(y, {C}), grad_bias = empty(y, {C});
  const BatchNorm epilogue(floats(y), floats(residual), floats(weight), floats(bias), static_cast<float>(eps), B, C, P, rows,
                           static_cast<Activation>(activation), floats(mean), floats(var));
  const float *const from_x = floats(grad_x), *const from_normalized = floats(grad_normalized), *const added = floats(added_grad_h);
  float* const to = writable(grad_h);
  const int64_t groups = std::min<int64_t>(B, 16);  // whatever the number of threads
  std::vector<float> sums(groups * 2 * C, 0.0f);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> x(from_normalized ? n : 0);
    for (int64_t group = begin; group < end; ++group) {
      for (int64_t b = group * B / groups; b < (group + 1) * B / groups; ++b) {
        float* const grad = to + b * n;
        if (from_x) {
          std::copy_n(from_x + b * n, n, grad);
        } else {
          std::fill_n(grad, n, 0.0f);
        }
        if (from_normalized) {
          epilogue.forward(b, 1, x.data());
          add_layer_norm_gradient(x.data(), from_normalized + b * n, grad, n, normalization_eps);
        }
        epilogue.backward(b, 1, grad, sums.data() + group * 2 * C);
        if (added) {
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) grad[i] += added[b * n + i];
        }
      }
    }
  });
  for (int64_t group = 1; group < groups; ++group) {
    for (int64_t c = 0; c < 2 * C; ++c) sums[c] += sums[group * 2 * C + c];
  }
  if (added) epilogue.add_parameter_gradients(floats(added_grad_weight), floats(added_grad_bias), sums.data());
  Tensor grad_y = need_grad_h ? empty_like(y, rows) : grad_h;
  epilogue.finish(to, sums.data(), writable(grad_y));
  epilogue.parameter_gradients(sums.data(), writable(grad_weight), writable(grad_bias));
  return {grad_y, need_grad_h ? grad_h : absent(y), grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastff, m) {
  m.def(
      "epilogue_native(Tensor y, Tensor? weight, Tensor? bias, Tensor? residual, float eps, int activation, Tensor? known_mean, "
      "Tensor? known_var, bool need_x, bool normalize, float normalization_eps) -> (Tensor x, Tensor normalized, Tensor mean, Tensor var)");
  m.def(
      "epilogue_backward_native(Tensor y, Tensor? weight, Tensor? bias, Tensor? residual, float eps, int activation, Tensor mean, Tensor var, "
      "Tensor? grad_x, Tensor? grad_normalized, float normalization_eps, Tensor? added_grad_h, Tensor? added_grad_weight, Tensor? added_grad_bias, "
      "bool need_grad_h) -> (Tensor grad_y, Tensor grad_h, Tensor grad_weight, Tensor grad_bias)");
}
STABLE_TORCH_LIBRARY_IMPL(fastff, CPU, m) {
  m.impl("epilogue_native", TORCH_BOX(&epilogue_native));
  m.impl("epilogue_backward_native", TORCH_BOX(&epilogue_backward_native));
}
