// Matrix products by register blocks (gemm.h): MR x NR vectors of sums, 6 x 2 x 8 and 3 x 4 x 8 floats with AVX2's 16 registers, 12 x 2 x 16 and
// 6 x 4 x 16 with AVX-512's 32. multiply takes 256 of k at a time, so that the columns of b stay in the L1 cache.

#include "gemm.h"

namespace gemm {
namespace {

using vec::kLanes;
using vec::kMasks;
using vec::Lanes;
using vec::read;
using vec::read_some;
using vec::Vector;
using vec::write;
using vec::write_some;
namespace eight = vec::eight;

#ifdef __AVX512F__
constexpr int kMR = 12, kDotMR = 6;
constexpr int kNear =
    3;  // rows of a found from one pointer: 12 pointers do not fit the registers, and 14 of 57 instructions of the loop read them back
#else
constexpr int kMR = 6, kDotMR = 3, kNear = 6;
#endif
constexpr int64_t kKC = 256, kPanel = Panels::kWidth;
constexpr int64_t kFarApart = 32;  // col_stride from which a transposed a is packed
constexpr int64_t kWhole =
    16;  // `upper` keeps columns from a multiple of this on: a vector of AVX-512, a panel of AVX2
constexpr int64_t kDotKC = 2048;  // of k that dots sums in one vector of floats
constexpr int64_t kPieces = 16;   // blocks of kKC or kDotKC whose sums are added in floats

// Every loop over `sum` is unrolled and no lane of it is picked by a variable, or GCC keeps it in memory (42 % of the time at 10 classes).
template <int MR, int NR>
FASTFF_INLINE void multiply_block(int64_t K, const float* a, int64_t row_stride, int64_t col_stride, const float* b,
                                  int64_t ldb, float* c, int64_t ldc, bool add, Lanes lanes) {
  Vector sum[MR][NR] = {};
  const float* lefts[(MR + kNear - 1) / kNear];
  FASTFF_UNROLL for (int i = 0; i < MR; i += kNear) lefts[i / kNear] = a + i * row_stride;
  for (int64_t k = 0; k < K; ++k) {
    Vector right[NR];
    FASTFF_UNROLL for (int j = 0; j < NR; ++j) right[j] =
        j + 1 < NR ? read(b + k * ldb + j * kLanes) : read_some(b + k * ldb + j * kLanes, lanes);
    FASTFF_UNROLL for (int i = 0; i < MR; ++i) {
      const float left = lefts[i / kNear][i % kNear * row_stride + k * col_stride];
      FASTFF_UNROLL for (int j = 0; j < NR; ++j) sum[i][j] += left * right[j];
    }
  }
  FASTFF_UNROLL for (int i = 0; i < MR; ++i) {
    FASTFF_UNROLL for (int j = 0; j < NR; ++j) {
      float* target = c + i * ldc + j * kLanes;
      if (j + 1 < NR || lanes.to - lanes.from == kLanes)
        write(target, add ? read(target) + sum[i][j] : sum[i][j]);
      else
        write_some(target, sum[i][j], add, lanes);
    }
  }
}

// Calls f<rows>(m) for blocks of MR rows m .. of M, and for what is left.
template <int MR, typename F>
FASTFF_INLINE void for_rows(int64_t m, int64_t M, const F& f) {
  if constexpr (MR > 0) {
    for (; m + MR <= M; m += MR) f.template operator()<MR>(m);
    for_rows<MR - 1>(m, M, f);
  }
}

// Calls f<NR>(n, lanes) for blocks of columns n .. of N, from a multiple of kPanel or kWhole on.
template <typename F>
FASTFF_INLINE void for_columns(int64_t from, int64_t N, const F& f) {
  int64_t n = from;
  for (; kMasks ? n < N : n + kPanel <= N; n += kPanel) {
    const int64_t width = kMasks ? std::min(kPanel, N - n) : kPanel;
    if (width > kLanes)
      f.template operator()<2>(n, Lanes{0, width - kLanes});
    else
      f.template operator()<1>(n, Lanes{0, width});
  }
  for (; n < N; n += kLanes) {  // without masks: the last vector ends at the last column, and writes what is left
    const int64_t left = std::min(kLanes, N - n);
    f.template operator()<1>(n + left - kLanes, Lanes{kLanes - left, kLanes});
  }
}

template <int NR>
FASTFF_INLINE void multiply_rows(int64_t M, int64_t K, const float* a, int64_t row_stride, int64_t col_stride,
                                 const float* b, int64_t ldb, float* c, int64_t ldc, bool add, Lanes lanes) {
  for_rows<kMR>(0, M, [&]<int MR>(int64_t m) __attribute__((always_inline)) {
    multiply_block<MR, NR>(K, a + m * row_stride, row_stride, col_stride, b, ldb, c + m * ldc, ldc, add, lanes);
  });
}

// MR rows of a transposed a whose k lie col_stride > kFarApart apart, packed once and taken past all columns: read in place, every step of k
// would be in another page (dL/dW of 1,000 classes and 512 channels took 3 times as long).
template <int MR>
FASTFF_INLINE void multiply_packed(int64_t N, int64_t K, const float* a, int64_t col_stride, const float* b,
                                   int64_t ldb, float* c, int64_t ldc, bool add, int64_t from) {
  float packed[kKC * MR];
  for (int64_t k = 0; k < K; ++k)
    for (int i = 0; i < MR; ++i) packed[k * MR + i] = a[k * col_stride + i];
  for_columns(from, N, [&]<int NR>(int64_t n, Lanes lanes) __attribute__((always_inline)) {
    multiply_block<MR, NR>(K, packed, 1, MR, b + n, ldb, c + n, ldc, add, lanes);
  });
}

FASTFF_INLINE void multiply_transposed(int64_t M, int64_t N, int64_t K, const float* a, int64_t col_stride,
                                       const float* b, int64_t ldb, float* c, int64_t ldc, bool add, bool upper) {
  for_rows<kMR>(0, M, [&]<int MR>(int64_t m) __attribute__((always_inline)) {
    multiply_packed<MR>(N, K, a + m, col_stride, b, ldb, c + m * ldc, ldc, add, upper ? m / kWhole * kWhole : 0);
  });
}

FASTFF_INLINE float sum_of(eight::Vector v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
#ifdef __AVX512F__
FASTFF_INLINE float sum_of(Vector v) {
  return sum_of(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
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

template <int MR, int NR>
FASTFF_INLINE void dots_block(int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                              int64_t ldc, bool add) {
  Vector sum[MR][NR] = {};
  int64_t k = 0;
  for (; kMasks ? k < K : k + kLanes <= K; k += kLanes) {
    const Lanes lanes{0, std::min(kLanes, K - k)};
    Vector right[NR];
    FASTFF_UNROLL for (int j = 0; j < NR; ++j) right[j] = read_some(b + j * ldb + k, lanes);
    FASTFF_UNROLL for (int i = 0; i < MR; ++i) {
      const Vector left = read_some(a + i * lda + k, lanes);
      FASTFF_UNROLL for (int j = 0; j < NR; ++j) sum[i][j] += left * right[j];
    }
  }
  FASTFF_UNROLL for (int i = 0; i < MR; ++i) {
#ifdef __AVX512F__
    if constexpr (NR == 4) {
      write_sums(sum[i], c + i * ldc, add);
      continue;
    }
#endif
    FASTFF_UNROLL for (int j = 0; j < NR; ++j) {
      float total = sum_of(sum[i][j]);
      for (int64_t l = k; l < K; ++l) total += a[i * lda + l] * b[j * ldb + l];
      c[i * ldc + j] = add ? c[i * ldc + j] + total : total;
    }
  }
}

FASTFF_INLINE void dots_part(int64_t M, int64_t N, int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb,
                             float* c, int64_t ldc, bool add, bool upper) {
  for (int64_t n = 0; n < N; n += 4) {
    const int64_t width = std::min<int64_t>(4, N - n), reach = upper ? std::min(M, n + width) : M;
    if (width < 4) {
      for (int64_t m = 0; m < reach; ++m)
        for (int64_t j = n; j < N; ++j)
          dots_block<1, 1>(K, a + m * lda, lda, b + j * ldb, ldb, c + m * ldc + j, ldc, add);
      return;
    }
    for_rows<kDotMR>(0, reach, [&]<int MR>(int64_t m) __attribute__((always_inline)) {
      dots_block<MR, 4>(K, a + m * lda, lda, b + n * ldb, ldb, c + m * ldc + n, ldc, add);
    });
  }
}

// f(k, size, c, ldc, add) adds a piece of K to c: all of it, or pieces of `longest` whose sums are added in doubles.
template <typename F>
void by_pieces(int64_t M, int64_t N, int64_t K, int64_t longest, float* c, int64_t ldc, bool add, const F& f) {
  if (K <= longest) return f(0, K, c, ldc, add);
  Buffer<float> piece(M * N);
  Buffer<double> total(M * N);
  for (int64_t k = 0; k < K; k += longest) {
    f(k, std::min(longest, K - k), piece.data(), N, false);
    for (int64_t i = 0; i < M * N; ++i) total[i] += piece[i];
  }
  for (int64_t i = 0; i < M * N; ++i) {
    float& target = c[i / N * ldc + i % N];
    target = static_cast<float>(add ? target + total[i] : total[i]);
  }
}

void multiply_piece(int64_t M, int64_t N, int64_t K, const float* a, int64_t row_stride, int64_t col_stride,
                    const float* b, int64_t ldb, float* c, int64_t ldc, bool add, bool upper) {
  if (!kMasks && N < kLanes) {  // no vector fits
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t n = 0; n < N; ++n) {
        double sum = add ? c[m * ldc + n] : 0;
        for (int64_t k = 0; k < K; ++k) sum += a[m * row_stride + k * col_stride] * b[k * ldb + n];
        c[m * ldc + n] = static_cast<float>(sum);
      }
    }
    return;
  }
  for (int64_t k = 0; k < K; k += kKC, add = true) {
    const int64_t part = std::min(kKC, K - k);
    const float *left = a + k * col_stride, *right = b + k * ldb;
    if (row_stride == 1 && col_stride > kFarApart) {
      multiply_transposed(M, N, part, left, col_stride, right, ldb, c, ldc, add, upper);
      continue;
    }
    for_columns(0, N, [&]<int NR>(int64_t n, Lanes lanes) __attribute__((always_inline)) {
      const int64_t reach = upper ? std::min(M, n + (NR - 1) * kLanes + lanes.to) : M;
      multiply_rows<NR>(reach, part, left, row_stride, col_stride, right + n, ldb, c + n, ldc, add, lanes);
    });
  }
}

}  // namespace

void multiply(int64_t M, int64_t N, int64_t K, const float* a, int64_t row_stride, int64_t col_stride, const float* b,
              int64_t ldb, float* c, int64_t ldc, bool add, bool upper) {
  by_pieces(M, N, K, kPieces * kKC, c, ldc, add, [=](int64_t k, int64_t size, float* to, int64_t ld, bool adds) {
    multiply_piece(M, N, size, a + k * col_stride, row_stride, col_stride, b + k * ldb, ldb, to, ld, adds, upper);
  });
}

void dots(int64_t M, int64_t N, int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
          int64_t ldc, bool upper) {
  by_pieces(M, N, K, kPieces * kDotKC, c, ldc, false, [=](int64_t k, int64_t size, float* to, int64_t ld, bool) {
    for (int64_t j = 0; j < size; j += kDotKC)
      dots_part(M, N, std::min(kDotKC, size - j), a + k + j, lda, b + k + j, ldb, to, ld, j > 0, upper);
  });
}

void transpose(int64_t M, int64_t N, const float* a, int64_t lda, float* b, int64_t ldb) {
  constexpr int64_t kBlock = 8;
  int64_t m = 0;
  for (; m + kBlock <= M; m += kBlock) {
    int64_t n = 0;
    for (; n + kBlock <= N; n += kBlock) {
      eight::Vector r[8], s[8];
      FASTFF_UNROLL for (int i = 0; i < 8; ++i) r[i] = eight::read(a + (m + i) * lda + n);
      FASTFF_UNROLL for (int i = 0; i < 4; ++i) {  // pairs of rows: elements 0, 1 and 2, 3 of each half
        s[2 * i] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        s[2 * i + 1] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
      }
      FASTFF_UNROLL for (int i = 0; i < 2; ++i) {  // fours of rows: one element of each half
        r[4 * i] = __builtin_shufflevector(s[4 * i], s[4 * i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        r[4 * i + 1] = __builtin_shufflevector(s[4 * i], s[4 * i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        r[4 * i + 2] = __builtin_shufflevector(s[4 * i + 1], s[4 * i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
        r[4 * i + 3] = __builtin_shufflevector(s[4 * i + 1], s[4 * i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
      }
      FASTFF_UNROLL for (int i = 0; i < 4; ++i) {
        eight::write(b + (n + i) * ldb + m, __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
        eight::write(b + (n + i + 4) * ldb + m, __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
      }
    }
    for (; n < N; ++n)
      for (int64_t i = 0; i < kBlock; ++i) b[n * ldb + m + i] = a[(m + i) * lda + n];
  }
  for (; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) b[n * ldb + m] = a[m * lda + n];
}

Panels::Panels(int64_t K, int64_t N, const float* source, int64_t row_stride, int64_t col_stride, int64_t padded_N)
    : K(K), N(padded_N), memory((padded_N + kPanel - 1) / kPanel * kPanel * K, 0.0f) {
  data = memory.data();
  for (int64_t n = 0; n < N; n += kPanel) {
    const int64_t width = std::min(kPanel, N - n);
    float* target = memory.data() + n * K;
    if (row_stride == 1)
      transpose(width, K, source + n * col_stride, col_stride, target, kPanel);
    else
      for (int64_t k = 0; k < K; ++k) std::copy_n(source + k * row_stride + n, width, target + k * kPanel);
  }
}

void multiply(int64_t M, const float* a, int64_t row_stride, int64_t col_stride, const Panels& b, float* c, int64_t ldc,
              bool add) {
  for (int64_t k = 0; k < b.K; k += kKC, add = true) {
    const int64_t part = std::min(kKC, b.K - k);
    for (int64_t n = 0; n < b.N; n += kPanel) {
      const float *left = a + k * col_stride, *right = b.data + n * b.K + k * kPanel;
      const int64_t width = std::min(kPanel, b.N - n);
      if (width > kLanes)
        multiply_rows<2>(M, part, left, row_stride, col_stride, right, kPanel, c + n, ldc, add, {0, width - kLanes});
      else
        multiply_rows<1>(M, part, left, row_stride, col_stride, right, kPanel, c + n, ldc, add, {0, width});
    }
  }
}

}  // namespace gemm
