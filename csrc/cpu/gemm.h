// Small matrix products on operands that lie in the cache, for the operators that own whole samples.
//
//   multiply   c[m, n] = or += sum_k a[m, k] b[k, n]      a at any strides, c with rows of contiguous elements; b likewise, or in Panels
//   dots       c[m, n] = or += sum_k a[m, k] b[n, k]      a and b with contiguous k
//   transpose  b[n, m] = a[m, n]
//
// Register blocks of 6 x 2 x 8 and 3 x 4 x 8 with AVX2's 16 registers of 8 floats, 12 x 2 x 16 and 6 x 4 x 16 with AVX-512's 32 of 16; 256 of k at a
// time, so that the columns of b stay in the L1 cache. A weight that every sample meets is laid out in Panels once: two vectors of columns of all
// k behind each other, instead of one row in each page. The order of the sums depends on the shape alone. With `upper`, blocks below the
// diagonal are left out.
#pragma once

#include <algorithm>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "common.h"

namespace gemm {

// Vectors of 8 floats whatever the instruction set.
namespace eight {

typedef float Vector __attribute__((vector_size(32)));
typedef float Unaligned __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int64_t kLanes = 8;

FASTFF_INLINE Vector read(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
FASTFF_INLINE void write(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }

}  // namespace eight

// Of the last vector, lanes from .. to - 1 are written.
struct Lanes {
  int64_t from, to;
};

#ifdef __AVX512F__

typedef float Vector __attribute__((vector_size(64)));
typedef float Unaligned __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int64_t kLanes = 16;
constexpr int kRows = 12, kDotRows = 6;
constexpr int kNear = 3;       // rows of a found from one pointer: 12 pointers do not fit the registers, and 14 of 57 instructions of the loop read them back
constexpr bool kMasks = true;  // vectors may reach past the last column: the lanes there are neither read nor written

FASTFF_INLINE Vector read(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
FASTFF_INLINE void write(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }

// Lanes 0 .. lanes.to - 1, zeros behind them.
FASTFF_INLINE __mmask16 mask_of(Lanes lanes) { return static_cast<__mmask16>((1u << lanes.to) - 1); }
FASTFF_INLINE Vector read_some(const float* p, Lanes lanes) { return (Vector)_mm512_maskz_loadu_ps(mask_of(lanes), p); }
FASTFF_INLINE void write_some(float* p, Vector v, bool add, Lanes lanes) {
  _mm512_mask_storeu_ps(p, mask_of(lanes), (__m512)(add ? read_some(p, lanes) + v : v));
}

#else

using eight::kLanes;
using eight::read;
using eight::Vector;
using eight::write;
constexpr int kRows = 6, kDotRows = 3, kNear = 6;
constexpr bool kMasks = false;

FASTFF_INLINE Vector read_some(const float* p, Lanes) { return read(p); }
FASTFF_INLINE void write_some(float* p, Vector v, bool add, Lanes lanes) {
  float some[kLanes];
  write(some, v);
  for (int64_t l = lanes.from; l < lanes.to; ++l) p[l] = add ? p[l] + some[l] : some[l];
}

#endif

// Every loop over `sum` is unrolled and no lane of it is picked by a variable, or GCC keeps it in memory (42 % of the time at 10 classes).
template <int M, int N>
FASTFF_INLINE void multiply_block(int64_t depth, const float* a, int64_t row, int64_t column, const float* b, int64_t ldb, float* c,
                                  int64_t ldc, bool add, Lanes lanes) {
  Vector sum[M][N] = {};
  const float* lefts[(M + kNear - 1) / kNear];
#pragma GCC unroll 4
  for (int i = 0; i < M; i += kNear) lefts[i / kNear] = a + i * row;
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[N];
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) right[j] = j + 1 < N ? read(b + k * ldb + j * kLanes) : read_some(b + k * ldb + j * kLanes, lanes);
#pragma GCC unroll 12
    for (int i = 0; i < M; ++i) {
      const float left = lefts[i / kNear][i % kNear * row + k * column];
#pragma GCC unroll 2
      for (int j = 0; j < N; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < N; ++j) {
      float* target = c + i * ldc + j * kLanes;
      if (j + 1 < N || lanes.to - lanes.from == kLanes) {
        write(target, add ? read(target) + sum[i][j] : sum[i][j]);
      } else {
        write_some(target, sum[i][j], add, lanes);
      }
    }
  }
}

// multiply_block<rows, N> for 0 <= rows <= M.
template <int M, int N>
FASTFF_INLINE void multiply_some(int64_t rows, int64_t depth, const float* a, int64_t row, int64_t column, const float* b, int64_t ldb,
                                 float* c, int64_t ldc, bool add, Lanes lanes) {
  if constexpr (M > 0) {
    if (rows == M) return multiply_block<M, N>(depth, a, row, column, b, ldb, c, ldc, add, lanes);
    multiply_some<M - 1, N>(rows, depth, a, row, column, b, ldb, c, ldc, add, lanes);
  }
}

template <int N>
FASTFF_INLINE void multiply_rows(int64_t rows, int64_t depth, const float* a, int64_t row, int64_t column, const float* b, int64_t ldb,
                                 float* c, int64_t ldc, bool add, Lanes lanes) {
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows) multiply_block<kRows, N>(depth, a + m * row, row, column, b, ldb, c + m * ldc, ldc, add, lanes);
  multiply_some<kRows - 1, N>(rows - m, depth, a + m * row, row, column, b, ldb, c + m * ldc, ldc, add, lanes);
}

constexpr int64_t kDepth = 256, kPanel = 2 * kLanes, kPacked = 32, kWhole = 16;  // kWhole: a vector of AVX-512, a panel of AVX2

// M rows of a transposed a (its k lie `column` > kPacked apart), copied together once and taken past all columns: read in place, every step of k
// would be in another page (dL/dW of 1,000 classes and 512 channels took 3 times as long).
template <int M>
FASTFF_INLINE void multiply_turned(int64_t columns, int64_t depth, const float* a, int64_t column, const float* b, int64_t ldb, float* c,
                                   int64_t ldc, bool add, int64_t from) {
  float together[kDepth * M];
  for (int64_t k = 0; k < depth; ++k) {
    for (int i = 0; i < M; ++i) together[k * M + i] = a[k * column + i];
  }
  int64_t n = from;
  if constexpr (kMasks) {
    for (; n < columns; n += kPanel) {
      const int64_t width = std::min(kPanel, columns - n);
      if (width > kLanes) {
        multiply_block<M, 2>(depth, together, 1, M, b + n, ldb, c + n, ldc, add, {0, width - kLanes});
      } else {
        multiply_block<M, 1>(depth, together, 1, M, b + n, ldb, c + n, ldc, add, {0, width});
      }
    }
    return;
  }
  for (; n + kPanel <= columns; n += kPanel) multiply_block<M, 2>(depth, together, 1, M, b + n, ldb, c + n, ldc, add, {0, kLanes});
  for (; n < columns; n += kLanes) {  // the last vector ends at the last column, and writes what is left
    const int64_t lanes = std::min(kLanes, columns - n), start = n + lanes - kLanes;
    multiply_block<M, 1>(depth, together, 1, M, b + start, ldb, c + start, ldc, add, {kLanes - lanes, kLanes});
  }
}

// multiply_turned<rows> for 0 <= rows <= M.
template <int M>
FASTFF_INLINE void multiply_some_turned(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t column, const float* b,
                                        int64_t ldb, float* c, int64_t ldc, bool add, int64_t from) {
  if constexpr (M > 0) {
    if (rows == M) return multiply_turned<M>(columns, depth, a, column, b, ldb, c, ldc, add, from);
    multiply_some_turned<M - 1>(rows, columns, depth, a, column, b, ldb, c, ldc, add, from);
  }
}

FASTFF_INLINE void multiply_all_turned(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t column, const float* b, int64_t ldb,
                                       float* c, int64_t ldc, bool add, bool upper) {
  const auto from = [&](int64_t m) { return upper ? m / kWhole * kWhole : 0; };
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows) multiply_turned<kRows>(columns, depth, a + m, column, b, ldb, c + m * ldc, ldc, add, from(m));
  multiply_some_turned<kRows - 1>(rows - m, columns, depth, a + m, column, b, ldb, c + m * ldc, ldc, add, from(m));
}

