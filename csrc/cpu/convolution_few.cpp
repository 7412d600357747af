// fastff::convolution_few_native and fastff::convolution_few_gradient_native: a convolution of few positions and its weight's gradient as matrix
// products, float32, contiguous, on the CPU. Most of the memory is that of the weights there, which oneDNN brings into a layout of its own and back.
//
//   y[d, p] = sum_r w[d, r] column[r, p],  dW[d, r] = sum_p dy[d, p] column[r, p],  column[r, p] = x[b, c, i s + u - padding, j s + v - padding]
//
// with r = (c, u, v), which is the order in which w and dW lie, and p = (b, i, j). Columns are made in panels of the second factor: for y all of
// them first, and each task takes its rows of w past them; for dW each task makes its own. The number of threads changes no bit.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "gemm.h"
#include "tensors.h"

namespace {

constexpr int64_t kPanel = gemm::Panels::kWidth,
                  kRows = 24;  // rows of w of a task: two register blocks of AVX-512, four of AVX2

// x with zeros around each channel, and where the elements of a column lie in it: column[r, p] = padded[rows[r] + positions[p]].
struct Columns {
  Buffer<float> padded;
  Buffer<int32_t> rows, positions;

  Columns(const Tensor& x, int64_t k, int64_t stride, int64_t padding, int64_t P, int64_t Q) {
    const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), width = W + 2 * padding,
                  plane = (H + 2 * padding) * width;
    const float* from = floats(x);
    padded.resize(B * C * plane);
    float* to = padded.data() + padding * width + padding;
    for (int64_t channel = 0; channel < B * C; ++channel, to += plane)
      for (int64_t h = 0; h < H; ++h, from += W)
        for (int64_t w = 0; w < W; ++w) to[h * width + w] = from[w];
    for (int64_t c = 0; c < C; ++c)
      for (int64_t u = 0; u < k; ++u)
        for (int64_t v = 0; v < k; ++v) rows.push_back(c * plane + u * width + v);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t i = 0; i < P; ++i)
        for (int64_t j = 0; j < Q; ++j) positions.push_back(b * C * plane + (i * width + j) * stride);
  }

  // target[m, n] = padded[along[m] + across[n]] of `width` n; rows of target lie kPanel apart.
  void gather(const int32_t* along, int64_t count, const int32_t* across, int64_t width, float* target) const {
    for (int64_t m = 0; m < count; ++m, target += kPanel) {
      const float* const from = padded.data() + along[m];
      for (int64_t n = 0; n < width; ++n) target[n] = from[across[n]];
    }
  }
};

int64_t positions_along(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  return (size + 2 * padding - kernel) / stride + 1;
}

// x [B, C, H, W], weight [D, C, k, k] float32 on the CPU, not empty -> y [B, D, P, Q], contiguous.
Tensor convolution_few_native(Tensor x, Tensor weight, int64_t stride, int64_t padding) {
  x = with_layout(x, false), weight = with_layout(weight, false);
  const int64_t B = x.size(0), D = weight.size(0), k = weight.size(2),
                P = positions_along(x.size(2), k, stride, padding), Q = positions_along(x.size(3), k, stride, padding),
                R = x.size(1) * k * k, N = B * P * Q;
  const Columns columns(x, k, stride, padding, P, Q);
  const Tensor memory = empty(x, {(N + kPanel - 1) / kPanel * kPanel * R}, aoti_torch_dtype_float32());
  float* const panels = writable(memory);
  parallel_for(0, (N + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kPanel; n < std::min(end * kPanel, N); n += kPanel)
      columns.gather(columns.rows.data(), R, columns.positions.data() + n, std::min(kPanel, N - n), panels + n * R);
  });
  const Tensor y = empty_strided(x, {B, D, P, Q}, {D * P * Q, P * Q, Q, 1});
  const float* const w = floats(weight);
  float* const to = writable(y);
  parallel_for(0, (D + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> some(kRows * N);
    for (int64_t d = begin * kRows; d < std::min(end * kRows, D); d += kRows) {
      const int64_t rows = std::min(kRows, D - d);
      gemm::multiply(rows, w + d * R, R, 1, {R, N, panels}, some.data(), N);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t b = 0; b < B; ++b)
          std::copy_n(some.data() + i * N + b * P * Q, P * Q, to + (b * D + d + i) * P * Q);
    }
  });
  return y;
}

// x [B, C, H, W], grad [B, D, P, Q] float32 on the CPU, not empty -> dL/dweight [D, C, k, k], contiguous.
Tensor convolution_few_gradient_native(Tensor grad, Tensor x, int64_t kernel, int64_t stride, int64_t padding) {
  grad = with_layout(grad, false), x = with_layout(x, false);
  const int64_t B = x.size(0), C = x.size(1), D = grad.size(1), P = grad.size(2), Q = grad.size(3),
                R = C * kernel * kernel, N = B * P * Q;
  const Columns columns(x, kernel, stride, padding, P, Q);
  const Tensor grad_weight = empty_strided(x, {D, C, kernel, kernel}, {R, kernel * kernel, kernel, 1});
  Buffer<float> left(D * N);
  for (int64_t b = 0; b < B; ++b)
    for (int64_t d = 0; d < D; ++d)
      std::copy_n(floats(grad) + (b * D + d) * P * Q, P * Q, left.data() + d * N + b * P * Q);
  float* const dw = writable(grad_weight);
  parallel_for(0, (R + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> panel(N * kPanel);
    for (int64_t r = begin * kPanel; r < std::min(end * kPanel, R); r += kPanel) {
      const int64_t width = std::min(kPanel, R - r);
      columns.gather(columns.positions.data(), N, columns.rows.data() + r, width, panel.data());
      gemm::multiply(D, left.data(), N, 1, {N, width, panel.data()}, dw + r, R);
    }
  });
  return grad_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastff, m) {
  m.def("convolution_few_native(Tensor x, Tensor weight, int stride, int padding) -> Tensor");
  m.def("convolution_few_gradient_native(Tensor grad, Tensor x, int kernel, int stride, int padding) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastff, CPU, m) {
  m.impl("convolution_few_native", TORCH_BOX(&convolution_few_native));
  m.impl("convolution_few_gradient_native", TORCH_BOX(&convolution_few_gradient_native));
}
