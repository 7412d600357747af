// Goodness without weights, its loss, local gradient and the normalized output in one pass over whole samples on the CPU.
//
// x [B, C, H, W] -> g[b, j] = sum or mean over group j of x^power: groups of neighbouring channels with all their positions, or single positions
// with all channels. Formulas: fastff/reference.py.
//
// A task takes one sample (a pair of them for the losses of differences) from goodness to gradient and next input while it is in its cache, with an
// epilogue from y on: that reads y three times and the residual twice, writes dL/dy twice and the next input. A sample belongs to one thread, and the
// epilogue's sums are kept for 16 shares of the batch, so the number of threads changes no bit.

#include <algorithm>
#include <type_traits>

#include "normalization.h"
#include "step.h"

namespace group_goodness {
namespace {

Partition partition(const Tensor& x, const spec::Groups& groups) {
  const int64_t C = x.size(1), P = x.size(2) * x.size(3);
  return groups.positions ? Partition::of_positions(C, P) : Partition::of_channels(C, P, groups.count);
}

// Goodness of one sample, and its gradient.
template <typename T>
class Goodness {
 public:
  Goodness(const Tensor& x, const spec::Groups& given)
      : given(given), groups(partition(x, given)), sample(x.size(1), x.size(2) * x.size(3), is_channels_last(x)) {}

  int64_t count() const { return groups.count(); }

  void forward(const T* x, double* g) {
    const Buffer<double> sums = given.power == 2 ? sample.sums(x, groups, [](A v, int64_t) { return v * v; })
                                                 : sample.sums(x, groups, [](A v, int64_t) { return v; });
    for (int64_t j = 0; j < count(); ++j) g[j] = sums[j] / (given.mean ? groups.elements(j) : 1);
  }

  // dL/dx from d = dL/dg.
  void backward(const T* x, const double* d, T* grad_x) {
    Buffer<double> values(count());
    for (int64_t j = 0; j < count(); ++j) values[j] = d[j] * given.power / (given.mean ? groups.elements(j) : 1);
    sample.spread(groups, values, factors);
    const A* factor = factors.data();
    if (given.power == 2)
      sample.transform(x, grad_x, groups, [=](A v, int64_t i) { return factor[i] * v; });
    else
      sample.transform(x, grad_x, groups, [=](A, int64_t i) { return factor[i]; });
  }

 private:
  using A = typename Sample<T>::A;
  const spec::Groups& given;
  Partition groups;
  Sample<T> sample;
  Buffer<A> factors;
};

int32_t accumulation_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// A thread is worth waking for about 32K elements.
int64_t grain(const Tensor& x) { return std::max<int64_t>(1, 32768 * x.size(0) / x.numel()); }

// Calls f(sample, its Goodness) for all samples of x, several threads at a time.
template <typename T, typename F>
void for_samples(const Tensor& x, const spec::Groups& groups, const F& f) {
  parallel_for(0, x.size(0), grain(x), [&](int64_t begin, int64_t end) {
    Goodness<T> goodness(x, groups);
    for (int64_t b = begin; b < end; ++b) f(b, goodness);
  });
}

// A step on the samples of one thread's share.
template <typename T>
class Task {
 public:
  explicit Task(const StepCall& call)
      : call(call), size(call.given.x.numel() / call.given.x.size(0)),
        x(static_cast<const T*>(call.given.x.const_data_ptr())), grad_x(call.result.grad_x),
        normalized(call.result.normalized), g_out(writable<A>(call.result.goodness)),
        loss_out(writable<A>(call.result.loss)), goodness(call.given.x, call.given.groups),
        normalize(call.given.normalization, call.given.x.size(1), call.given.x.size(2) * call.given.x.size(3),
                  is_channels_last(call.given.x)),
        g(call.loss.samples() * goodness.count()), d(g.size()), made(call.epilogue ? call.loss.samples() * size : 0) {}

  void run(int64_t unit, double* epilogue_sums) {
    const int64_t J = goodness.count(), members = call.loss.samples();
    const T* input[2];
    for (int64_t m = 0; m < members; ++m) {
      const int64_t b = call.loss.sample(unit, m);
      input[m] = call.epilogue ? made.data() + m * size : x + b * size;
      if constexpr (std::is_same_v<T, float>) {
        if (call.epilogue) call.epilogue->forward(b, 1, made.data() + m * size);
      }
      goodness.forward(input[m], g.data() + m * J);
      std::copy_n(g.data() + m * J, J, g_out + b * J);
    }
    loss_out[unit] = static_cast<A>(call.loss(unit, J, g.data(), d.data(), call.grad_tau + unit));
    for (int64_t m = 0; m < members; ++m) {
      const int64_t b = call.loss.sample(unit, m);
      if (grad_x) {
        T* const to = grad_x.at(b * size, size, result);
        goodness.backward(input[m], d.data() + m * J, to);
        if constexpr (std::is_same_v<T, float>) {
          if (call.epilogue) call.epilogue->backward(b, 1, to, epilogue_sums);
        }
        grad_x.keep(b * size, size, to);
      }
      if (normalized) {
        T* const to = normalized.at(b * size, size, result);
        normalize(input[m], to);
        normalized.keep(b * size, size, to);
      }
    }
  }

