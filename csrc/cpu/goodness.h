// Goodness of a projection, its loss, local gradient and next input in one pass over whole samples, in float32 arithmetic on the CPU.
//
// x [B, C, P] with contiguous positions, or [B, P, C] with contiguous channels (channels_last). Formulas: fastff/reference.py.
//
//   goodness.cpp                 tasks of a few samples, their sums in order, and the operators
//   goodness_direct.cpp          squares from a = W x
//   goodness_second_moment.cpp   squares from S = x x^T
//   goodness_grid.cpp            the spatial term
//   goodness_hidden.cpp          the spatial term with a hidden layer, whose batch norm needs the whole batch: two sweeps over x
#pragma once

#include <memory>

#include "gemm.h"
#include "step.h"
#include "vec.h"

namespace goodness {

// Classes are padded to a multiple of this where they are the columns of a.
constexpr int64_t kPadding = 16;

// What all tasks of one call share. Null pointers for what is absent.
struct Problem {
  Problem(const Tensor& x, const spec::Projection& projection, bool second_moment);
  void lay_out_weights(bool with_gradient);

  int64_t B, C, H, W, P, K, KP, GH, GW, cells;  // KP: K padded; cells: C * GH * GW
  int64_t M;                                    // channels of the hidden layer, or 0
  bool channels_last, second_moment;
  Floats x;
  const float *weight, *bias, *grid_weight;  // [K, C], [K], [K, C, GH, GW] ([K, M, GH, GW] with a hidden layer)
  const Epilogue* epilogue = nullptr;        // what makes the head's input of x
  const Loss* loss = nullptr;                // gradients are of the loss,
  const float* d = nullptr;                  // or of sum(d * g); without either only goodness is computed
  const spec::Normalization* normalization = nullptr;
  float *g = nullptr, *losses = nullptr;
  Results<> grad_x, normalized;
  double* grad_tau = nullptr;                     // a summand for each loss
  float *cell_means = nullptr, *all_d = nullptr;  // [B, cells], and [B, K] where dL/dV is wanted
  const float* cell_grads = nullptr;              // dL/dmeans [B, cells], of a hidden layer
  gemm::Panels weight_t, weight_panels, grid_t;   // W^T [C, K] and W [K, C] of the direct algorithm, V^T [cells, K]
};

// Where a task adds up its share of dL/dW [K, C] and dL/dbias [K], and says after each term that it has; and the epilogue's two sums [2, C].
struct Sums {
  vec::LineSum* line;
  float *weight, *bias;
  double* epilogue;
};

// An algorithm for the squares of one task, at most `most` samples at a time: x [n, C, P], or [n, P, C] where it asked for channels last.
// goodness writes g [n, K]; gradients follows it on the same samples, with d = dL/dg [n, K].
class Squares {
 public:
  virtual ~Squares() = default;
  virtual void goodness(int64_t n, const float* x, float* g) = 0;
  virtual void gradients(int64_t n, const float* x, const float* d, float* grad_x, bool add, const Sums& sums) = 0;

  // Whether gradients uses what goodness kept; if not, it can be called alone.
  virtual bool keeps() const { return true; }
};

int64_t direct_samples(const Problem& p);  // samples that the direct algorithm wants in a task
bool is_channels_first(const Problem& p, int64_t most);
std::unique_ptr<Squares> direct(const Problem& p, int64_t most);
std::unique_ptr<Squares> direct_channels_first(const Problem& p, int64_t most);
std::unique_ptr<Squares> second_moment(const Problem& p, int64_t most);

// The spatial term: means over cells [n, C, GH, GW] times V^T, and its adjoint in x. With a hidden layer only the means, [n, GH, GW, C], and
// the adjoint from p.cell_grads.
class Grid {
 public:
  Grid(const Problem& p, int64_t most, bool channels_last);
  void add_goodness(int64_t n, const float* x, float* means, int64_t stride, float* g);  // means: n rows `stride` apart
  void input_gradient(int64_t first, int64_t n, const float* d, float* grad_x);          // writes grad_x

 private:
  const Problem& p;
  int64_t lines, length, next_c, next_w;  // lines of a row of x, their length, distances in a row
  int64_t next_channel, next_cell;        // distances in the means
  Buffer<float> spread, scores, row, cell;
  Buffer<double> totals;

  void means_of(const float* x, float* means);
  void spread_over(const float* values, float* grad_x);
};

// c [M, N] = a^T b, of a [rows, M] and b [rows, N].
void multiply_transposed(int64_t M, int64_t N, int64_t rows, const float* a, const float* b, float* c);

// All tasks of a batch. results: where the gradients of the head's parameters and the epilogue's sums go; null for those not wanted.
void sweep(const Problem& p, const Sums& results);

// A step with a hidden layer.
void step_with_hidden_layer(Problem& p, const spec::Projection& given, const Sums& results, spec::StepResult& r);

}  // namespace goodness
