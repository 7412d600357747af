// fastff::epilogue_forward_native and fastff::epilogue_backward_native: batch norm, residual, activation and the next input's layer norm, at the
// end of a block or between its convolutions, float32 on the CPU.
//
//   forward    h = batch_norm(y) + residual, x = activation(h), normalized = layer_norm(x)     reads y twice, the residual once; writes x, normalized
//   backward   from dL/dx, dL/dnormalized or both:
//              one task a sample: x again, layer norm's gradient, dL/dh and its two sums       reads y, the residual, the gradients; writes dL/dh
//              dL/dy from the sums over the whole batch                                        reads y and dL/dh, writes dL/dy over dL/dh
//
// A sample's x and all that lies between stay in the cache. The gradients of another loss at the same h may be added (`added_*`), so that
// a block which two losses train runs this once for both. Formulas: fastff/reference.py.

#include <algorithm>
#include <cmath>
#include <vector>

#include "epilogue.h"
#include "normalization.h"
#include "spec.h"

namespace {

// grad_x += the gradient of (x - mean) / sqrt(var + eps) over the n elements of a sample, from that of the result. Sums are about the pivot.
void add_layer_norm_gradient(const float* __restrict x, const float* __restrict grad, float* __restrict grad_x,
                             int64_t n, double eps, float pivot, bool again = true) {
  double sum = 0, square = 0, sum_grad = 0, product = 0;
  for (int64_t start = 0; start < n; start += vec::kLongChunk) {
    const int64_t end = std::min(start + vec::kLongChunk, n);
    float s = 0, q = 0, g = 0, p = 0;
#pragma omp simd reduction(+ : s, q, g, p)
    for (int64_t i = start; i < end; ++i) {
      const float off = x[i] - pivot;
      s += off;
      q += off * off;
      g += grad[i];
      p += grad[i] * off;
    }
    sum += s, square += q, sum_grad += g, product += p;
  }
  const double off = sum / n, variance = std::max(square / n - off * off, 0.0), rstd = 1 / std::sqrt(variance + eps);
  const float mean = static_cast<float>(pivot + off), a = static_cast<float>(rstd),
              b = static_cast<float>(sum_grad / n);
  if (again && is_far(off, variance, mean)) return add_layer_norm_gradient(x, grad, grad_x, n, eps, mean, false);
  const float c = static_cast<float>((product - off * sum_grad) / n * rstd * rstd);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) grad_x[i] += a * (grad[i] - b - (x[i] - mean) * c);
}

Epilogue made(const Tensor& y, const spec::Epilogue& e, float* mean, float* var, bool known) {
  return Epilogue(Floats(y), Floats(e.residual), floats(e.weight), floats(e.bias), static_cast<float>(e.eps),
                  {y.size(0), y.size(1), y.size(2) * y.size(3), is_channels_last(y)}, e.activation, mean, var, known);
}

struct Forward : spec::Part {
  using Part::Part;
  Tensor y = input("y");
  spec::Epilogue epilogue{in, "epilogue_"};
  MaybeTensor mean = tensor("mean"), var = tensor("var");  // [C], where they are known already
  bool need_x = flag("need_x"), normalize = flag("normalize");
  double normalization_eps = number("normalization_eps");
};

std::vector<Tensor> forward(const Forward& given) {
  const Tensor& y = given.y;
  const int64_t B = y.size(0), C = y.size(1), n = C * y.size(2) * y.size(3);
  const bool known = given.mean && given.var, channels_last = is_channels_last(y);
  Tensor mean = known ? *given.mean : empty(y, {C}), var = known ? *given.var : empty(y, {C});
  Tensor x = given.need_x ? empty_like(y, channels_last) : absent(y),
         normalized = given.normalize ? empty_like(y, channels_last) : absent(y);
  const Epilogue epilogue = made(y, given.epilogue, writable(mean), writable(var), known);
  float *const to_x = writable(x), *const to_normalized = writable(normalized);
  parallel_for(0, B, std::max<int64_t>(1, 32768 / n), [&](int64_t begin, int64_t end) {
    Buffer<float> sample(to_x ? 0 : n);
    for (int64_t b = begin; b < end; ++b) {
      float* const at = to_x ? to_x + b * n : sample.data();
      epilogue.forward(b, 1, at);
      if (to_normalized) layer_norm(at, to_normalized + b * n, n, given.normalization_eps);
    }
  });
  return {x, normalized, known ? absent(y) : mean, known ? absent(y) : var};
}

struct Backward : spec::Part {
  using Part::Part;
  Tensor y = input("y");
  spec::Epilogue epilogue{in, "epilogue_"};
  MaybeTensor mean = tensor("mean"), var = tensor("var");
  MaybeTensor grad_x = tensor_like_x("grad_x"), grad_normalized = tensor_like_x("grad_normalized");
  double normalization_eps = number("normalization_eps");
  MaybeTensor added_grad_h = tensor_like_x("added_grad_h"), added_grad_weight = tensor("added_grad_weight"),
              added_grad_bias = tensor("added_grad_bias");
  bool overwrite = flag("overwrite");  // whether dL/dh may take the memory of grad_x or added_grad_h
};