FASTFF_INLINE void multiply_inline(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t row, int64_t column, const float* b,
                                   int64_t ldb, float* c, int64_t ldc, bool add, bool upper) {
  if (!kMasks && columns < kLanes) {  // no vector fits
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t n = 0; n < columns; ++n) {
        float sum = 0;
        for (int64_t k = 0; k < depth; ++k) sum += a[m * row + k * column] * b[k * ldb + n];
        c[m * ldc + n] = add ? c[m * ldc + n] + sum : sum;
      }
    }
    return;
  }
  for (int64_t k = 0; k < depth; k += kDepth, add = true) {
    const int64_t part = std::min(kDepth, depth - k);
    const float *left = a + k * column, *right = b + k * ldb;
    if (row == 1 && column > kPacked) {
      multiply_all_turned(rows, columns, part, left, column, right, ldb, c, ldc, add, upper);
      continue;
    }
    int64_t n = 0;
    if constexpr (kMasks) {
      for (; n < columns; n += kPanel) {
        const int64_t width = std::min(kPanel, columns - n), reach = upper ? std::min(rows, n + width) : rows;
        if (width > kLanes) {
          multiply_rows<2>(reach, part, left, row, column, right + n, ldb, c + n, ldc, add, {0, width - kLanes});
        } else {
          multiply_rows<1>(reach, part, left, row, column, right + n, ldb, c + n, ldc, add, {0, width});
        }
      }
      continue;
    }
    for (; n + kPanel <= columns; n += kPanel) {
      const int64_t reach = upper ? std::min(rows, n + kPanel) : rows;
      multiply_rows<2>(reach, part, left, row, column, right + n, ldb, c + n, ldc, add, {0, kLanes});
    }
    for (; n < columns; n += kLanes) {  // the last vector ends at the last column, and writes what is left
      const int64_t lanes = std::min(kLanes, columns - n), start = n + lanes - kLanes;
      const int64_t reach = upper ? std::min(rows, n + lanes) : rows;
      multiply_rows<1>(reach, part, left, row, column, right + start, ldb, c + start, ldc, add, {kLanes - lanes, kLanes});
    }
  }
}

