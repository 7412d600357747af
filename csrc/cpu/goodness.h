// One pass over whole samples: goodness, loss, local gradient and layer norm (goodness.cpp), for the operators goodness_native and tail_native.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "batch_norm.h"
#include "gemm.h"

namespace goodness {

using torch::stable::Tensor;

enum Mode : int64_t { kGoodness = 0, kStep = 1, kBackward = 2 };

// x [B, C, P] or [B, P, C] (`rows`), or where there is a `tail` what it gives; absent tensors are null.
struct Problem {
  int64_t B, C, H, W, P, K, KP, GH, GW, cells;  // KP: K padded to whole panels; cells: C * GH * GW
  bool rows, second_moment, need_x, normalize;
  Mode mode;
  const float *x, *weight, *bias, *grid, *d_given;
  const BatchNorm* tail;
  const int64_t* target;
  float tau, margin, smoothing, scale;
  double eps;
  float *g, *losses, *dtau, *grad_x, *normalized;
  gemm::Panels to_outputs, to_input, to_scores;  // W^T [C, K] and W [K, C] of the direct algorithm, V^T [cells, K]
};

const float* read_only(const Tensor& t);
float* writable(const Tensor& t);

// The arguments that all operators share; gradients and results are the caller's.
Problem problem_of(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& grid, const Tensor& target, const Tensor& tau_factor,
                   const Tensor& scale_factor, Mode mode, bool rows, bool second_moment, int64_t classes, int64_t grid_rows, int64_t grid_columns,
                   double tau, double margin, double smoothing, double scale, double eps);

// Writes what the problem points to, dL/dW [K, C], dL/dbias [K] and dL/dV [K, cells] (where not null), and with a tail its sums [2, C].
void run(Problem& p, float* grad_weight, float* grad_bias, float* grad_grid, float* tail_sums);

}  // namespace goodness