// dL/dh of one sample into `to`, which may be the memory of grad_x or of added_grad_h, and its sums.
void sample_gradient(const Backward& given, const Epilogue& epilogue, int64_t b, int64_t n, float* to,
                     Buffer<float>& scratch, double* sums) {
  float *const x = scratch.data(), *const grad = given.added_grad_h ? scratch.data() + n : to;
  const int64_t at = b * n;
  if (given.grad_x) {
    if (floats(given.grad_x) + at != grad) std::copy_n(floats(given.grad_x) + at, n, grad);
  } else {
    std::fill_n(grad, n, 0.0f);
  }
  if (given.grad_normalized) {
    epilogue.forward(b, 1, x);
    add_layer_norm_gradient(x, floats(given.grad_normalized) + at, grad, n, given.normalization_eps, x[0]);
  }
  epilogue.backward(b, 1, grad, sums);
  if (!given.added_grad_h) return;
  const float* added = floats(given.added_grad_h) + at;
  for (int64_t i = 0; i < n; ++i) to[i] = added[i] + grad[i];
}

// Returns dL/dy, dL/dh (the residual's gradient; empty unless asked for), dL/dweight and dL/dbias [C].
std::vector<Tensor> backward(const Backward& given) {
  const Tensor& y = given.y;
  const int64_t B = y.size(0), C = y.size(1), n = C * y.size(2) * y.size(3);
  const bool channels_last = is_channels_last(y),
             need_grad_h = given.epilogue.residual && given.epilogue.need_grad_residual;
  const MaybeTensor& reused = given.added_grad_h ? given.added_grad_h : given.grad_x;
  Tensor grad_h = given.overwrite && reused ? *reused : empty_like(y, channels_last), grad_weight = empty(y, {C}),
         grad_bias = empty(y, {C});
  const Epilogue epilogue = made(y, given.epilogue, writable(*given.mean), writable(*given.var), true);
  float* const to = writable(grad_h);
  const int64_t groups = std::min<int64_t>(B, 16);  // whatever the number of threads
  Buffer<double> sums(groups * 2 * C, 0.0);
  parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> scratch(given.added_grad_h ? 2 * n : given.grad_normalized ? n : 0);
    for (int64_t group = begin; group < end; ++group)
      for (int64_t b = group * B / groups; b < (group + 1) * B / groups; ++b)
        sample_gradient(given, epilogue, b, n, to + b * n, scratch, sums.data() + group * 2 * C);
  });
  for (int64_t i = 2 * C; i < groups * 2 * C; ++i) sums[i % (2 * C)] += sums[i];
  if (given.added_grad_h)
    epilogue.add_parameter_gradients(floats(given.added_grad_weight), floats(given.added_grad_bias), sums.data());
  Tensor grad_y = need_grad_h ? empty_like(y, channels_last) : grad_h;
  epilogue.finish(to, sums.data(), writable(grad_y));
  epilogue.parameter_gradients(sums.data(), writable(grad_weight), writable(grad_bias));
  return {grad_y, need_grad_h ? grad_h : absent(y), grad_weight, grad_bias};
}

// running [C], contiguous float32, moves by `momentum` towards the batch's mean and its unbiased variance; tracked, of one int64, counts the batch.
void update_running_statistics(Tensor running_mean, Tensor running_var, MaybeTensor tracked, Tensor mean, Tensor var,
                               double momentum, double count) {
  const float m = static_cast<float>(momentum), unbiased = static_cast<float>(count / (count - 1));
  float *const to_mean = writable(running_mean), *const to_var = writable(running_var);
  for (int64_t c = 0; c < running_mean.size(0); ++c) {
    to_mean[c] += m * (floats(mean)[c] - to_mean[c]);
    to_var[c] += m * (floats(var)[c] * unbiased - to_var[c]);
  }
  if (tracked) ++*static_cast<int64_t*>(tracked->mutable_data_ptr());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastff, m) {
  m.def(spec::schema<Forward>("epilogue_forward_native", "(Tensor x, Tensor normalized, Tensor mean, Tensor var)")
            .c_str());
  m.def(spec::schema<Backward>("epilogue_backward_native",
                               "(Tensor grad_y, Tensor grad_h, Tensor grad_weight, Tensor grad_bias)")
            .c_str());
  m.def(
      "update_running_statistics_native(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? tracked, "
      "Tensor mean, Tensor var, float momentum, float count) "
      "-> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastff, CPU, m) {
  m.impl("epilogue_forward_native", &spec::boxed<Forward, forward>);
  m.impl("epilogue_backward_native", &spec::boxed<Backward, backward>);
  m.impl("update_running_statistics_native", TORCH_BOX(&update_running_statistics));
}
