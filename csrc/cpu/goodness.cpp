// fastff::goodness_native: goodness of whole samples, its loss and its local gradient in one pass, float32 on the CPU.
//
// x [B, C, P] with contiguous positions, or [B, P, C] with contiguous channels (`rows`); weight [K, C]; bias [K] or empty; grid_weight
// [K, C, GH, GW] or empty. Formulas: fastff/reference.py.
//
// One task takes a few samples through everything while they are in its cache: goodness, loss, d, gradient, layer norm. x is read from and dL/dx
// and the next input are written to main memory once.
//
//   direct         a = X W^T [positions, K] by tiles; kept for the gradient where the task has one tile, else computed again.
//                  Contiguous positions are transposed in cache on the way in and out; several small samples are one matrix. With
//                  few classes the transposing takes longer than the products: then a [K, P] = W X, sample by sample (`planes`).
//   second moment  S = X X^T and M = W^T diag(d) W by their upper halves; t = W S, g = w . t, dL/dx = M X
//   spatial term   cell sums of the task's samples, then [samples, C G^2] x [C G^2, K] and its two adjoints
//
// dL/dW and its like are summed by group of samples and the groups' sums in order, so that the number of threads changes no bit.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "goodness.h"
#include "layer_norm.h"

namespace goodness {
namespace {

void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t row, int64_t column, const float* b, int64_t ldb,
                            float* c, int64_t ldc, bool add, bool upper) {
  gemm::multiply_inline(rows, columns, depth, a, row, column, b, ldb, c, ldc, add, upper);
}

void dots(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                        int64_t ldc, bool add, bool upper) {
  gemm::dots_inline(rows, columns, depth, a, lda, b, ldb, c, ldc, add, upper);
}

void multiply_panels(int64_t rows, const float* a, int64_t row, int64_t column, const gemm::Panels& b, float* c, int64_t ldc,
                                   bool add) {
  gemm::multiply_panels_inline(rows, a, row, column, b, c, ldc, add);
}

void transpose(int64_t rows, int64_t columns, const float* a, int64_t lda, float* b, int64_t ldb) {
  gemm::transpose_inline(rows, columns, a, lda, b, ldb);
}

// y += x, y += factor * x, y = factor * x, the sum of x * y, sum[i] += x[i]^2
void add_to(float* __restrict y, const float* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += x[i];
}
void add_scaled(float* __restrict y, float factor, const float* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}
void set_scaled(float* __restrict y, float factor, const float* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = factor * x[i];
}
void add_constant(float* y, float constant, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += constant;
}
float dot(const float* __restrict x, const float* __restrict y, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}
float total_of(const float* __restrict x, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}
// sum[k] += sum_r a[r, k]^2, and a[r, k] *= d[k], of rows of whole kPadding: so many of sum and d stay in registers, in two chains of sums at least.
constexpr int64_t kPadding = 16;
constexpr int kVectors = kPadding / gemm::kLanes, kChains = kVectors == 1 ? 4 : 1;
void add_squares(int64_t rows, int64_t columns, const float* a, float* sum) {
  for (int64_t k = 0; k < columns; k += kPadding) {
    gemm::Vector part[kChains][kVectors] = {};
    for (int v = 0; v < kVectors; ++v) part[0][v] = gemm::read(sum + k + v * gemm::kLanes);
    const auto add = [&](int64_t r, int chain) {
      for (int v = 0; v < kVectors; ++v) {
        const gemm::Vector value = gemm::read(a + r * columns + k + v * gemm::kLanes);
        part[chain][v] += value * value;
      }
    };
    int64_t r = 0;
    for (; r + kChains <= rows; r += kChains) {
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) add(r + chain, chain);
    }
    for (; r < rows; ++r) add(r, 0);
    for (int v = 0; v < kVectors; ++v) {
      for (int chain = 1; chain < kChains; ++chain) part[0][v] += part[chain][v];
      gemm::write(sum + k + v * gemm::kLanes, part[0][v]);
    }
  }
}
void multiply_by(int64_t rows, int64_t columns, float* a, const float* d) {
  for (int64_t k = 0; k < columns; k += kPadding) {
    gemm::Vector factor[kVectors];
    for (int v = 0; v < kVectors; ++v) factor[v] = gemm::read(d + k + v * gemm::kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        float* at = a + r * columns + k + v * gemm::kLanes;
        gemm::write(at, gemm::read(at) * factor[v]);
      }
    }
  }
}

