// fastff::tail_native: the end of a block in three passes over the last convolution's output y, float32 on the CPU.
//
//   statistics   mean and variance of each channel                                                reads y
//   one task a few samples: h = batch_norm(y) + residual, x = activation(h) in the task's cache, goodness_step on it (goodness.cpp), dL/dh and its
//   two sums                                                                                      reads y and residual, writes dL/dh and the next input
//   dL/dy        from the sums over the whole batch                                               reads y and dL/dh, writes dL/dy over dL/dh
//
// x, its gradient and all that lies between stay in the cache. Formulas: fastff/reference.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "goodness.h"

namespace goodness {
namespace {

// Checked by fastff/kernels/native/tail.py, which also allocates the outputs; absent tensors are empty. grad_residual: wanted where not empty.
void tail_native(Tensor y, Tensor weight, Tensor bias, Tensor grid, Tensor target, Tensor tau_factor, Tensor scale_factor, Tensor residual,
                 Tensor bn_weight, Tensor bn_bias, double bn_eps, int64_t activation, bool rows, bool second_moment, int64_t classes,
                 int64_t grid_rows, int64_t grid_columns, double tau, double margin, double smoothing, double scale, double eps, Tensor g,
                 Tensor losses, Tensor dtau, Tensor grad_y, Tensor grad_weight, Tensor grad_bias, Tensor grad_grid, Tensor normalized,
                 Tensor grad_residual, Tensor sums, Tensor mean, Tensor var) {
  Problem p = problem_of(y, weight, bias, grid, target, tau_factor, scale_factor, kStep, rows, second_moment, classes, grid_rows, grid_columns, tau,
                         margin, smoothing, scale, eps);
  const BatchNorm tail(p.x, read_only(residual), read_only(bn_weight), read_only(bn_bias), static_cast<float>(bn_eps), p.B, p.C, p.P, rows,
                       static_cast<Activation>(activation), writable(mean), writable(var));
  float* const grad_h = writable(grad_residual) ? writable(grad_residual) : writable(grad_y);
  p.tail = &tail;
  p.g = writable(g), p.losses = writable(losses), p.dtau = writable(dtau), p.grad_x = grad_h, p.normalized = writable(normalized);
  run(p, writable(grad_weight), writable(grad_bias), writable(grad_grid), writable(sums));
  tail.finish(grad_h, writable(sums), writable(grad_y));
  for (int64_t c = 0; c < p.C; ++c) writable(sums)[p.C + c] *= tail.rstd(c);  // dL/dweight
}

}  // namespace
}  // namespace goodness

STABLE_TORCH_LIBRARY_FRAGMENT(fastff, m) {
  m.def(
      "tail_native(Tensor y, Tensor weight, Tensor bias, Tensor grid, Tensor target, Tensor tau_factor, Tensor scale_factor, Tensor residual, "
      "Tensor bn_weight, Tensor bn_bias, float bn_eps, int activation, bool rows, bool second_moment, int classes, int grid_rows, "
      "int grid_columns, float tau, float margin, float smoothing, float scale, float eps, Tensor(a!) g, Tensor(b!) losses, Tensor(c!) dtau, "
      "Tensor(d!) grad_y, Tensor(e!) grad_weight, Tensor(f!) grad_bias, Tensor(g!) grad_grid, Tensor(h!) normalized, Tensor(i!) grad_residual, "
      "Tensor(j!) sums, Tensor(k!) mean, Tensor(l!) var) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastff, CPU, m) { m.impl("tail_native", TORCH_BOX(&goodness::tail_native)); }
