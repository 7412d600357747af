// fastff::muon_native: a step of Muon for the weights of convolutions, float32 on the CPU. Formulas: fastff/kernels/torch/muon.py.
//
//   momentum += (1 - beta) (grad - momentum), u = grad + beta (momentum - grad)    reads both, writes the momentum
//   A = u u^T (of the smaller side), T = the iteration's polynomial in A           in the cache
//   weight = decay weight - rate T u                                               reads and writes the weight
//
// A task is a part of a weight: some of its rows, of which there are at most `rows`. Its u stays in the cache.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "gemm.h"
#include "tensors.h"

namespace {

constexpr int kSteps = 5;
constexpr float kA = 3.4445f, kB = -4.7750f, kC = 2.0315f;
constexpr int64_t kGroups = 16;  // of parts, as even as can be, whatever the number of threads

struct Part {
  float* weight;
  const float* grad;
  float* momentum;
  int64_t rows, columns;

  int64_t size() const { return rows * columns; }
};

void check_alike(const Tensor& weight, const Tensor& other) {
  bool alike = weight.dim() == other.dim();
  for (int64_t d = 0; alike && d < weight.dim(); ++d)
    alike = weight.size(d) == other.size(d) && weight.stride(d) == other.stride(d);
  STD_TORCH_CHECK(alike, "muon_native: gradients and momenta must have the shapes and strides of their weights");
}

// All parts, the largest first.
std::vector<Part> parts_of(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                           const std::vector<Tensor>& momenta, int64_t most) {
  std::vector<Part> parts;
  for (size_t i = 0; i < weights.size(); ++i) {
    check_alike(weights[i], grads.at(i)), check_alike(weights[i], momenta.at(i));
    const int64_t rows = weights[i].size(0), columns = weights[i].numel() / std::max<int64_t>(1, rows);
    const int64_t count = (rows + most - 1) / most;
    for (int64_t part = 0, row = 0; part < count; ++part) {
      const int64_t some = rows / count + (part < rows % count), at = row * columns;
      parts.push_back({writable(weights[i]) + at, floats(grads[i]) + at, writable(momenta[i]) + at, some, columns});
      row += some;
    }
  }
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.size() > b.size(); });
  return parts;
}

// What lies below the diagonal of a symmetric matrix [n, n], from what lies above.
void mirror(int64_t n, float* matrix) {
  for (int64_t i = 1; i < n; ++i)
    for (int64_t j = 0; j < i; ++j) matrix[i * n + j] = matrix[j * n + i];
}

// to = a x + b y z for symmetric matrices [n, n] of which y and z commute.
void multiply_add(int64_t n, float a, const float* x, float b, const float* y, const float* z, float* to) {
  gemm::multiply(n, n, n, y, n, 1, z, n, to, n, false, true);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = i; j < n; ++j) to[i * n + j] = a * x[i * n + j] + b * to[i * n + j];
  mirror(n, to);
}

// The matrix `gram` [n, n] becomes scale T. `scratch` has room for four of its size.
void orthogonalizer(int64_t n, float* gram, float* scratch, float scale) {
  const int64_t size = n * n;
  float *factor = scratch, *product = scratch + size, *next = scratch + 2 * size, *a = scratch + 3 * size;
  float trace = 1e-14f;
  for (int64_t i = 0; i < n; ++i) trace += gram[i * n + i];
  for (int64_t i = 0; i < size; ++i) a[i] = gram[i] / trace;
  for (int step = 0; step < kSteps; ++step) {
    multiply_add(n, kB, a, kC, a, a, factor);  // without a on its diagonal
    if (step == 0) {
      std::copy_n(factor, size, product);
      for (int64_t i = 0; i < n; ++i) product[i * n + i] += kA;
    } else {
      multiply_add(n, kA, product, 1, factor, product, next);
      std::swap(product, next);
    }
    if (step + 1 == kSteps) break;
    multiply_add(n, kA, a, 1, factor, a, next);
    multiply_add(n, kA, next, 1, next, factor, a);
  }
  const float last = scale / std::sqrt(trace);
  for (int64_t i = 0; i < size; ++i) gram[i] = last * product[i];
}

void update(const Part& part, float beta, float decay, float rate, Buffer<float>& u, Buffer<float>& square) {
  const int64_t M = part.rows, N = part.columns, size = part.size(), n = std::min(M, N);
  float *const to = u.data(), *const gram = square.data(), *const momentum = part.momentum;
  for (int64_t i = 0; i < size; ++i) {
    const float grad = part.grad[i], average = momentum[i] + (1 - beta) * (grad - momentum[i]);
    momentum[i] = average;
    to[i] = grad + beta * (average - grad);
  }
  if (M <= N)
    gemm::dots(M, M, N, to, N, to, N, gram, M, true);
  else
    gemm::multiply(N, N, M, to, 1, N, to, N, gram, N, false, true);
  mirror(n, gram);
  orthogonalizer(n, gram, gram + n * n, -rate * std::sqrt(static_cast<float>(std::max(M, N))));
  for (int64_t i = 0; i < size; ++i) part.weight[i] *= decay;
  if (M <= N)
    gemm::multiply(M, N, M, gram, M, 1, to, N, part.weight, N, true);
  else
    gemm::multiply(M, N, N, to, N, 1, gram, N, part.weight, N, true);
}

// All three of one dtype, shape and layout, in which rows of the matrix [D, N] lie behind each other.
void muon_native(std::vector<Tensor> weights, std::vector<Tensor> grads, std::vector<Tensor> momenta, int64_t rows,
                 double beta, double decay, double rate) {
  const std::vector<Part> parts = parts_of(weights, grads, momenta, rows);
  if (parts.empty()) return;
  int64_t side = 0;
  for (const Part& part : parts) side = std::max(side, std::min(part.rows, part.columns));
  const int64_t count = parts.size(), groups = std::min(kGroups, count);
  parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> u(parts[begin].size()), square(5 * side * side);
    for (int64_t group = begin; group < end; ++group)
      for (int64_t i = group; i < count; i += groups)
        update(parts[i], static_cast<float>(beta), static_cast<float>(decay), static_cast<float>(rate), u, square);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastff, m) {
  m.def(
      "muon_native(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, int rows, float momentum, float decay, "
      "float rate) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastff, CPU, m) { m.impl("muon_native", TORCH_BOX(&muon_native)); }