void mirror(float* square, int64_t n) {
  for (int64_t i = 1; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) square[i * n + j] = square[j * n + i];
  }
}

int64_t padded(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }

// Positions that the direct algorithm takes at a time, at least: dL/dW passes through the cache once for so many.
constexpr int64_t kPositions = 160;

// Most classes for which contiguous positions are worked on as they lie (33 % of the time went into transposing at 10 classes).
constexpr int64_t kPlanes = 24;

// Channels of such a sample read side by side: lines of more of them have no place in the L1 cache, whose sets a power of two of positions hits alike.
constexpr int64_t kStreams = 8;

// Edges of the cells of adaptive average pooling.
struct Cell {
  int64_t top, bottom, left, right;
};
Cell cell_at(const Problem& p, int64_t i, int64_t j) {
  return {i * p.H / p.GH, ((i + 1) * p.H + p.GH - 1) / p.GH, j * p.W / p.GW, ((j + 1) * p.W + p.GW - 1) / p.GW};
}

// Loss, d and dL/dtau of one sample from its goodness g [K].
void loss_of(const Problem& p, int64_t b, const float* g, float* d) {
  const int64_t y = p.target[b];
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t k = 0; k < p.K; ++k) {
    d[k] = p.tau * g[k] - (k == y ? p.margin : 0.0f);
    top = std::max(top, d[k]);
  }
  double total = 0, sum_u = 0;
  const double hit_u = d[y];
  for (int64_t k = 0; k < p.K; ++k) {
    sum_u += d[k];
    d[k] = std::exp(d[k] - top);
    total += d[k];
  }
  const double smooth = p.smoothing;
  p.losses[b] = static_cast<float>(top + std::log(total) - (1 - smooth) * hit_u - smooth / p.K * sum_u);
  const float rest = p.smoothing / p.K, one_over = static_cast<float>(1 / total);
  double grad_tau = 0;
  for (int64_t k = 0; k < p.K; ++k) {
    const float dk = (d[k] * one_over - (k == y ? 1 - p.smoothing : 0.0f) - rest) * p.scale;
    grad_tau += static_cast<double>(dk) * g[k];
    d[k] = dk * p.tau;
  }
  p.dtau[b] = static_cast<float>(grad_tau);
}

// What a task adds up: dL/dW [K, C], dL/dbeta [K], dL/dV [K, cells], the tail's two sums [2, C].
struct Sums {
  float *weight, *bias, *grid, *tail;
};

class Task {
 public:
  explicit Task(const Problem& problem, int64_t most) : p(problem), d(most * p.K) {
    tile = std::max<int64_t>(kPositions, (256 << 10) / 4 / p.KP);
    planes = !p.rows && !p.second_moment && p.weight && p.K <= kPlanes && p.P >= 64 && tile >= most * p.P;
    kept = p.second_moment || tile >= most * p.P;
    turned = !p.rows && !p.second_moment && !planes;
    if (p.second_moment) {
      square.resize(p.C * p.C);
      t.resize(most * p.K * p.C);
      mean.resize(most * p.C);
    } else {
      a.resize(std::min(tile, most * p.P) * p.KP);
      squares.resize(most * p.KP);
    }
    if (planes) t.resize(p.K * p.C);
    if (p.tail) x_tail.resize(most * p.P * p.C);
    if (turned) {
      x_turned.resize(most * p.P * p.C);
      if (p.need_x) grad_turned.resize(most * p.P * p.C);
    }
    if (p.cells) {
      means.resize(most * p.cells);
      spread.resize(most * p.cells);
      scores.resize(most * p.KP);
      line.resize(p.C);
    }
  }

