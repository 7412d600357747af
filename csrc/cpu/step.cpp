// fastff::step_native: a whole local step on the CPU, [epilogue] -> goodness -> loss -> gradients -> next input, from the arguments of
// fastff/spec.py. With an epilogue it makes three passes over the last convolution's output y:
//
//   statistics   mean and variance of each channel                                reads y
//   kernel       x = epilogue(y), g, loss, dL/dx, dL/dh with its two sums, next input   reads y and residual, writes dL/dh and next input
//   dL/dy        from the sums over the whole batch                               reads y and dL/dh, writes dL/dy over dL/dh
//
// x, its gradient and all that lies between stay in the cache. Images of 16 bits are widened, and results rounded, a sample at a time; groups
// without an epilogue take float64 too.

#include "step.h"

#include <algorithm>

namespace {

void check(const spec::Step& step) {
  const int64_t B = step.x.size(0);
  STD_TORCH_CHECK(step.x.dim() == 4 && step.x.numel() > 0, "step_native: x must be [B, C, H, W] and not empty");
  STD_TORCH_CHECK(step.has_projection != step.has_groups, "step_native: give a projection or groups");
  if (step.loss.name != spec::LossName::cross_entropy) {
    STD_TORCH_CHECK(B % 2 == 0, "step_native: as many positive as negative samples are needed, got ", B);
    return;
  }
  const MaybeTensor& target = step.loss.target;
  STD_TORCH_CHECK(target && target->numel() == B && target->scalar_type() == ScalarType::Long,
                  "step_native: target must be [B] int64");
}

void check_labels(const spec::Step& step, int64_t classes) {
  if (step.loss.name != spec::LossName::cross_entropy) return;
  const int64_t* labels = static_cast<const int64_t*>(step.loss.target->const_data_ptr());
  const bool inside =
      std::all_of(labels, labels + step.x.size(0), [=](int64_t label) { return label >= 0 && label < classes; });
  STD_TORCH_CHECK(inside, "step_native: target must be in 0 .. ", classes - 1);
}

// The mean or the sum of losses, as they are summed up in doubles.
template <typename T>
void reduce(const Tensor& losses, spec::Reduction reduction, const Tensor& to) {
  double total = 0;
  for (int64_t i = 0; i < losses.numel(); ++i) total += writable<T>(losses)[i];
  *writable<T>(to) = static_cast<T>(reduction == spec::Reduction::mean ? total / losses.numel() : total);
}

std::vector<Tensor> step_native(const spec::Step& given) {
  check(given);
  const Tensor &x = given.x, none = absent(x);
  const int64_t B = x.size(0), C = x.size(1), P = x.size(2) * x.size(3);
  const bool channels_last = is_channels_last(x),
             residual = given.has_epilogue && given.epilogue.residual && given.epilogue.need_grad_residual;
  const int32_t dtype = x.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const spec::Projection& head = given.projection;
  const int64_t J =
      given.has_groups ? count_of_groups(x, given.groups) : (head.weight ? *head.weight : *head.grid_weight).size(0);
  check_labels(given, J);

  spec::StepResult r(none);
  const Loss loss(given.loss, B);
  Buffer<double> grad_tau(loss.count());
  // Large tensors first: small ones behind them keep the C library from giving their memory back after every step.
  const Tensor grad_y = residual ? empty_like(x, channels_last) : none;
  if (given.need_grad_x || given.has_epilogue) r.grad_x = empty_like(x, channels_last);
  if (given.normalization.name != spec::NormalizationName::none) r.normalized = empty_like(x, channels_last);
  r.loss = empty(x, {loss.count()}, dtype), r.goodness = empty(x, {B, J}, dtype);

  std::optional<Epilogue> epilogue;
  Buffer<double> sums(2 * C);
  if (given.has_epilogue) {
    const spec::Epilogue& e = given.epilogue;
    for (Tensor* t : {&r.mean, &r.var, &r.grad_bn_weight, &r.grad_bn_bias}) *t = empty(x, {C}, dtype);
    epilogue.emplace(Floats(x), Floats(e.residual), floats(e.weight), floats(e.bias), static_cast<float>(e.eps),
                     EpilogueShape{B, C, P, channels_last}, e.activation, writable(r.mean), writable(r.var));
  }
  const StepCall call{given, loss, epilogue ? &*epilogue : nullptr, sums.data(), grad_tau.data(), r};
  given.has_projection ? projection_step(call) : groups_step(call);
  if (epilogue) {
    const Tensor grad_h = r.grad_x;
    if (residual) r.grad_residual = grad_h, r.grad_x = grad_y;
    epilogue->finish(Floats(grad_h), sums.data(), r.grad_x);
    epilogue->parameter_gradients(sums.data(), writable(r.grad_bn_weight), writable(r.grad_bn_bias));
    if (!given.need_grad_x) r.grad_x = none;
  }
  if (given.loss.learned_tau) {
    double total = 0;
    for (const double summand : grad_tau) total += summand;
    r.grad_tau = empty(x, {}, dtype);
    if (dtype == aoti_torch_dtype_float64())
      *writable<double>(r.grad_tau) = total;
    else
      *writable(r.grad_tau) = static_cast<float>(total);
  }
  if (given.loss.reduction != spec::Reduction::none) {
    const Tensor losses = r.loss;
    r.loss = empty(x, {}, dtype);
    const bool wide = dtype == aoti_torch_dtype_float64();
    wide ? reduce<double>(losses, given.loss.reduction, r.loss) : reduce<float>(losses, given.loss.reduction, r.loss);
  }
  return r.all();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastff, m) {
  m.def(spec::schema<spec::Step>("step_native", spec::StepResult().schema()).c_str());
}
STABLE_TORCH_LIBRARY_IMPL(fastff, CPU, m) { m.impl("step_native", &spec::boxed<spec::Step, step_native>); }
