// fastff::tail_native: the end of a block in three passes over the last convolution's output y, float32 on the CPU.
//
//   statistics   mean and variance of each channel                                                reads y
//   one task a few samples: h = batch_norm(y) + residual, x = activation(h) in the task's cache, goodness_step on it (goodness.cpp), dL/dh and its
//   two sums                                                                                      reads y and residual, writes dL/dh and the next input
//   dL/dy        from the sums over the whole batch                                               reads y and dL/dh, writes dL/dy over dL/dh
//
// x, its gradient and all that lies between stay in the cache. Formulas: fastff/reference.py.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "goodness.h"

namespace goodness {
namespace {

// All float32 on the CPU, y not empty, the residual of y's shape, as fastff/kernels/native/tail.py sees to.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tail_native(
    Tensor y, MaybeTensor weight, MaybeTensor bias, MaybeTensor grid, Tensor target, MaybeTensor tau_factor, MaybeTensor scale_factor,
    MaybeTensor residual, MaybeTensor bn_weight, MaybeTensor bn_bias, double bn_eps, int64_t activation, bool second_moment, double tau,
    double margin, double smoothing, double scale, double eps, bool need_residual, bool normalize) {
  y = dense(y);
  const bool rows = is_rows(y);
  residual = lying_as(residual, y);
  bn_weight = packed(bn_weight), bn_bias = packed(bn_bias);
  Call call(y, {weight, bias, grid, target, tau_factor, scale_factor, second_moment, tau, margin, smoothing, scale, eps}, kStep, true, normalize);
  Problem& p = call.p;
  Tensor mean = empty(y, {p.C}), var = empty(y, {p.C}), grad_bn_weight = empty(y, {p.C}), grad_bn_bias = empty(y, {p.C});
  const BatchNorm tail(p.x, floats(residual), floats(bn_weight), floats(bn_bias), static_cast<float>(bn_eps), p.B, p.C, p.P, rows,
                       static_cast<Activation>(activation), writable(mean), writable(var));
  p.tail = &tail;
  std::vector<float> sums(2 * p.C);
  call.run(sums.data());
  Tensor grad_y = need_residual ? empty_like(y, rows) : call.grad_x;
  tail.finish(writable(call.grad_x), sums.data(), writable(grad_y));
  tail.parameter_gradients(sums.data(), writable(grad_bn_weight), writable(grad_bn_bias));
  return {call.g, call.losses, call.dtau, grad_y, call.grad_weight, call.grad_bias, call.grad_grid, call.normalized,
          need_residual ? call.grad_x : absent(y), grad_bn_weight, grad_bn_bias, mean, var};
}

}  // namespace
}  // namespace goodness

STABLE_TORCH_LIBRARY_FRAGMENT(fastff, m) {
  m.def(
      "tail_native(Tensor y, Tensor? weight, Tensor? bias, Tensor? grid, Tensor target, Tensor? tau_factor, Tensor? scale_factor, "
      "Tensor? residual, Tensor? bn_weight, Tensor? bn_bias, float bn_eps, int activation, bool second_moment, float tau, float margin, "
      "float smoothing, float scale, float eps, bool need_residual, bool normalize) "
      "-> (Tensor g, Tensor losses, Tensor dtau, Tensor grad_y, Tensor grad_weight, Tensor grad_bias, Tensor grad_grid, Tensor normalized, "
      "Tensor grad_residual, Tensor grad_bn_weight, Tensor grad_bn_bias, Tensor mean, Tensor var)");
}
STABLE_TORCH_LIBRARY_IMPL(fastff, CPU, m) { m.impl("tail_native", TORCH_BOX(&goodness::tail_native)); }