  // Samples first .. first + n - 1 through everything.
  void run(int64_t first, int64_t n, const Sums& sums) {
    const int64_t size = p.C * p.P;
    const float* const given = input(first, n);
    const float* x = given;
    float* grad_x = p.need_x ? p.grad_x + first * size : nullptr;
    if (turned) {
      for (int64_t i = 0; i < n; ++i) transpose(p.C, p.P, x + i * size, p.P, x_turned.data() + i * size, p.C);
      x = x_turned.data();
      if (grad_x) grad_x = grad_turned.data();
    }
    if (p.mode != kBackward || kept) goodness(first, n, x);  // otherwise the gradients compute a themselves
    if (p.cells) cell_goodness(first, n, x);
    if (p.mode == kGoodness) return;
    for (int64_t i = 0; i < n; ++i) {
      float* di = d.data() + i * p.K;
      if (p.mode == kStep) {
        loss_of(p, first + i, p.g + (first + i) * p.K, di);
      } else {
        std::copy_n(p.d_given + (first + i) * p.K, p.K, di);
      }
    }
    if (p.cells) cell_gradients(n, grad_x, sums);
    if (p.weight) {
      p.second_moment ? second_moment_gradients(n, x, grad_x, sums)
      : planes        ? planes_gradients(n, x, grad_x, sums)
                      : direct_gradients(n, x, grad_x, sums);
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = (first + i) * size;
      if (turned && grad_x) transpose(p.P, p.C, grad_x + i * size, p.C, p.grad_x + at, p.P);
      if (p.normalize) normalize_sample(given + i * size, p.normalized + at, size, p.eps);
    }
    if (p.tail) p.tail->backward(first, n, p.grad_x + first * size, sums.tail);
  }

 private:
  const Problem& p;
  int64_t tile;
  bool kept, turned, planes;  // turned: the task works on transposed copies
  std::vector<float> d, square, t, mean, a, squares, x_tail, x_turned, grad_turned, means, spread, scores, line;

  bool by_rows() const { return p.rows || turned; }

  const float* input(int64_t first, int64_t n) {
    if (!p.tail) return p.x + first * p.C * p.P;
    p.tail->forward(first, n, x_tail.data());
    return x_tail.data();
  }

  void goodness(int64_t first, int64_t n, const float* x) {
    float* g = p.g + first * p.K;
    if (!p.weight) {
      std::fill_n(g, n * p.K, 0.0f);
      return;
    }
    if (p.second_moment) {
      for (int64_t i = 0; i < n; ++i) second_moment_goodness(x + i * p.C * p.P, g + i * p.K, t.data() + i * p.K * p.C, mean.data() + i * p.C);
      return;
    }
    if (planes) {
      for (int64_t i = 0; i < n; ++i) planes_goodness(x + i * p.C * p.P, g + i * p.K, a.data() + i * p.K * p.P);
      return;
    }
    std::fill(squares.begin(), squares.end(), 0.0f);
    for (int64_t start = 0; start < n * p.P; start += tile) {
      const int64_t count = std::min(tile, n * p.P - start);
      outputs(x + start * p.C, count);
      of_samples(start, count, [&](int64_t i, int64_t rows, float* ai) { add_squares(rows, p.KP, ai, squares.data() + i * p.KP); });
    }
    for (int64_t i = 0; i < n; ++i) set_scaled(g + i * p.K, 1.0f / p.P, squares.data() + i * p.KP, p.K);
  }

  // Calls of(sample, rows, first row of a) for the parts of a tile that belong to one sample.
  template <typename F>
  void of_samples(int64_t start, int64_t count, const F& of) {
    for (int64_t r = 0; r < count;) {
      const int64_t i = (start + r) / p.P, rows = std::min(count - r, (i + 1) * p.P - start - r);
      of(i, rows, a.data() + r * p.KP);
      r += rows;
    }
  }

