// Small matrix products on operands in the cache, for the operators that own whole samples. M, N, K, lda, ldb, ldc as in BLAS, row-major.
//
//   multiply   c[m, n] = or += sum_k a[m, k] b[k, n]      a with any row_stride and col_stride; b likewise row-major, or in Panels
//   dots       c[m, n] = or += sum_k a[m, k] b[n, k]      contiguous k on both sides
//   transpose  b[n, m] = a[m, n]
//
// The order of the sums depends on the shape alone, and their error not on K: long ones are added in doubles. With `upper`, blocks below the diagonal are left out.
#pragma once

#include "common.h"
#include "vec.h"

namespace gemm {

void multiply(int64_t M, int64_t N, int64_t K, const float* a, int64_t row_stride, int64_t col_stride, const float* b,
              int64_t ldb, float* c, int64_t ldc, bool add = false, bool upper = false);

void dots(int64_t M, int64_t N, int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
          int64_t ldc, bool upper = false);

void transpose(int64_t M, int64_t N, const float* a, int64_t lda, float* b, int64_t ldb);

// A matrix b [K, N] that many products share, laid out once: two vectors of columns of all k behind each other, instead of one row in each page.
// b[k, n] = source[k * row_stride + n * col_stride], where one of the strides is 1. With padded_N > N zeros follow: products that may write whole
// vectors do not pick single lanes out of registers (a third of the time at 10 classes).
struct Panels {
  static constexpr int64_t kWidth = 2 * vec::kLanes;
  int64_t K = 0, N = 0;
  const float* data = nullptr;  // b[k, n] at (n / kWidth * K + k) * kWidth + n % kWidth
  Buffer<float> memory;

  Panels() = default;
  Panels(int64_t K, int64_t N, const float* data) : K(K), N(N), data(data) {}  // laid out by someone else
  Panels(int64_t K, int64_t N, const float* source, int64_t row_stride, int64_t col_stride, int64_t padded_N);
  Panels(const Panels&) = delete;
  Panels& operator=(Panels&&) = default;
};

void multiply(int64_t M, const float* a, int64_t row_stride, int64_t col_stride, const Panels& b, float* c, int64_t ldc,
              bool add = false);

}  // namespace gemm
