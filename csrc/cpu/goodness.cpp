// Tasks over whole samples for step_native with a projection, goodness_forward_native and goodness_backward_native.
//
// One task takes a few samples (or a pair of them) through everything while they are in its cache: epilogue, goodness, loss, d, gradients, next
// input. x is read, and dL/dx and the next input are written, to main memory once. The sums over samples, dL/dW and the like, are made by group of
// samples and the groups' sums added in order, so that the number of threads changes no bit.

#include "goodness.h"

#include <algorithm>
#include <optional>

#include "normalization.h"

namespace goodness {
namespace {

class Task {
 public:
  Task(const Problem& p, int64_t most)
      : p(p), size(p.C * p.P), members(p.loss ? p.loss->samples() : 1), g(most * p.K), d(most * p.K) {
    const bool channels_first = is_channels_first(p, most);
    transposed = !p.channels_last && !p.second_moment && !channels_first;
    if (p.weight)
      squares = p.second_moment  ? second_moment(p, most)
                : channels_first ? direct_channels_first(p, most)
                                 : direct(p, most);
    if (p.cells) grid.emplace(p, most, p.channels_last || transposed);
    if (p.normalization) normalize.emplace(*p.normalization, p.C, p.P, p.channels_last);
    if (p.epilogue || members > 1) x_copy.resize(most * size);
    if (transposed) x_transposed.resize(most * size);
    if (p.grad_x && (transposed || members > 1 || p.x.are_narrow())) grad_copy.resize(most * size);
  }

  // Samples first .. first + n - 1, or the pair of samples that is unit `first`, through everything.
  void run(int64_t first, int64_t n, const Sums& sums) {
    const float *const input = input_of(first, n), *x = input;
    if (transposed) {
      for (int64_t i = 0; i < n; ++i)
        gemm::transpose(p.C, p.P, input + i * size, p.P, x_transposed.data() + i * size, p.C);
      x = x_transposed.data();
    }
    float* const grad_x = !grad_copy.empty() ? grad_copy.data()
                          : p.grad_x         ? p.grad_x.at(first * size, n * size, result)
                                             : nullptr;
    if (!squares) std::fill(g.begin(), g.end(), 0.0f);
    if (squares && (!p.d || squares->keeps())) squares->goodness(n, x, g.data());
    const int64_t apart = members > 1 ? sample(first, 1) - first : 1;  // of neighbouring samples of the task
    if (grid && !p.cell_grads) grid->add_goodness(n, x, p.cell_means + first * p.cells, apart * p.cells, g.data());
    for (int64_t i = 0; !p.d && i < n; ++i) std::copy_n(g.data() + i * p.K, p.K, p.g + sample(first, i) * p.K);
    if (!p.loss && !p.d) return;
    if (p.d) std::copy_n(p.d + first * p.K, n * p.K, d.data());
    for (int64_t i = 0; p.loss && i < n; i += members) {
      p.losses[first + i] =
          static_cast<float>((*p.loss)(first + i, p.K, g.data() + i * p.K, d.data() + i * p.K, p.grad_tau + first + i));
    }
    for (int64_t i = 0; p.all_d && i < n; ++i) std::copy_n(d.data() + i * p.K, p.K, p.all_d + sample(first, i) * p.K);
    if (grid && grad_x) grid->input_gradient(first, n, d.data(), grad_x);
    if (squares) squares->gradients(n, x, d.data(), grad_x, p.cells > 0, sums);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t b = sample(first, i), at = b * size;
      if (normalize) {
        float* const to = p.normalized.at(at, size, result);
        (*normalize)(input + i * size, to);
        p.normalized.keep(at, size, to);
      }
      if (grad_copy.empty()) continue;
      float* const to = p.grad_x.at(at, size, result);
      if (transposed)
        gemm::transpose(p.P, p.C, grad_x + i * size, p.C, to, p.P);
      else
        std::copy_n(grad_x + i * size, size, to);
      if (p.epilogue) p.epilogue->backward(b, 1, to, sums.epilogue);
      p.grad_x.keep(at, size, to);
    }
    if (p.epilogue && grad_copy.empty()) p.epilogue->backward(first, n, grad_x, sums.epilogue);
  }

 private:
  const Problem& p;
  int64_t size, members;
  bool transposed;  // the squares and the grid work on copies with contiguous channels
  std::unique_ptr<Squares> squares;
  std::optional<Grid> grid;
  std::optional<Normalizer<float>> normalize;
  Buffer<float> g, d, x_copy, x_transposed, grad_copy, result;