// b [columns, rows] with rows ldb apart from a [rows, columns] with rows lda apart.
FASTFF_INLINE void transpose_inline(int64_t rows, int64_t columns, const float* a, int64_t lda, float* b, int64_t ldb) {
  constexpr int64_t kBlock = 8;
  int64_t m = 0;
  for (; m + kBlock <= rows; m += kBlock) {
    int64_t n = 0;
    for (; n + kBlock <= columns; n += kBlock) {
      eight::Vector r[8], s[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) r[i] = eight::read(a + (m + i) * lda + n);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {  // pairs of rows: elements 0, 1 and 2, 3 of each half
        s[2 * i] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        s[2 * i + 1] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {  // fours of rows: one element of each half
        r[4 * i] = __builtin_shufflevector(s[4 * i], s[4 * i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        r[4 * i + 1] = __builtin_shufflevector(s[4 * i], s[4 * i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        r[4 * i + 2] = __builtin_shufflevector(s[4 * i + 1], s[4 * i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        r[4 * i + 3] = __builtin_shufflevector(s[4 * i + 1], s[4 * i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        eight::write(b + (n + i) * ldb + m, __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
        eight::write(b + (n + i + 4) * ldb + m, __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
      }
    }
    for (; n < columns; ++n) {
      for (int64_t i = 0; i < kBlock; ++i) b[n * ldb + m + i] = a[(m + i) * lda + n];
    }
  }
  for (; m < rows; ++m) {
    for (int64_t n = 0; n < columns; ++n) b[n * ldb + m] = a[m * lda + n];
  }
}

// b[k, n] = source[k * row + n * column], where one of row and column is 1, for multiply_panels: zeros behind the last of `given` columns. `columns` may be more: products
// that may write whole panels do not pick single lanes out of registers (a third of the time at 10 classes).
struct Panels {
  int64_t depth = 0, columns = 0;
  std::vector<float> data;

  Panels() = default;
  Panels(int64_t depth, int64_t given, const float* source, int64_t row, int64_t column, int64_t columns)
      : depth(depth), columns(columns), data((columns + kPanel - 1) / kPanel * kPanel * depth, 0.0f) {
    for (int64_t n = 0; n < given; n += kPanel) {
      const int64_t width = std::min(kPanel, given - n);
      float* target = data.data() + n * depth;
      if (row == 1) {
        transpose_inline(width, depth, source + n * column, column, target, kPanel);
      } else {
        for (int64_t k = 0; k < depth; ++k) std::copy_n(source + k * row + n, width, target + k * kPanel);
      }
    }
  }
};

FASTFF_INLINE void multiply_panels_inline(int64_t rows, const float* a, int64_t row, int64_t column, const Panels& b, float* c, int64_t ldc,
                                          bool add) {
  for (int64_t k = 0; k < b.depth; k += kDepth, add = true) {
    const int64_t part = std::min(kDepth, b.depth - k);
    for (int64_t n = 0; n < b.columns; n += kPanel) {
      const float *left = a + k * column, *right = b.data.data() + n * b.depth + k * kPanel;
      const int64_t width = std::min(kPanel, b.columns - n);
      if (width > kLanes) {
        multiply_rows<2>(rows, part, left, row, column, right, kPanel, c + n, ldc, add, {0, width - kLanes});
      } else {
        multiply_rows<1>(rows, part, left, row, column, right, kPanel, c + n, ldc, add, {0, width});
      }
    }
  }
}

FASTFF_INLINE float sum_of(eight::Vector v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
#ifdef __AVX512F__
FASTFF_INLINE float sum_of(Vector v) {
  return sum_of(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}

// c[0 .. 3] = or += the sums of four vectors, together: one by one they take longer than the products of 64 of k.
FASTFF_INLINE void write_sums(const Vector* v, float* c, bool add) {
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  const auto pairs = [](Vector x, Vector y) {  // x, y, x, y of each four
    return __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  };
  const Vector low = pairs(v[0], v[1]), high = pairs(v[2], v[3]);
  const Vector fours = __builtin_shufflevector(low, high, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                       __builtin_shufflevector(low, high, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  const eight::Vector two = __builtin_shufflevector(fours, fours, 0, 1, 2, 3, 4, 5, 6, 7) +
                            __builtin_shufflevector(fours, fours, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto sums = __builtin_shufflevector(two, two, 0, 1, 2, 3) + __builtin_shufflevector(two, two, 4, 5, 6, 7);
  Four& target = *reinterpret_cast<Four*>(c);
  target = add ? target + sums : sums;
}
#endif

template <int M, int N>
FASTFF_INLINE void dots_block(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  Vector sum[M][N] = {};
  int64_t k = 0;
  for (; kMasks ? k < depth : k + kLanes <= depth; k += kLanes) {
    const Lanes lanes{0, std::min(kLanes, depth - k)};
    Vector right[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) right[j] = read_some(b + j * ldb + k, lanes);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
      const Vector left = read_some(a + i * lda + k, lanes);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
#ifdef __AVX512F__
    if constexpr (N == 4) {
      write_sums(sum[i], c + i * ldc, add);
      continue;
    }
#endif
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      float total = sum_of(sum[i][j]);
      for (int64_t l = k; l < depth; ++l) total += a[i * lda + l] * b[j * ldb + l];
      c[i * ldc + j] = add ? c[i * ldc + j] + total : total;
    }
  }
}

// dots_block<rows, 4> for 0 <= rows <= M.
template <int M>
FASTFF_INLINE void dots_some(int64_t rows, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  if constexpr (M > 0) {
    if (rows == M) return dots_block<M, 4>(depth, a, lda, b, ldb, c, ldc, add);
    dots_some<M - 1>(rows, depth, a, lda, b, ldb, c, ldc, add);
  }
}

FASTFF_INLINE void dots_inline(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                               int64_t ldc, bool add, bool upper) {
  for (int64_t n = 0; n < columns; n += 4) {
    const int64_t width = std::min<int64_t>(4, columns - n);
    const int64_t reach = upper ? std::min(rows, n + width) : rows;
    int64_t m = 0;
    if (width == 4) {
      for (; m + kDotRows <= reach; m += kDotRows) dots_block<kDotRows, 4>(depth, a + m * lda, lda, b + n * ldb, ldb, c + m * ldc + n, ldc, add);
      if (kMasks) {
        dots_some<kDotRows - 1>(reach - m, depth, a + m * lda, lda, b + n * ldb, ldb, c + m * ldc + n, ldc, add);
        m = reach;
      }
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
