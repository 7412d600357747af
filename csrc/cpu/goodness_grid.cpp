// The spatial term of goodness: g[b, k] += sum_cell V[k, cell] mean_cell(x_b), with the cells of adaptive average pooling.
//
// x is read once, and dL/dx written once, by lines: [W, C] a row of a sample in channels_last, [W] one of a channel otherwise.

#include "goodness.h"
#include "vec.h"

namespace goodness {
namespace {

struct Span {
  int64_t from, to;
};
Span cell_of(int64_t i, int64_t cells, int64_t size) {
  return {i * size / cells, ((i + 1) * size + cells - 1) / cells};
}

}  // namespace

Grid::Grid(const Problem& p, int64_t most, bool channels_last)
    : p(p), lines(channels_last ? 1 : p.C), length(p.C * p.W / lines), next_c(channels_last ? 1 : p.W),
      next_w(channels_last ? p.C : 1), next_channel(p.M ? 1 : p.GH * p.GW), next_cell(p.M ? p.C : 1),
      spread(most * p.cells), scores(most * p.KP), row(p.C * p.W), cell(p.C), totals(p.C * p.GW) {}

void Grid::means_of(const float* x, float* means) {
  for (int64_t i = 0; i < p.GH; ++i) {
    const Span rows = cell_of(i, p.GH, p.H);
    std::fill(totals.begin(), totals.end(), 0.0);
    for (int64_t start = rows.from; start < rows.to; start += vec::kChunk) {
      std::fill(row.begin(), row.end(), 0.0f);
      for (int64_t l = 0; l < lines; ++l)
        for (int64_t h = start; h < std::min(start + vec::kChunk, rows.to); ++h)
          vec::add(row.data() + l * length, x + l * p.P + h * length, length);
      for (int64_t j = 0; j < p.GW; ++j) {
        const Span columns = cell_of(j, p.GW, p.W);
        for (int64_t w = columns.from; w < columns.to; ++w)
          for (int64_t c = 0; c < p.C; ++c) totals[j * p.C + c] += row[w * next_w + c * next_c];
      }
    }
    for (int64_t j = 0; j < p.GW; ++j) {
      const Span columns = cell_of(j, p.GW, p.W);
      const float over = 1.0f / ((rows.to - rows.from) * (columns.to - columns.from));
      for (int64_t c = 0; c < p.C; ++c)
        means[c * next_channel + (i * p.GW + j) * next_cell] = over * static_cast<float>(totals[j * p.C + c]);
    }
  }
}

void Grid::add_goodness(int64_t n, const float* x, float* means, int64_t stride, float* g) {
  for (int64_t s = 0; s < n; ++s) means_of(x + s * p.C * p.P, means + s * stride);
  if (p.M) return;
  gemm::multiply(n, means, stride, 1, p.grid_t, scores.data(), p.KP);
  for (int64_t s = 0; s < n; ++s) vec::add(g + s * p.K, scores.data() + s * p.KP, p.K);
}

// Each position gets the sum of its cells' values, divided by the cells' sizes: cells overlap where they do not divide the image.
void Grid::spread_over(const float* values, float* grad_x) {
  for (int64_t i = 0, rows_done = 0; i < p.GH; ++i) {
    const Span rows = cell_of(i, p.GH, p.H);
    for (int64_t j = 0, done = 0; j < p.GW; ++j) {
      const Span columns = cell_of(j, p.GW, p.W);
      const float over = 1.0f / ((rows.to - rows.from) * (columns.to - columns.from));
      for (int64_t c = 0; c < p.C; ++c) cell[c] = over * values[c * next_channel + (i * p.GW + j) * next_cell];
      for (int64_t w = columns.from; w < columns.to; ++w) {
        for (int64_t c = 0; c < p.C; ++c) {
          float& at = row[w * next_w + c * next_c];
          at = w < done ? at + cell[c] : cell[c];
        }
      }
      done = columns.to;
    }
    for (int64_t l = 0; l < lines; ++l) {
      const float* line = row.data() + l * length;
      for (int64_t h = rows.from; h < rows.to; ++h) {
        float* target = grad_x + l * p.P + h * length;
        h < rows_done ? vec::add(target, line, length) : vec::copy(target, line, length);
      }
    }
    rows_done = rows.to;
  }
}

void Grid::input_gradient(int64_t first, int64_t n, const float* d, float* grad_x) {
  const float* const values = p.M ? p.cell_grads + first * p.cells : spread.data();
  if (!p.M) gemm::multiply(n, p.cells, p.K, d, p.K, 1, p.grid_weight, p.cells, spread.data(), p.cells);
  for (int64_t s = 0; s < n; ++s) spread_over(values + s * p.cells, grad_x + s * p.C * p.P);
}

// By blocks of columns that stay in the cache; the order of a sum does not depend on them.
void multiply_transposed(int64_t M, int64_t N, int64_t rows, const float* a, const float* b, float* c) {
  constexpr int64_t kColumns = 256;
  parallel_for(0, (N + kColumns - 1) / kColumns, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kColumns; n < std::min(end * kColumns, N); n += kColumns)
      gemm::multiply(M, std::min(kColumns, N - n), rows, a, 1, M, b + n, N, c + n, N);
  });
}

}  // namespace goodness
