// The spatial term with a hidden layer: g[b, k] += sum_cell V[k, cell] . a[b, cell], a = relu(batch_norm(U mean_cell(x_b))).
//
// Batch norm needs the cells of all samples, and so does its backward pass. So x is swept twice: once for the squares and the cells, then, after the
// layer, the loss and the layer's backward pass on [B, GH GW, channels], once more for the gradients and the next input.

#include <algorithm>
#include <utility>

#include "goodness.h"

namespace goodness {
namespace {

// Calls f(first, number) for parts of n rows.
template <typename F>
void by_rows(int64_t n, const F& f) {
  parallel_for(0, n, 64, [&](int64_t begin, int64_t end) { f(begin, end - begin); });
}

// The losses of the batch, and d = dL/dg [B, K].
void losses_of(const Problem& p, const Loss& loss, float* d) {
  const int64_t members = loss.samples(), K = p.K;
  by_rows(loss.count(), [&](int64_t first, int64_t n) {
    Buffer<float> g(members * K), own(members * K);
    for (int64_t unit = first; unit < first + n; ++unit) {
      for (int64_t i = 0; i < members; ++i) std::copy_n(p.g + loss.sample(unit, i) * K, K, g.data() + i * K);
      p.losses[unit] = static_cast<float>(loss(unit, K, g.data(), own.data(), p.grad_tau + unit));
      for (int64_t i = 0; i < members; ++i) std::copy_n(own.data() + i * K, K, d + loss.sample(unit, i) * K);
    }
  });
}

}  // namespace

void step_with_hidden_layer(Problem& p, const spec::Projection& given, const Sums& results, spec::StepResult& r) {
  const int64_t K = p.K, C = p.C, M = p.M, G = p.GH * p.GW, rows = p.B * G, size = G * M;
  for (Tensor* t : {&r.grad_hidden_bn_weight, &r.grad_hidden_bn_bias, &r.hidden_mean, &r.hidden_var})
    *t = empty(r.goodness, {M});
  r.grad_hidden_weight = empty(r.goodness, {M, C});
  float *const mean = writable(r.hidden_mean), *const var = writable(r.hidden_var);
  const float *const U = floats(given.hidden_weight), *const known = floats(given.hidden_mean);
  if (known) std::copy_n(known, M, mean), std::copy_n(floats(given.hidden_var), M, var);

  const Loss& loss = *std::exchange(p.loss, nullptr);
  const Results<> grad_x = std::exchange(p.grad_x, {});
  Buffer<float> means(rows * C), z(rows * M), a(rows * M), d(p.B * K), V(K * size), grad_V(K * size);
  p.cell_means = means.data();
  sweep(p, {});

  const gemm::Panels U_t(C, M, U, 1, C, M);
  by_rows(rows, [&](int64_t i, int64_t n) { gemm::multiply(n, &means[i * C], C, 1, U_t, &z[i * M], M); });
  const Epilogue norm(z.data(), nullptr, floats(given.hidden_bn_weight), floats(given.hidden_bn_bias),
                      static_cast<float>(given.hidden_eps), {p.B, M, G, true}, Activation::relu, mean, var, known);
  norm.forward(0, p.B, a.data());
  for (int64_t k = 0; k < K; ++k) gemm::transpose(M, G, p.grid_weight + k * size, G, &V[k * size], M);  // [K, G, M]
  const gemm::Panels V_t(size, K, V.data(), 1, size, K);
  by_rows(p.B, [&](int64_t i, int64_t n) { gemm::multiply(n, &a[i * size], size, 1, V_t, p.g + i * K, K, true); });
  losses_of(p, loss, d.data());

  multiply_transposed(K, size, p.B, d.data(), a.data(), grad_V.data());
  for (int64_t k = 0; k < K; ++k)
    gemm::transpose(G, M, &grad_V[k * size], M, writable(r.grad_grid_weight) + k * size, G);
  float* const grad = a.data();  // dL/da, dL/dh and dL/dz one after the other
  by_rows(p.B, [&](int64_t i, int64_t n) {
    gemm::multiply(n, size, K, &d[i * K], K, 1, V.data(), size, grad + i * size, size);
  });
  Buffer<double> sums(2 * M);
  norm.backward(0, p.B, grad, sums.data());
  norm.parameter_gradients(sums.data(), writable(r.grad_hidden_bn_weight), writable(r.grad_hidden_bn_bias));
  if (known) std::fill(sums.begin(), sums.end(), 0.0);  // statistics that do not depend on x
  norm.finish(grad, sums.data(), grad);
  multiply_transposed(M, C, rows, grad, means.data(), writable(r.grad_hidden_weight));
  by_rows(rows, [&](int64_t i, int64_t n) { gemm::multiply(n, C, M, grad + i * M, M, 1, U, C, &means[i * C], C); });

  p.d = d.data(), p.cell_grads = means.data(), p.grad_x = grad_x;
  sweep(p, results);
}

}  // namespace goodness