  int64_t sample(int64_t first, int64_t i) const { return members > 1 ? p.loss->sample(first, i) : first + i; }

  // Calls f(first sample, number, index in the task) for the task's runs of neighbouring samples: all of them, or those of a pair one by one.
  template <typename F>
  void for_runs(int64_t first, int64_t n, const F& f) const {
    const int64_t length = members > 1 ? 1 : n;
    for (int64_t i = 0; i < n; i += length) f(sample(first, i), length, i);
  }

  const float* input_of(int64_t first, int64_t n) {
    if (!p.epilogue && members == 1) return p.x.at(first * size, n * size, x_copy);
    for_runs(first, n, [&](int64_t b, int64_t length, int64_t i) {
      if (p.epilogue)
        p.epilogue->forward(b, length, x_copy.data() + i * size);
      else
        std::copy_n(p.x.at(b * size, length * size, result), length * size, x_copy.data() + i * size);
    });
    return x_copy.data();
  }
};

// Terms of a sum over samples, or over tiles of one, that are added in floats.
constexpr int64_t kTerms = 32;

// A sweep with what a spatial term without a hidden layer needs. results: as of sweep; grad_grid_weight: null if not wanted.
void run(Problem& p, const Sums& results, float* grad_grid_weight) {
  STD_TORCH_CHECK(!p.M, "only step_native has a hidden layer");
  Buffer<float> cell_means(p.B * p.cells), all_d(grad_grid_weight ? p.B * p.K : 0);
  p.cell_means = cell_means.data(), p.all_d = grad_grid_weight ? all_d.data() : nullptr;
  sweep(p, results);
  if (grad_grid_weight) multiply_transposed(p.K, p.cells, p.B, all_d.data(), cell_means.data(), grad_grid_weight);
}

// Empty tensors for the gradients of the parameters that there are.
struct ParameterGradients {
  Tensor weight, bias, grid_weight;

  ParameterGradients(const Tensor& x, const spec::Projection& given)
      : weight(of(x, given.weight)), bias(of(x, given.bias)), grid_weight(of(x, given.grid_weight)) {}
  Sums sums(double* epilogue) const { return {nullptr, writable(weight), writable(bias), epilogue}; }

 private:
  static Tensor of(const Tensor& x, const MaybeTensor& t) {
    return t ? empty(x, {t->sizes().begin(), t->sizes().end()}) : absent(x);
  }
};

}  // namespace

void sweep(const Problem& p, const Sums& results) {
  // Samples of a task: several where one is too small to fill a register block, or where the grid's products want more rows than one.
  const int64_t members = p.loss ? p.loss->samples() : 1, units = p.B / members;
  const int64_t wanted = std::max<int64_t>(p.cells ? 6 : 1, p.second_moment ? 1 : direct_samples(p));
  const int64_t step = members > 1 ? 1 : std::min(p.B, wanted), tasks = (units + step - 1) / step;
  const int64_t weights = p.weight ? p.K * p.C : 0, size = weights + p.K, channels = p.epilogue ? 2 * p.C : 0;
  const int64_t groups = std::min(tasks, std::clamp<int64_t>((1 << 20) / (size + channels), 2, 16));
  std::vector<std::optional<vec::LineSum>> partial(groups);  // each is made by the thread that adds to it
  Buffer<double> epilogue_sums(groups * channels, 0.0);
  parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    Task task(p, step * members);
    for (int64_t group = begin; group < end; ++group) {
      vec::LineSum* const line = p.loss || p.d ? &partial[group].emplace(size, kTerms) : nullptr;
      float* const own = line ? line->data() : nullptr;
      const Sums sums{line, own, own + weights, epilogue_sums.data() + group * channels};
      for (int64_t i = group * tasks / groups; i < (group + 1) * tasks / groups; ++i)
        task.run(i * step, std::min(step, units - i * step) * members, sums);
      if (line) line->result();
    }
  });
  const auto collect = [&](float* target, int64_t offset, int64_t n) {
    if (!target) return;
    parallel_for(0, n, 1 << 15, [&](int64_t begin, int64_t end) {
      std::copy_n(partial[0]->data() + offset + begin, end - begin, target + begin);
      for (int64_t group = 1; group < groups; ++group)
        vec::add(target + begin, partial[group]->data() + offset + begin, end - begin);
    });
  };
  collect(results.weight, 0, weights);
  collect(results.bias, weights, p.K);
  for (size_t i = 0; results.epilogue && i < epilogue_sums.size(); ++i)
    results.epilogue[i % channels] += epilogue_sums[i];
}