  // a [count, KP] of positions with contiguous channels.
  void outputs(const float* x, int64_t count) {
    multiply_panels(count, x, p.C, 1, p.to_outputs, a.data(), p.KP, false);
    if (p.bias) {
      for (int64_t r = 0; r < count; ++r) add_to(a.data() + r * p.KP, p.bias, p.K);
    }
  }

  void direct_gradients(int64_t n, const float* x, float* grad_x, const Sums& sums) {
    for (int64_t i = 0; i < n; ++i) set_scaled(squares.data() + i * p.KP, 2.0f / p.P, d.data() + i * p.K, p.K);
    for (int64_t start = 0; start < n * p.P; start += tile) {
      const int64_t count = std::min(tile, n * p.P - start);
      if (!kept) outputs(x + start * p.C, count);
      of_samples(start, count, [&](int64_t i, int64_t rows, float* ai) { multiply_by(rows, p.KP, ai, squares.data() + i * p.KP); });
      if (grad_x) multiply_panels(count, a.data(), p.KP, 1, p.to_input, grad_x + start * p.C, p.C, p.cells > 0);
      multiply(p.K, p.C, count, a.data(), 1, p.KP, x + start * p.C, p.C, sums.weight, p.C, true, false);
      if (p.bias) {
        for (int64_t r = 0; r < count; ++r) add_to(sums.bias, a.data() + r * p.KP, p.K);
      }
    }
  }

  // a [K, P] of one sample [C, P].
  void planes_goodness(const float* x, float* g, float* a) {
    for (int64_t c = 0; c < p.C; c += kStreams) {
      multiply(p.K, p.P, std::min(kStreams, p.C - c), p.weight + c, p.C, 1, x + c * p.P, p.P, a, p.P, c > 0, false);
    }
    for (int64_t k = 0; k < p.K; ++k) {
      if (p.bias) add_constant(a + k * p.P, p.bias[k], p.P);
      g[k] = dot(a + k * p.P, a + k * p.P, p.P) / p.P;
    }
  }

  void planes_gradients(int64_t n, const float* x, float* grad_x, const Sums& sums) {
    for (int64_t i = 0; i < n; ++i) {
      const float *xi = x + i * p.C * p.P, *ai = a.data() + i * p.K * p.P;
      set_scaled(squares.data(), 2.0f / p.P, d.data() + i * p.K, p.K);
      dots(p.K, p.C, p.P, ai, p.P, xi, p.P, t.data(), p.C, false, false);
      for (int64_t k = 0; k < p.K; ++k) {
        add_scaled(sums.weight + k * p.C, squares[k], t.data() + k * p.C, p.C);
        if (p.bias) sums.bias[k] += squares[k] * total_of(ai + k * p.P, p.P);
        set_scaled(t.data() + k * p.C, squares[k], p.weight + k * p.C, p.C);
      }
      if (grad_x) multiply(p.C, p.P, p.K, t.data(), 1, p.C, ai, p.P, grad_x + i * p.C * p.P, p.P, p.cells > 0, false);
    }
  }

  void second_moment_goodness(const float* x, float* g, float* ti, float* mu) {
    float* S = square.data();
    if (p.rows) {
      multiply(p.C, p.C, p.P, x, 1, p.C, x, p.C, S, p.C, false, true);
    } else {
      dots(p.C, p.C, p.P, x, p.P, x, p.P, S, p.C, false, true);
    }
    mirror(S, p.C);
    multiply(p.K, p.C, p.C, p.weight, p.C, 1, S, p.C, ti, p.C, false, false);
    if (p.bias) mean_of(x, mu);
    const float over = 1.0f / p.P;
    for (int64_t k = 0; k < p.K; ++k) {
      const float* w = p.weight + k * p.C;
      g[k] = over * dot(ti + k * p.C, w, p.C);
      if (p.bias) g[k] += p.bias[k] * (2 * dot(w, mu, p.C) + p.bias[k]);
    }
  }

