// The end of a block: batch norm, residual and activation in float32 on the CPU, forward and backward, for operators that own whole samples.
//
//   h = (y - mean) scale + shift + residual,  x = activation(h);   scale = weight / sqrt(var + eps), shift = bias
//
// y, x and the residual have the same layout: [B, C, P] with contiguous positions, or [B, P, C] with contiguous channels (channels_last).
#pragma once

#include <cstdint>
#include <vector>

#include "spec.h"

using spec::Activation;

// Samples of one memory layout: `lines` runs of `length` elements. In channels_last a line is some positions, and the vectors have an element for
// each of its elements; otherwise a line is a channel of one sample, and they have one element for each channel.
struct EpilogueSamples {
  int64_t lines, length, C;
  bool channels_last;
  const float *y, *residual, *mean, *scale, *shift;

  int64_t channel(int64_t line) const { return channels_last ? 0 : line % C; }
  const float* residual_at(int64_t at) const { return residual ? residual + at : nullptr; }
};

struct EpilogueShape {
  int64_t B, C, P;
  bool channels_last;
};

// Whether sums of squares about a pivot that is `off` from the mean lose digits of the variance, which sums about the mean keep. No more than
// the roundings of the values themselves is worth a second pass.
inline bool is_far(double off, double variance, double mean) { return off * off > 16 * variance + 1e-10 * mean * mean; }

class Epilogue {
 public:
  // weight, bias: [C] or null. mean, var [C]: the batch's biased statistics, results (the same for any number of threads) unless `known`.
  Epilogue(Floats y, Floats residual, const float* weight, const float* bias, float eps, EpilogueShape shape,
           Activation activation, float* mean, float* var, bool known = false);

  // x of samples first .. first + n - 1.
  void forward(int64_t first, int64_t n, float* x) const;

  // grad: dL/dx of these samples on entry, dL/dh on return. Adds sum dL/dh and sum dL/dh (y - mean) to sums [2, C].
  void backward(int64_t first, int64_t n, float* grad, double* sums) const;

  // dL/dy of all samples from dL/dh; may be the same memory. sums: the batch's.
  void finish(const Floats& grad_h, const double* sums, const Results<>& grad_y) const;

  // dL/dweight and dL/dbias [C] from the batch's sums.
  void parameter_gradients(const double* sums, float* grad_weight, float* grad_bias) const;

  // Adds to the sums those behind another loss's parameter gradients.
  void add_parameter_gradients(const float* grad_weight, const float* grad_bias, double* sums) const;

 private:
  struct Scratch {
    Buffer<float> y, residual;
  };

  Floats y, residual;
  int64_t B, C, P;
  int64_t repeat;  // channels_last: times that the vectors below are repeated, for as many positions in one inner loop
  bool channels_last;
  Activation activation;
  Buffer<float> rstds, centre, scale, shift;

  void statistics(Buffer<float> pivot, float* mean, float* var, bool again) const;
  Buffer<float> some_means() const;
  EpilogueSamples samples(int64_t first, int64_t n, Scratch& scratch) const;
};