Problem::Problem(const Tensor& x, const spec::Projection& given, bool second_moment)
    : B(x.size(0)), C(x.size(1)), H(x.size(2)), W(x.size(3)), P(H * W),
      K((given.weight ? *given.weight : *given.grid_weight).size(0)), KP((K + kPadding - 1) / kPadding * kPadding),
      GH(given.grid_weight ? given.grid_weight->size(2) : 0), GW(given.grid_weight ? given.grid_weight->size(3) : 0),
      cells(C * GH * GW), M(given.hidden_weight ? given.hidden_weight->size(0) : 0), channels_last(is_channels_last(x)),
      second_moment(second_moment), x(x), weight(floats(given.weight)), bias(floats(given.bias)),
      grid_weight(floats(given.grid_weight)) {
  STD_TORCH_CHECK(!weight || given.weight->numel() == K * C, "the compiled library takes 1 x 1 heads only");
  STD_TORCH_CHECK(!M || (given.hidden_weight->numel() == M * C && cells && given.grid_weight->size(1) == M),
                  "hidden_weight must be [M, C], and grid_weight [K, M, GH, GW]");
}

void Problem::lay_out_weights(bool with_gradient) {
  if (weight && !second_moment) weight_t = gemm::Panels(C, K, weight, 1, C, KP);
  if (weight && !second_moment && with_gradient) weight_panels = gemm::Panels(K, C, weight, C, 1, C);
  if (cells && !M) grid_t = gemm::Panels(cells, K, grid_weight, 1, cells, KP);
}

namespace {

void step(const StepCall& call) {
  const Tensor& x = call.given.x;
  spec::StepResult& result = call.result;
  Problem p(x, call.given.projection, call.given.second_moment);
  const ParameterGradients gradients(result.goodness, call.given.projection);
  result.grad_weight = gradients.weight, result.grad_bias = gradients.bias,
  result.grad_grid_weight = gradients.grid_weight;
  p.epilogue = call.epilogue, p.loss = &call.loss, p.grad_tau = call.grad_tau;
  p.losses = writable(result.loss), p.g = writable(result.goodness);
  p.grad_x = result.grad_x, p.normalized = result.normalized;
  if (p.normalized) p.normalization = &call.given.normalization;
  p.lay_out_weights(static_cast<bool>(p.grad_x));
  const Sums sums = gradients.sums(call.epilogue_sums);
  p.M ? step_with_hidden_layer(p, call.given.projection, sums, result) : run(p, sums, writable(gradients.grid_weight));
}

struct Forward : spec::Part {
  using Part::Part;
  Tensor x = input("x");
  spec::Projection projection{in, "projection_"};
  bool second_moment = flag("second_moment");
};

struct Backward : Forward {
  using Forward::Forward;
  MaybeTensor d = tensor("d");
  bool need_grad_x = flag("need_grad_x");
};

std::vector<Tensor> forward(const Forward& given) {
  Problem p(given.x, given.projection, given.second_moment);
  const Tensor g = empty(given.x, {p.B, p.K}, aoti_torch_dtype_float32());
  p.g = writable(g);
  p.lay_out_weights(false);
  run(p, {}, nullptr);
  return {g};
}

std::vector<Tensor> backward(const Backward& given) {
  Problem p(given.x, given.projection, given.second_moment);
  const Tensor grad_x = given.need_grad_x ? empty_like(given.x, p.channels_last) : absent(given.x);
  const ParameterGradients gradients(*given.d, given.projection);
  p.d = floats(given.d), p.grad_x = grad_x;
  p.lay_out_weights(static_cast<bool>(p.grad_x));
  run(p, gradients.sums(nullptr), writable(gradients.grid_weight));
  return {grad_x, gradients.weight, gradients.bias, gradients.grid_weight};
}

}  // namespace
}  // namespace goodness

void projection_step(const StepCall& call) { goodness::step(call); }

STABLE_TORCH_LIBRARY_FRAGMENT(fastff, m) {
  m.def(spec::schema<goodness::Forward>("goodness_forward_native", "Tensor").c_str());
  m.def(
      spec::schema<goodness::Backward>("goodness_backward_native",
                                       "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_grid_weight)")
          .c_str());
}
STABLE_TORCH_LIBRARY_IMPL(fastff, CPU, m) {
  m.impl("goodness_forward_native", &spec::boxed<goodness::Forward, goodness::forward>);
  m.impl("goodness_backward_native", &spec::boxed<goodness::Backward, goodness::backward>);
}