  void mean_of(const float* x, float* mu) {
    const float over = 1.0f / p.P;
    std::fill_n(mu, p.C, 0.0f);
    if (p.rows) {
      for (int64_t q = 0; q < p.P; ++q) add_to(mu, x + q * p.C, p.C);
    } else {
      for (int64_t c = 0; c < p.C; ++c) mu[c] = total_of(x + c * p.P, p.P);
    }
    for (int64_t c = 0; c < p.C; ++c) mu[c] *= over;
  }

  void second_moment_gradients(int64_t n, const float* x, float* grad_x, const Sums& sums) {
    const float factor = 2.0f / p.P;
    std::vector<float> constant(p.bias ? p.C : 0);
    for (int64_t i = 0; i < n; ++i) {
      const float *di = d.data() + i * p.K, *xi = x + i * p.C * p.P, *mu = mean.data() + i * p.C;
      float* ti = t.data() + i * p.K * p.C;
      std::fill(constant.begin(), constant.end(), 0.0f);
      for (int64_t k = 0; k < p.K; ++k) {
        const float* w = p.weight + k * p.C;
        add_scaled(sums.weight + k * p.C, factor * di[k], ti + k * p.C, p.C);
        if (p.bias) {
          add_scaled(sums.weight + k * p.C, 2 * di[k] * p.bias[k], mu, p.C);
          sums.bias[k] += 2 * di[k] * (dot(w, mu, p.C) + p.bias[k]);
          add_scaled(constant.data(), factor * di[k] * p.bias[k], w, p.C);
        }
        set_scaled(ti + k * p.C, factor * di[k], w, p.C);
      }
      if (!grad_x) continue;
      float *M = square.data(), *out = grad_x + i * p.C * p.P;
      multiply(p.C, p.C, p.K, ti, 1, p.C, p.weight, p.C, M, p.C, false, true);
      mirror(M, p.C);
      if (p.rows) {
        multiply(p.P, p.C, p.C, xi, p.C, 1, M, p.C, out, p.C, p.cells > 0, false);
      } else {
        multiply(p.C, p.P, p.C, M, p.C, 1, xi, p.P, out, p.P, p.cells > 0, false);
      }
      if (p.bias && p.rows) {
        for (int64_t q = 0; q < p.P; ++q) add_to(out + q * p.C, constant.data(), p.C);
      } else if (p.bias) {
        for (int64_t c = 0; c < p.C; ++c) {
          add_constant(out + c * p.P, constant[c], p.P);
        }
      }
    }
  }

  // Adds the spatial term to g: means [n, C, GH, GW] times V^T.
  void cell_goodness(int64_t first, int64_t n, const float* x) {
    std::fill_n(means.data(), n * p.cells, 0.0f);
    for (int64_t s = 0; s < n; ++s) {
      const float* xs = x + s * p.C * p.P;
      float* out = means.data() + s * p.cells;
      for (int64_t i = 0; i < p.GH; ++i) {
        for (int64_t j = 0; j < p.GW; ++j) {
          const Cell e = cell_at(p, i, j);
          const float over = 1.0f / ((e.bottom - e.top) * (e.right - e.left));
          const int64_t at = i * p.GW + j;
          if (by_rows()) {
            std::fill_n(line.data(), p.C, 0.0f);
            for (int64_t h = e.top; h < e.bottom; ++h) {
              for (int64_t w = e.left; w < e.right; ++w) add_to(line.data(), xs + (h * p.W + w) * p.C, p.C);
            }
            for (int64_t c = 0; c < p.C; ++c) out[c * p.GH * p.GW + at] = over * line[c];
          } else {
            for (int64_t c = 0; c < p.C; ++c) {
              float sum = 0;
              for (int64_t h = e.top; h < e.bottom; ++h) {
                const float* source = xs + c * p.P + h * p.W;
                for (int64_t w = e.left; w < e.right; ++w) sum += source[w];
              }
              out[c * p.GH * p.GW + at] = over * sum;
            }
          }
        }
      }
    }
    multiply_panels(n, means.data(), p.cells, 1, p.to_scores, scores.data(), p.KP, false);
    for (int64_t s = 0; s < n; ++s) add_to(p.g + (first + s) * p.K, scores.data() + s * p.KP, p.K);
  }

