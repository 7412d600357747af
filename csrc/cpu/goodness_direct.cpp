// Squares of a projection from a = W x + bias itself: g = mean of a^2, dL/dx = W^T (2 d a / P), dL/dW = (2 d a / P) x^T. Two forms:
//
//   Direct               a [positions, K] = x W^T of positions with contiguous channels, by tiles; kept for the gradient where the task has
//                        one tile, else computed again. Several small samples are one matrix.
//   DirectChannelsFirst  a [K, P] = W x, sample by sample, for few classes and contiguous positions, where transposing x would take longer
//                        than the products

#include <algorithm>

#include "goodness.h"
#include "vec.h"

namespace goodness {
namespace {

using vec::kChunk;
using vec::kLanes;
using vec::Vector;

// Positions that Direct takes at a time, at least: dL/dW passes through the cache once for so many.
constexpr int64_t kPositions = 160;

// Most classes for DirectChannelsFirst (with 10 classes, 33 % of the time went into transposing).
constexpr int64_t kFewClasses = 24;

// Channels that DirectChannelsFirst reads side by side: more of them do not fit the L1 cache, whose sets a power of two of positions hits alike.
constexpr int64_t kStreams = 8;

// So many vectors of sums and factors stay in registers, in two chains of sums at least.
constexpr int kVectors = kPadding / kLanes, kChains = kVectors == 1 ? 4 : 1;

int64_t tile_of(const Problem& p) { return std::max<int64_t>(kPositions, (256 << 10) / 4 / p.KP); }

// sum[k] += sum over rows of a[r, k]^2, with rows of KP floats.
void add_squares(int64_t rows, int64_t KP, const float* a, double* sum) {
  for (int64_t start = 0; start < rows; start += kChunk) {
    const int64_t end = std::min(start + kChunk, rows);
    for (int64_t k = 0; k < KP; k += kPadding) {
      Vector part[kChains][kVectors] = {};
      const auto add = [&](int64_t r, int chain) {
        for (int v = 0; v < kVectors; ++v) {
          const Vector value = vec::read(a + r * KP + k + v * kLanes);
          part[chain][v] += value * value;
        }
      };
      int64_t r = start;
      for (; r + kChains <= end; r += kChains)
        FASTFF_UNROLL for (int chain = 0; chain < kChains; ++chain) add(r + chain, chain);
      for (; r < end; ++r) add(r, 0);
      float total[kPadding];
      for (int v = 0; v < kVectors; ++v) {
        for (int chain = 1; chain < kChains; ++chain) part[0][v] += part[chain][v];
        vec::write(total + v * kLanes, part[0][v]);
      }
      for (int64_t i = 0; i < kPadding; ++i) sum[k + i] += total[i];
    }
  }
}

// a[r, k] *= factor[k]
void multiply_by(int64_t rows, int64_t KP, float* a, const float* factor) {
  for (int64_t k = 0; k < KP; k += kPadding) {
    Vector by[kVectors];
    for (int v = 0; v < kVectors; ++v) by[v] = vec::read(factor + k + v * kLanes);
    for (int64_t r = 0; r < rows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        float* at = a + r * KP + k + v * kLanes;
        vec::write(at, vec::read(at) * by[v]);
      }
    }
  }
}

class Direct : public Squares {
 public:
  Direct(const Problem& p, int64_t most)
      : p(p), tile(std::min(tile_of(p), most * p.P)), kept(tile == most * p.P), a(tile * p.KP),
        factors(most * p.KP, 0.0f), squares(most * p.KP), sum(p.K) {}

  bool keeps() const override { return kept; }

  void goodness(int64_t n, const float* x, float* g) override {
    std::fill(squares.begin(), squares.end(), 0.0);
    for (int64_t start = 0; start < n * p.P; start += tile) {
      const int64_t count = std::min(tile, n * p.P - start);
      outputs(x + start * p.C, count);
      for_samples(start, count,
                  [&](int64_t i, int64_t rows, float* ai) { add_squares(rows, p.KP, ai, squares.data() + i * p.KP); });
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < p.K; ++k) g[i * p.K + k] = static_cast<float>(squares[i * p.KP + k] / p.P);
  }

