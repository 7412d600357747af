// One pass over whole samples: goodness, loss, local gradient and layer norm (goodness.cpp), for the operators goodness_native and tail_native.
#pragma once

#include "batch_norm.h"
#include "gemm.h"
#include "tensors.h"

namespace goodness {

enum Mode : int64_t { kGoodness = 0, kStep = 1, kBackward = 2 };

// x [B, C, P] or [B, P, C] (`rows`), or where there is a `tail` what it gives; absent tensors are null.
struct Problem {
  int64_t B, C, H, W, P, K, KP, GH, GW, cells;  // KP: K padded to a multiple of 16; cells: C * GH * GW
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

// What both operators are given beside x; factors of tau and of all gradients are tensors of one element.
struct Head {
  MaybeTensor weight, bias, grid, target, tau_factor, scale_factor;  // weight [K, C, 1, 1], bias [K], grid [K, C, GH, GW], target [B] int64
  bool second_moment;
  double tau, margin, smoothing, scale, eps;
};

// One call: its problem, and the tensors it writes, empty where there is no such thing.
struct Call {
  Call(const Tensor& x, const Head& head, Mode mode, bool need_x, bool normalize);
  void run(float* tail_sums);

  Head head;
  Problem p{};
  Tensor g, losses, dtau, grad_x, grad_weight, grad_bias, grad_grid, normalized;
};

}  // namespace goodness