  // dL/dV += d^T means; dL/dx = the constant vector of each cell.
  void cell_gradients(int64_t n, float* grad_x, const Sums& sums) {
    multiply(p.K, p.cells, n, d.data(), 1, p.K, means.data(), p.cells, sums.grid, p.cells, true, false);
    if (!grad_x) return;
    multiply(n, p.cells, p.K, d.data(), p.K, 1, p.grid, p.cells, spread.data(), p.cells, false, false);
    std::fill_n(grad_x, n * p.C * p.P, 0.0f);
    for (int64_t s = 0; s < n; ++s) {
      float* out = grad_x + s * p.C * p.P;
      const float* cell = spread.data() + s * p.cells;
      for (int64_t i = 0; i < p.GH; ++i) {
        for (int64_t j = 0; j < p.GW; ++j) {
          const Cell e = cell_at(p, i, j);
          const float over = 1.0f / ((e.bottom - e.top) * (e.right - e.left));
          const int64_t at = i * p.GW + j;
          for (int64_t c = 0; c < p.C; ++c) line[c] = over * cell[c * p.GH * p.GW + at];
          for (int64_t h = e.top; h < e.bottom; ++h) {
            if (by_rows()) {
              for (int64_t w = e.left; w < e.right; ++w) add_to(out + (h * p.W + w) * p.C, line.data(), p.C);
            } else {
              for (int64_t c = 0; c < p.C; ++c) {
                float* target = out + c * p.P + h * p.W;
                for (int64_t w = e.left; w < e.right; ++w) target[w] += line[c];
              }
            }
          }
        }
      }
    }
  }
};

}  // namespace

Call::Call(const Tensor& x, const Head& given, Mode mode, bool need_x, bool normalize)
    : head(given), g(absent(x)), losses(g), dtau(g), grad_x(g), grad_weight(g), grad_bias(g), grad_grid(g), normalized(g) {
  for (MaybeTensor* t : {&head.weight, &head.bias, &head.grid, &head.target, &head.tau_factor, &head.scale_factor}) *t = packed(*t);
  const Tensor& first = head.weight ? *head.weight : *head.grid;
  p.B = x.size(0), p.C = x.size(1), p.H = x.size(2), p.W = x.size(3), p.P = p.H * p.W, p.K = first.size(0), p.KP = padded(p.K);
  p.GH = head.grid ? head.grid->size(2) : 0, p.GW = head.grid ? head.grid->size(3) : 0, p.cells = p.C * p.GH * p.GW;
  p.rows = is_rows(x), p.second_moment = head.second_moment, p.mode = mode, p.need_x = need_x, p.normalize = normalize;
  p.x = floats(x), p.weight = floats(head.weight), p.bias = floats(head.bias), p.grid = floats(head.grid);
  p.target = head.target ? static_cast<const int64_t*>(head.target->const_data_ptr()) : nullptr;
  p.tau = static_cast<float>(head.tau) * (head.tau_factor ? *floats(head.tau_factor) : 1.0f);
  p.scale = static_cast<float>(head.scale) * (head.scale_factor ? *floats(head.scale_factor) : 1.0f);
  p.margin = static_cast<float>(head.margin), p.smoothing = static_cast<float>(head.smoothing), p.eps = head.eps;

  g = empty(x, {p.B, p.K});
  if (mode == kStep) losses = empty(x, {p.B}), dtau = empty(x, {p.B});
  if (need_x) grad_x = empty_like(x, p.rows);
  if (normalize) normalized = empty_like(x, p.rows);
  if (mode != kGoodness) {
    if (head.weight) grad_weight = empty(x, {p.K, p.C, 1, 1});
    if (head.bias) grad_bias = empty(x, {p.K});
    if (head.grid) grad_grid = empty(x, {p.K, p.C, p.GH, p.GW});
  }
  p.g = writable(g), p.losses = writable(losses), p.dtau = writable(dtau), p.grad_x = writable(grad_x), p.normalized = writable(normalized);
}