 private:
  using A = typename Sample<T>::A;
  const StepCall& call;
  int64_t size;
  const T* x;
  Results<T> grad_x, normalized;
  A *g_out, *loss_out;
  Goodness<T> goodness;
  Normalizer<T> normalize;
  Buffer<double> g, d;
  Buffer<T> made, result;  // the epilogue's output; what is to be rounded
};

template <typename T>
void step(const StepCall& call) {
  const int64_t C = call.given.x.size(1), units = call.loss.count(),
                shares = call.epilogue ? std::min<int64_t>(units, 16) : units;
  Buffer<double> sums(call.epilogue ? shares * 2 * C : 0);
  parallel_for(0, shares, call.epilogue ? 1 : grain(call.given.x), [&](int64_t begin, int64_t end) {
    Task<T> task(call);
    for (int64_t share = begin; share < end; ++share)
      for (int64_t unit = share * units / shares; unit < (share + 1) * units / shares; ++unit)
        task.run(unit, sums.data() + share * 2 * C);
  });
  for (size_t i = 0; i < sums.size(); ++i) call.epilogue_sums[i % (2 * C)] += sums[i];
}

struct Forward : spec::Part {
  using Part::Part;
  Tensor x = input("x");
  spec::Groups groups{in, "groups_"};
};

struct Backward : Forward {
  using Forward::Forward;
  MaybeTensor d = tensor("d");
};

std::vector<Tensor> forward(const Forward& given) {
  const Tensor& x = given.x;
  const Tensor g = empty(x, {x.size(0), count_of_groups(x, given.groups)}, accumulation_dtype(x));
  with_type("group_goodness_forward_native", x, [&]<typename T>(T*) {
    const int64_t J = g.size(1), size = x.numel() / x.size(0);
    for_samples<T>(x, given.groups, [&](int64_t b, Goodness<T>& goodness) {
      Buffer<double> row(J);
      goodness.forward(static_cast<const T*>(x.const_data_ptr()) + b * size, row.data());
      std::copy_n(row.data(), J, writable<typename Sample<T>::A>(g) + b * J);
    });
  });
  return {g};
}

std::vector<Tensor> backward(const Backward& given) {
  const Tensor &x = given.x, grad_x = empty_like(x, is_channels_last(x));
  with_type("group_goodness_backward_native", x, [&]<typename T>(T*) {
    using A = typename Sample<T>::A;
    const int64_t J = count_of_groups(x, given.groups), size = x.numel() / x.size(0);
    const A* d = static_cast<const A*>(given.d->const_data_ptr());
    for_samples<T>(x, given.groups, [&](int64_t b, Goodness<T>& goodness) {
      const Buffer<double> row(d + b * J, d + (b + 1) * J);
      goodness.backward(static_cast<const T*>(x.const_data_ptr()) + b * size, row.data(),
                        writable<T>(grad_x) + b * size);
    });
  });
  return {grad_x};
}

}  // namespace
}  // namespace group_goodness

int64_t count_of_groups(const Tensor& x, const spec::Groups& groups) {
  return groups.positions ? x.size(2) * x.size(3) : groups.count;
}

void groups_step(const StepCall& call) {
  if (call.epilogue) return group_goodness::step<float>(call);
  with_type("step_native", call.given.x, [&]<typename T>(T*) { group_goodness::step<T>(call); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastff, m) {
  m.def(spec::schema<group_goodness::Forward>("group_goodness_forward_native", "Tensor").c_str());
  m.def(spec::schema<group_goodness::Backward>("group_goodness_backward_native", "Tensor").c_str());
}
STABLE_TORCH_LIBRARY_IMPL(fastff, CPU, m) {
  m.impl("group_goodness_forward_native", &spec::boxed<group_goodness::Forward, group_goodness::forward>);
  m.impl("group_goodness_backward_native", &spec::boxed<group_goodness::Backward, group_goodness::backward>);
}
