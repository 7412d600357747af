// The spatial term of goodness: g[b, k] += sum_cell V[k, cell] mean_cell(x_b), with the cells of adaptive average pooling.

#include "goodness.h"
#include "vec.h"

namespace goodness {

Grid::Grid(const Problem& p, int64_t most, bool channels_last)
    : p(p), channels_last(channels_last), means(most * p.cells), spread(most * p.cells), scores(most * p.KP),
      line(p.C) {}

// Calls f(cell, first row, end, first column, end, 1 / positions of the cell).
template <typename F>
void Grid::for_cells(const F& f) const {
  for (int64_t i = 0; i < p.GH; ++i) {
    const int64_t top = i * p.H / p.GH, bottom = ((i + 1) * p.H + p.GH - 1) / p.GH;
    for (int64_t j = 0; j < p.GW; ++j) {
      const int64_t left = j * p.W / p.GW, right = ((j + 1) * p.W + p.GW - 1) / p.GW;
      f(i * p.GW + j, top, bottom, left, right, 1.0f / ((bottom - top) * (right - left)));
    }
  }
}

void Grid::add_goodness(int64_t n, const float* x, float* g) {
  vec::LineSum sum(p.C);
  for (int64_t s = 0; s < n; ++s) {
    const float* xs = x + s * p.C * p.P;
    float* out = means.data() + s * p.cells;
    for_cells([&](int64_t cell, int64_t top, int64_t bottom, int64_t left, int64_t right, float over) {
      if (channels_last) {
        for (int64_t h = top; h < bottom; ++h) {
          for (int64_t w = left; w < right; ++w) sum.add(xs + (h * p.W + w) * p.C);
        }
        sum.take([&](int64_t c, double total) { out[c * p.GH * p.GW + cell] = over * static_cast<float>(total); });
        return;
      }
      for (int64_t c = 0; c < p.C; ++c) {
        double total = 0;
        for (int64_t h = top; h < bottom; ++h) total += vec::total_of(xs + c * p.P + h * p.W + left, right - left);
        out[c * p.GH * p.GW + cell] = over * static_cast<float>(total);
      }
    });
  }
  gemm::multiply(n, means.data(), p.cells, 1, p.grid_t, scores.data(), p.KP);
  for (int64_t s = 0; s < n; ++s) vec::add(g + s * p.K, scores.data() + s * p.KP, p.K);
}

// dL/dV += d^T means; dL/dx is one constant vector for each cell.
void Grid::gradients(int64_t n, const float* d, float* grad_x, const Sums& sums) {
  gemm::multiply(p.K, p.cells, n, d, 1, p.K, means.data(), p.cells, sums.grid_weight, p.cells, true);
  if (!grad_x) return;
  gemm::multiply(n, p.cells, p.K, d, p.K, 1, p.grid_weight, p.cells, spread.data(), p.cells);
  std::fill_n(grad_x, n * p.C * p.P, 0.0f);
  for (int64_t s = 0; s < n; ++s) {
    float* out = grad_x + s * p.C * p.P;
    for_cells([&](int64_t cell, int64_t top, int64_t bottom, int64_t left, int64_t right, float over) {
      for (int64_t c = 0; c < p.C; ++c) line[c] = over * spread[s * p.cells + c * p.GH * p.GW + cell];
      for (int64_t h = top; h < bottom; ++h) {
        if (channels_last) {
          for (int64_t w = left; w < right; ++w) vec::add(out + (h * p.W + w) * p.C, line.data(), p.C);
        } else {
          for (int64_t c = 0; c < p.C; ++c) vec::add_constant(out + c * p.P + h * p.W + left, line[c], right - left);
        }
      }
    });
  }
}

}  // namespace goodness