void Call::run(float* tail_sums) {
  if (p.weight && !p.second_moment) p.to_outputs = gemm::Panels(p.C, p.K, p.weight, 1, p.C, p.KP);
  if (p.weight && !p.second_moment && p.need_x) p.to_input = gemm::Panels(p.K, p.C, p.weight, p.C, 1, p.C);
  if (p.cells) p.to_scores = gemm::Panels(p.cells, p.K, p.grid, 1, p.cells, p.KP);

  // Samples of a task: several where one is too small to fill a register block or the spatial term's products want more rows than one.
  const int64_t most = std::min<int64_t>(p.B, std::max<int64_t>(p.cells ? 6 : 1, p.second_moment ? 1 : std::min(kPositions / p.P, (p.B + 3) / 4)));
  const int64_t weights = p.weight ? p.K * p.C : 0, ours = weights + p.K + p.K * p.cells, size = ours + (p.tail ? 2 * p.C : 0);
  const int64_t tasks = (p.B + most - 1) / most, groups = std::min(tasks, std::clamp<int64_t>((1 << 20) / size, 2, 16));
  const bool sums_wanted = p.mode != kGoodness;
  std::vector<float> partial(sums_wanted ? groups * size : 0, 0.0f);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    Task task(p, most);
    for (int64_t group = begin; group < end; ++group) {
      float* own = sums_wanted ? partial.data() + group * size : nullptr;
      const Sums sums{own, own + weights, own + weights + p.K, own + ours};
      for (int64_t i = group * tasks / groups; i < (group + 1) * tasks / groups; ++i) {
        task.run(i * most, std::min(most, p.B - i * most), sums);
      }
    }
  });
  if (!sums_wanted) return;
  const auto collect = [&](float* target, int64_t offset, int64_t n) {
    if (!target) return;
    torch::stable::parallel_for(0, n, 1 << 15, [&](int64_t begin, int64_t end) {
      std::copy_n(partial.data() + offset + begin, end - begin, target + begin);
      for (int64_t group = 1; group < groups; ++group) add_to(target + begin, partial.data() + group * size + offset + begin, end - begin);
    });
  };
  collect(writable(grad_weight), 0, weights);
  collect(writable(grad_bias), weights, p.K);
  collect(writable(grad_grid), weights + p.K, p.K * p.cells);
  collect(tail_sums, ours, 2 * p.C);
}

// All float32 on the CPU, x not empty, as fastff/kernels/native/goodness.py sees to.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> goodness_native(
    Tensor x, MaybeTensor weight, MaybeTensor bias, MaybeTensor grid, MaybeTensor target, MaybeTensor tau_factor, MaybeTensor scale_factor,
    MaybeTensor d, int64_t mode, bool second_moment, double tau, double margin, double smoothing, double scale, double eps, bool need_x,
    bool normalize) {
  x = dense(x);
  d = packed(d);
  Call call(x, {weight, bias, grid, target, tau_factor, scale_factor, second_moment, tau, margin, smoothing, scale, eps}, static_cast<Mode>(mode),
            need_x, normalize);
  call.p.d_given = floats(d);
  call.run(nullptr);
  return {call.g, call.losses, call.dtau, call.grad_x, call.grad_weight, call.grad_bias, call.grad_grid, call.normalized};
}

}  // namespace goodness

STABLE_TORCH_LIBRARY_FRAGMENT(fastff, m) {
  m.def(
      "goodness_native(Tensor x, Tensor? weight, Tensor? bias, Tensor? grid, Tensor? target, Tensor? tau_factor, Tensor? scale_factor, Tensor? d, "
      "int mode, bool second_moment, float tau, float margin, float smoothing, float scale, float eps, bool need_x, bool normalize) "
      "-> (Tensor g, Tensor losses, Tensor dtau, Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_grid, Tensor normalized)");
}
STABLE_TORCH_LIBRARY_IMPL(fastff, CPU, m) { m.impl("goodness_native", TORCH_BOX(&goodness::goodness_native)); }