  void gradients(int64_t n, const float* x, const float* d, float* grad_x, bool add, const Sums& sums) override {
    for (int64_t i = 0; i < n; ++i) vec::set_scaled(factors.data() + i * p.KP, 2.0f / p.P, d + i * p.K, p.K);
    for (int64_t start = 0; start < n * p.P; start += tile) {
      const int64_t count = std::min(tile, n * p.P - start);
      if (!kept) outputs(x + start * p.C, count);
      for_samples(start, count,
                  [&](int64_t i, int64_t rows, float* ai) { multiply_by(rows, p.KP, ai, factors.data() + i * p.KP); });
      if (grad_x) gemm::multiply(count, a.data(), p.KP, 1, p.weight_panels, grad_x + start * p.C, p.C, add);
      gemm::multiply(p.K, p.C, count, a.data(), 1, p.KP, x + start * p.C, p.C, sums.weight, p.C, true);
      if (p.bias) {
        for (int64_t r = 0; r < count; ++r) sum.add(a.data() + r * p.KP);
        sum.take([&](int64_t k, float total) { sums.bias[k] += total; });
      }
      sums.line->added();
    }
  }

 private:
  const Problem& p;
  int64_t tile;  // positions
  bool kept;
  Buffer<float> a, factors;
  Buffer<double> squares;
  vec::LineSum sum;

  // a [count, KP]
  void outputs(const float* x, int64_t count) {
    gemm::multiply(count, x, p.C, 1, p.weight_t, a.data(), p.KP);
    for (int64_t r = 0; p.bias && r < count; ++r) vec::add(a.data() + r * p.KP, p.bias, p.K);
  }

  // Calls f(sample, rows, first row of a) for the parts of a tile that belong to one sample.
  template <typename F>
  void for_samples(int64_t start, int64_t count, const F& f) {
    for (int64_t r = 0; r < count;) {
      const int64_t i = (start + r) / p.P, rows = std::min(count - r, (i + 1) * p.P - start - r);
      f(i, rows, a.data() + r * p.KP);
      r += rows;
    }
  }
};

class DirectChannelsFirst : public Squares {
 public:
  DirectChannelsFirst(const Problem& p, int64_t most) : p(p), a(most * p.K * p.P), t(p.K * p.C) {}

  void goodness(int64_t n, const float* x, float* g) override {
    for (int64_t i = 0; i < n; ++i) {
      const float* xi = x + i * p.C * p.P;
      float* ai = a.data() + i * p.K * p.P;
      for (int64_t c = 0; c < p.C; c += kStreams)
        gemm::multiply(p.K, p.P, std::min(kStreams, p.C - c), p.weight + c, p.C, 1, xi + c * p.P, p.P, ai, p.P, c > 0);
      for (int64_t k = 0; k < p.K; ++k) {
        float* ak = ai + k * p.P;
        if (p.bias) vec::add_constant(ak, p.bias[k], p.P);
        g[i * p.K + k] = static_cast<float>(vec::dot(ak, ak, p.P) / p.P);
      }
    }
  }

  void gradients(int64_t n, const float* x, const float* d, float* grad_x, bool add, const Sums& sums) override {
    for (int64_t i = 0; i < n; ++i) {
      const float *xi = x + i * p.C * p.P, *ai = a.data() + i * p.K * p.P;
      gemm::dots(p.K, p.C, p.P, ai, p.P, xi, p.P, t.data(), p.C);
      for (int64_t k = 0; k < p.K; ++k) {
        const float factor = 2.0f / p.P * d[i * p.K + k];
        vec::add_scaled(sums.weight + k * p.C, factor, t.data() + k * p.C, p.C);
        if (p.bias) sums.bias[k] += factor * static_cast<float>(vec::total_of(ai + k * p.P, p.P));
        vec::set_scaled(t.data() + k * p.C, factor, p.weight + k * p.C, p.C);
      }
      sums.line->added();
      if (grad_x) gemm::multiply(p.C, p.P, p.K, t.data(), 1, p.C, ai, p.P, grad_x + i * p.C * p.P, p.P, add);
    }
  }

 private:
  const Problem& p;
  Buffer<float> a, t;  // of all samples; products of one
};

}  // namespace

int64_t direct_samples(const Problem& p) { return std::min(kPositions / p.P, (p.B + 3) / 4); }

bool is_channels_first(const Problem& p, int64_t most) {
  return !p.channels_last && !p.second_moment && p.weight && p.K <= kFewClasses && p.P >= 64 &&
         tile_of(p) >= most * p.P;
}

std::unique_ptr<Squares> direct(const Problem& p, int64_t most) { return std::make_unique<Direct>(p, most); }
std::unique_ptr<Squares> direct_channels_first(const Problem& p, int64_t most) {
  return std::make_unique<DirectChannelsFirst>(p, most);
}

}  // namespace goodness
