// fastff::step_native on CUDA, for what fastff/kernels/cuda/goodness.py lets through: its results, and the launches that write them.

#include "step.h"

#include "../cpu/step.h"

std::vector<Tensor> goodness_step(const spec::Step& given) {
  const spec::Projection& head = given.projection;
  const bool layer_norm = given.normalization.name == spec::NormalizationName::layer_norm;
  STD_TORCH_CHECK(given.has_projection && head.weight && !head.grid_weight && !given.has_epilogue &&
                      !given.has_groups && given.loss.name == spec::LossName::cross_entropy && given.loss.target &&
                      (layer_norm || given.normalization.name == spec::NormalizationName::none),
                  "step_native: on CUDA only the goodness of a projection without a grid has a kernel");
  const Tensor &x = given.x, &weight = *head.weight;
  const MaybeTensor &bias = head.bias, &learned_tau = given.loss.learned_tau;
  const int64_t B = x.size(0), C = x.size(1), P = x.size(2) * x.size(3), K = weight.size(0);
  STD_TORCH_CHECK(
      is_channels_last(x) && x.numel() > 0 && weight.numel() == K * C && given.loss.target->numel() == B &&
          (x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half),
      "step_native: on CUDA x must be [B, C, H, W] in bfloat16 or float16, channels_last, and weight [K, C, 1, 1]");
  const int device = x.get_device_index();
  const Division division = division_of(B, P, C, K, bias.has_value(), device_of(device));
  STD_TORCH_CHECK(division.blocks > 0, "step_native: the samples of x do not fit the shared memory of the device");

  const int32_t single = aoti_torch_dtype_float32();
  spec::StepResult r(absent(x));
  r.loss = empty(x, {B}, single), r.goodness = empty(x, {B, K}, single), r.grad_weight = empty(x, {K, C, 1, 1}, single);
  if (bias) r.grad_bias = empty(x, {K}, single);
  if (learned_tau) r.grad_tau = empty(x, {}, single);
  if (given.need_grad_x) r.grad_x = empty_like(x, true);
  if (layer_norm) r.normalized = empty_like(x, true);
  const int width = C + (bias ? 1 : 0);
  const Tensor partial = empty(x, {division.grid, K * width + 1}, single);

  const auto to = [](const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; };
  const spec::Loss& loss = given.loss;
  StepArguments step{};
  step.x = x.const_data_ptr(), step.half = x.scalar_type() == ScalarType::Half;
  step.weight = floats(weight), step.bias = floats(bias), step.width = width;
  step.target = static_cast<const int64_t*>(loss.target->const_data_ptr());
  step.learned_tau = floats(learned_tau), step.grad_scale = floats(loss.grad_scale);
  step.grad_x = to(r.grad_x), step.normalized = to(r.normalized);
  step.loss = writable(r.loss), step.goodness = writable(r.goodness), step.partial = writable(partial);
  step.grad_weight = writable(r.grad_weight), step.grad_bias = writable(r.grad_bias),
  step.grad_tau = writable(r.grad_tau);
  step.B = B, step.P = P, step.C = C, step.K = K;
  step.tau = loss.tau, step.margin = loss.margin, step.label_smoothing = loss.label_smoothing;
  step.scale = loss.reduction == spec::Reduction::mean ? 1.0f / B : 1.0f, step.eps = given.normalization.eps;
  step.division = division, step.at = layout_of(division.samples, division.tiles, C, K, bias.has_value());
  const char* const problem = launch(step, device);
  STD_TORCH_CHECK(!problem, "step_native: ", problem);
  return r.all();
}

// For fastff/kernels/cuda/goodness.py: the blocks that each sample would have on a device, or 0 if it does not fit.
extern "C" __attribute__((visibility("default"))) int fastff_goodness_blocks(int device, int B, int P, int C, int K,
                                                                             int bias) {
  return division_of(B, P, C, K, bias != 0, device_of(device)).blocks;
}

STABLE_TORCH_LIBRARY_IMPL(fastff, CUDA, m) { m.impl("step_native", &spec::boxed<spec::Step, goodness_step>); }
