// Small matrix products on strided operands that lie in the cache, for the operators that own whole samples.
//
//   multiply   c[m, n] = or += sum_k a[m, k] b[k, n]      a at any strides, b and c with rows of contiguous elements
//   dots       c[m, n] = or += sum_k a[m, k] b[n, k]      a and b with contiguous k
//
// Register blocks of 6 x 16 and 3 x 4 x 8 (AVX2 has 16 registers of 8 floats). Nothing is packed: an operand here is at most a
// sample, which the L2 cache holds. The order of the sums depends on the shape alone. With `upper`, blocks below the diagonal are left out.
#pragma once

#include <algorithm>

#include "common.h"

namespace gemm {

typedef float Vector __attribute__((vector_size(32)));
typedef float Unaligned __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int64_t kLanes = 8;

FASTFF_INLINE Vector read(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
FASTFF_INLINE void write(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }

// lanes: those of the last vector that are written, counted from its end.
template <int M, int N>
FASTFF_INLINE void multiply_block(int64_t depth, const float* a, int64_t row, int64_t column, const float* b, int64_t ldb, float* c,
                                  int64_t ldc, bool add, int64_t lanes) {
  Vector sum[M][N] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[N];
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) right[j] = read(b + k * ldb + j * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
      const float left = a[i * row + k * column];
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) {
      float* target = c + i * ldc + j * kLanes;
      if (lanes == kLanes) {
        write(target, add ? read(target) + sum[i][j] : sum[i][j]);
      } else {
        for (int64_t l = kLanes - lanes; l < kLanes; ++l) target[l] = add ? target[l] + sum[i][j][l] : sum[i][j][l];
      }
    }
  }
}

template <int N>
FASTFF_INLINE void multiply_rows(int64_t rows, int64_t depth, const float* a, int64_t row, int64_t column, const float* b, int64_t ldb,
                                 float* c, int64_t ldc, bool add, int64_t lanes) {
  int64_t m = 0;
  for (; m + 6 <= rows; m += 6) multiply_block<6, N>(depth, a + m * row, row, column, b, ldb, c + m * ldc, ldc, add, lanes);
  a += m * row;
  c += m * ldc;
  switch (rows - m) {
    case 5: multiply_block<5, N>(depth, a, row, column, b, ldb, c, ldc, add, lanes); break;
    case 4: multiply_block<4, N>(depth, a, row, column, b, ldb, c, ldc, add, lanes); break;
    case 3: multiply_block<3, N>(depth, a, row, column, b, ldb, c, ldc, add, lanes); break;
    case 2: multiply_block<2, N>(depth, a, row, column, b, ldb, c, ldc, add, lanes); break;
    case 1: multiply_block<1, N>(depth, a, row, column, b, ldb, c, ldc, add, lanes); break;
    default: break;
  }
}

FASTFF_INLINE void multiply_inline(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t row, int64_t column, const float* b,
                                   int64_t ldb, float* c, int64_t ldc, bool add, bool upper) {
  if (columns < kLanes) {  // no vector fits
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t n = 0; n < columns; ++n) {
        float sum = 0;
        for (int64_t k = 0; k < depth; ++k) sum += a[m * row + k * column] * b[k * ldb + n];
        c[m * ldc + n] = add ? c[m * ldc + n] + sum : sum;
      }
    }
    return;
  }
  int64_t n = 0;
  for (; n + 2 * kLanes <= columns; n += 2 * kLanes) {
    const int64_t reach = upper ? std::min(rows, n + 2 * kLanes) : rows;
    multiply_rows<2>(reach, depth, a, row, column, b + n, ldb, c + n, ldc, add, kLanes);
  }
  for (; n < columns; n += kLanes) {  // the last vector ends at the last column, and writes what is left
    const int64_t lanes = std::min(kLanes, columns - n), start = n + lanes - kLanes;
    const int64_t reach = upper ? std::min(rows, n + lanes) : rows;
    multiply_rows<1>(reach, depth, a, row, column, b + start, ldb, c + start, ldc, add, lanes);
  }
}

FASTFF_INLINE float sum_of(Vector v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

template <int M, int N>
FASTFF_INLINE void dots_block(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  Vector sum[M][N] = {};
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Vector right[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) right[j] = read(b + j * ldb + k);
#pragma GCC unroll 3
    for (int i = 0; i < M; ++i) {
      const Vector left = read(a + i * lda + k);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum[i][j] += left * right[j];
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) {
      float total = sum_of(sum[i][j]);
      for (int64_t l = k; l < depth; ++l) total += a[i * lda + l] * b[j * ldb + l];
      c[i * ldc + j] = add ? c[i * ldc + j] + total : total;
    }
  }
}

FASTFF_INLINE void dots_inline(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                               int64_t ldc, bool add, bool upper) {
  for (int64_t n = 0; n < columns; n += 4) {
    const int64_t width = std::min<int64_t>(4, columns - n);
    const int64_t reach = upper ? std::min(rows, n + width) : rows;
    int64_t m = 0;
    if (width == 4) {
      for (; m + 3 <= reach; m += 3) dots_block<3, 4>(depth, a + m * lda, lda, b + n * ldb, ldb, c + m * ldc + n, ldc, add);
      for (; m < reach; ++m) dots_block<1, 4>(depth, a + m * lda, lda, b + n * ldb, ldb, c + m * ldc + n, ldc, add);
    } else {
      for (; m < reach; ++m) {
        for (int64_t j = 0; j < width; ++j) {
          dots_block<1, 1>(depth, a + m * lda, lda, b + (n + j) * ldb, ldb, c + m * ldc + n + j, ldc, add);
        }
      }
    }
  }
}

}  // namespace gemm
