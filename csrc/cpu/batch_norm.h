// Batch norm, residual and activation of float32 samples on the CPU, forward and backward, for the operators that own whole samples.
//
//   h = (y - mean) scale + shift + residual,  x = activation(h);   scale = weight / sqrt(var + eps), shift = bias
//
// y, x and the residual lie alike: [B, C, P] with contiguous positions, or [B, P, C] with contiguous channels (`rows`).
#pragma once

#include <cstdint>
#include <vector>

enum Activation : int64_t { kNone, kReLU, kReLU6, kHardswish, kSiLU, kGELU };  // the order of ACTIVATIONS in fastff/reference.py

class BatchNorm {
 public:
  // mean and var: results [C]. weight, bias: [C] or null. The batch's biased statistics, the same for any number of threads.
  BatchNorm(const float* y, const float* residual, const float* weight, const float* bias, float eps, int64_t B, int64_t C, int64_t P, bool rows,
            Activation activation, float* mean, float* var);

  // The same with statistics that are known: mean and var [C].
  BatchNorm(const float* y, const float* residual, const float* weight, const float* bias, float eps, int64_t B, int64_t C, int64_t P, bool rows,
            Activation activation, const float* mean, const float* var);

  // x of samples first .. first + n - 1.
  void forward(int64_t first, int64_t n, float* x) const;

  // grad: dL/dx of these samples on entry, dL/dh on return. Adds sum dL/dh and sum dL/dh (y - mean) to sums [2, C].
  void backward(int64_t first, int64_t n, float* grad, float* sums) const;

  // dL/dy of all samples from dL/dh; may be the same memory. sums: the batch's.
  void finish(const float* grad_h, const float* sums, float* grad_y) const;

  // dL/dweight and dL/dbias [C] from the batch's sums.
  void parameter_gradients(const float* sums, float* grad_weight, float* grad_bias) const;

  // Adds to the sums those behind another loss's parameter gradients.
  void add_parameter_gradients(const float* grad_weight, const float* grad_bias, float* sums) const;

 private:
  void set_channel(int64_t c, float mean, double var, float eps, const float* weight, const float* bias);
  void repeat_constants();

  const float *y, *residual;
  int64_t B, C, P, repeat;  // rows: the vectors below stand `repeat` times behind each other, for so many positions to a line
  bool rows;
  Activation activation;
  std::vector<float> rstds, centre, scale, shift;
};
