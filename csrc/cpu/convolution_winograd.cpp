// fastff::convolution_winograd_native and fastff::convolution_winograd_gradient_native: a convolution by 3 x 3 filters with stride 1 and its weight's
// gradient in 16 multiplications for each 2 x 2 outputs instead of 36 (Winograd 1980; Lavin and Gray 2016), float32, channels_last, on the CPU.
//
//   y = A'[(G w G') (B' x B)]A,   dW = G'[(A dy A') (B' x B)]G      x: 4 x 4 positions of a channel, y and dy: 2 x 2, w: 3 x 3
//
// The products in brackets are element by element: at each of 16 points a matrix product over channels, or for dW over tiles. Rounding errors are
// those of sums over a tile's 4 x 4 positions. Forward, the number of threads changes no bit since no sum is divided; for dW the tiles are in groups
// whose number depends on the sizes alone.

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "gemm.h"
#include "tensors.h"

namespace {

using vec::kLanes;
using vec::read;
using vec::Vector;
using vec::write;

constexpr int64_t kPoints = 16, kPanel = gemm::Panels::kWidth, kColumns = 2 * kPanel;
constexpr int64_t kCache = 144 << 10;  // floats of a task's tiles: half a megabyte of the L2 cache
// Floats of all groups' sums, where there are several: a megabyte, so that a step needs little more memory.
constexpr int64_t kSums = 256 << 10;

int64_t whole(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Memory for n floats of tiles, up to half a megabyte, that a thread keeps from one call to the next, for each of two uses: given back to the system and
// taken from it again, its pages took a third of the time.
enum Use { kInputs, kOutputs };
template <Use>
float* kept(int64_t n) {
  thread_local Buffer<float> memory;
  if (static_cast<int64_t>(memory.size()) < n) {
    Buffer<float>().swap(memory);
    memory.resize(n);
  }
  return memory.data();
}

// The matrices B', G, A', A and G' times a column.
FASTFF_INLINE void of_input(const Vector* d, int64_t step, Vector* to) {
  const Vector a = d[0], b = d[step], c = d[2 * step], e = d[3 * step];
  to[0] = a - c, to[step] = b + c, to[2 * step] = c - b, to[3 * step] = b - e;
}
FASTFF_INLINE void of_weight(const Vector* w, int64_t step, Vector* to, int64_t apart) {
  const Vector ends = 0.5f * (w[0] + w[2 * step]), middle = 0.5f * w[step];
  to[0] = w[0], to[apart] = ends + middle, to[2 * apart] = ends - middle, to[3 * apart] = w[2 * step];
}
FASTFF_INLINE void to_output(const Vector* m, int64_t step, Vector* to, int64_t apart) {
  to[0] = m[0] + m[step] + m[2 * step], to[apart] = m[step] - m[2 * step] - m[3 * step];
}
FASTFF_INLINE void of_output(const Vector* y, int64_t step, Vector* to, int64_t apart) {
  const Vector a = y[0], b = y[step];
  to[0] = a, to[apart] = a + b, to[2 * apart] = a - b, to[3 * apart] = -b;
}
FASTFF_INLINE void to_weight(const Vector* m, int64_t step, Vector* to, int64_t apart) {
  const Vector sum = 0.5f * (m[step] + m[2 * step]);
  to[0] = m[0] + sum, to[apart] = 0.5f * (m[step] - m[2 * step]), to[2 * apart] = sum + m[3 * step];
}

// `lanes` numbers and zeros behind them; the same to memory.
FASTFF_INLINE Vector read_lanes(const float* p, int64_t lanes) {
  if (vec::kMasks || lanes == kLanes) return vec::read_some(p, {0, lanes});
  float some[kLanes] = {};
  std::copy_n(p, lanes, some);
  return read(some);
}
FASTFF_INLINE void write_lanes(float* p, Vector v, int64_t lanes) {
  lanes == kLanes ? write(p, v) : vec::write_some(p, v, false, {0, lanes});
}

// Images [B, H, W, C] under tiles of 2 x 2 outputs, `down` x `across` of them; `wide` channels with zeros behind the last.
struct Images {
  int64_t H, W, C, down, across;
  const float* data;
  int64_t wide = whole(C, kLanes);
  Buffer<float> nothing = Buffer<float>(wide);

  // The N x N positions of a tile, from `margin` rows and columns before its outputs on; those outside are zeros.
  template <int N>
  FASTFF_INLINE void find(int64_t tile, int64_t margin, const float** from) const {
    const int64_t b = tile / (down * across), top = 2 * (tile / across % down) - margin,
                  left = 2 * (tile % across) - margin;
    for (int64_t r = 0; r < N; ++r)
      for (int64_t q = 0; q < N; ++q) {
        const int64_t h = top + r, w = left + q;
        const bool inside = h >= 0 && h < H && w >= 0 && w < W;
        from[r * N + q] = inside ? data + ((b * H + h) * W + w) * C : nothing.data();
      }
  }

  // to [16 points, panels of `panel` channels, tiles first .. first + count - 1, panel]: B' x B.
  void inputs(int64_t first, int64_t count, int64_t padding, int64_t panel, float* to) const {
    const float* from[16];
    for (int64_t t = 0; t < count; ++t) {
      find<4>(first + t, padding, from);
      for (int64_t c = 0; c < C; c += kLanes) {
        Vector d[16];
        FASTFF_UNROLL for (int i = 0; i < 16; ++i) d[i] = read_lanes(from[i] + c, std::min(kLanes, C - c));
        FASTFF_UNROLL for (int i = 0; i < 4; ++i) of_input(d + i, 4, d + i);
        FASTFF_UNROLL for (int i = 0; i < 4; ++i) of_input(d + 4 * i, 1, d + 4 * i);
        float* const at = to + (c / panel * count + t) * panel + c % panel;
        FASTFF_UNROLL for (int i = 0; i < 16; ++i) write(at + i * count * whole(C, panel), d[i]);
      }
    }
  }

  // to [16 points, tiles, width] of channels channel .. channel + width - 1: A dy A'.
  void gradients(int64_t first, int64_t count, int64_t channel, int64_t width, float* to) const {
    const float* from[4];
    for (int64_t t = 0; t < count; ++t) {
      find<2>(first + t, 0, from);
      for (int64_t c = 0; c < width; c += kLanes) {
        const int64_t lanes = std::min(kLanes, width - c);
        Vector dy[4], rows[8], d[16];
        FASTFF_UNROLL for (int i = 0; i < 4; ++i) dy[i] =
            read_lanes(from[i] == nothing.data() ? from[i] : from[i] + channel + c, lanes);
        FASTFF_UNROLL for (int i = 0; i < 2; ++i) of_output(dy + i, 2, rows + i, 2);
        FASTFF_UNROLL for (int i = 0; i < 4; ++i) of_output(rows + 2 * i, 1, d + 4 * i, 1);
        FASTFF_UNROLL for (int i = 0; i < 16; ++i) write_lanes(to + (i * count + t) * width + c, d[i], lanes);
      }
    }
  }
};

// Filters [N, K, 3, 3]: element (n, k, tap) at n * along + k * across + tap * apart, with `reversed` from the last tap on.
struct Filters {
  int64_t N, K, along, across, apart;
  bool reversed;
  const float* data;

  // to [16 points][panels of n][K][kPanel]: G w G' of one panel; `points` floats lie between points.
  void transform(int64_t n, float* to, int64_t points) const {
    constexpr int64_t some = 16;
    float taps[some * 9 * kPanel] = {};  // [k, tap, n]
    const int64_t width = std::min(kPanel, N - n);
    for (int64_t k = 0; k < K; k += some) {
      const int64_t count = std::min(some, K - k);
      const float* const from = data + n * along + k * across;
      if (across == 1)
        for (int64_t i = 0; i < 9; ++i)
          gemm::transpose(width, count, from + i * apart, along, taps + i * kPanel, 9 * kPanel);
      else if (across == 9)
        gemm::transpose(width, 9 * count, from, along, taps, kPanel);
      else if (along == 9)
        for (int64_t i = 0; i < count; ++i)
          gemm::transpose(width, 9, from + i * across, 9, taps + i * 9 * kPanel, kPanel);
      else
        for (int64_t i = 0; i < 9 * count; ++i)
          std::copy_n(from + i / 9 * across + i % 9 * apart, width, taps + i * kPanel);
      for (int64_t row = 0; row < count; ++row)
        for (int64_t l = 0; l < kPanel; l += kLanes) {
          Vector w[9], rows[12], u[16];
          FASTFF_UNROLL for (int i = 0; i < 9; ++i) w[i] = read(taps + (row * 9 + (reversed ? 8 - i : i)) * kPanel + l);
          FASTFF_UNROLL for (int i = 0; i < 3; ++i) of_weight(w + i, 3, rows + i, 3);
          FASTFF_UNROLL for (int i = 0; i < 4; ++i) of_weight(rows + 3 * i, 1, u + 4 * i, 1);
          FASTFF_UNROLL for (int i = 0; i < 16; ++i) write(to + i * points + (k + row) * kPanel + l, u[i]);
        }
    }
  }
};

// Steps of about the same size of `count` tiles, at most `most` each.
int64_t even(int64_t count, int64_t most) {
  const int64_t steps = (count + most - 1) / most;
  return (count + steps - 1) / steps;
}

// x [B, C, H, W], weight [D, C, 3, 3], bias [D] or none, float32 on the CPU, not empty -> y [B, D, P, Q], channels_last. With `transposed` x is the
// gradient of such a convolution's output and `padding` 2 less that of the convolution: -> dL/dx.
Tensor convolution_winograd_native(Tensor x, Tensor weight, MaybeTensor bias, int64_t padding, bool transposed) {
  x = with_layout(x, true), weight = dense(weight);
  const bool last = !has_layout(weight, false);
  const int64_t B = x.size(0), C = x.size(1), D = weight.size(transposed ? 1 : 0), P = x.size(2) + 2 * padding - 2,
                Q = x.size(3) + 2 * padding - 2, inner = weight.size(1);
  STD_TORCH_CHECK(weight.size(transposed ? 0 : 1) == C, "weight: expected filters for ", C, " channels");
  const int64_t rows = 9 * inner, columns = last ? 1 : 9;
  const Filters filters{
      D, C, transposed ? columns : rows, transposed ? rows : columns, last ? inner : 1, transposed, floats(weight)};
  const int64_t points = whole(D, kPanel) * C;
  const Tensor transformed = empty_strided(x, {kPoints * points}, {1});
  float* const u = writable(transformed);
  parallel_for(0, whole(D, kPanel) / kPanel, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kPanel; n < end * kPanel; n += kPanel) filters.transform(n, u + n * C, points);
  });
  const Tensor y = empty_strided(x, {B, D, P, Q}, {P * Q * D, 1, Q * D, D});
  float* const to = writable(y);
  const Images images{x.size(2), x.size(3), C, (P + 1) / 2, (Q + 1) / 2, floats(x)};
  const float* const constant = floats(bias);
  const int64_t most = std::clamp<int64_t>(kCache / (kPoints * images.wide) / 12 * 12, 12, 96);
  parallel_for(0, B * images.down * images.across, 12, [&](int64_t begin, int64_t end) {
    const int64_t step = even(end - begin, most);
    float *const v = kept<kInputs>(kPoints * step * images.wide), *const m = kept<kOutputs>(kPoints * step * kColumns);
    for (int64_t first = begin; first < end; first += step) {
      const int64_t count = std::min(step, end - first);
      images.inputs(first, count, padding, images.wide, v);
      for (int64_t n = 0; n < D; n += kColumns) {
        const int64_t width = std::min(kColumns, D - n);
        for (int64_t i = 0; i < kPoints; ++i)
          gemm::multiply(count, v + i * count * images.wide, images.wide, 1, {C, width, u + i * points + n * C},
                         m + i * count * kColumns, kColumns);
        for (int64_t t = 0; t < count; ++t) {
          const int64_t tile = first + t, b = tile / (images.down * images.across),
                        top = 2 * (tile / images.across % images.down), left = 2 * (tile % images.across);
          for (int64_t c = 0; c < width; c += kLanes) {
            const int64_t lanes = std::min(kLanes, width - c);
            Vector d[16], columns[8], out[4];
            FASTFF_UNROLL for (int i = 0; i < 16; ++i) d[i] = read(m + (i * count + t) * kColumns + c);
            FASTFF_UNROLL for (int i = 0; i < 4; ++i) to_output(d + i, 4, columns + i, 4);
            FASTFF_UNROLL for (int i = 0; i < 2; ++i) to_output(columns + 4 * i, 1, out + 2 * i, 1);
            const Vector more = constant ? read_lanes(constant + n + c, lanes) : Vector{};
            FASTFF_UNROLL for (int i = 0; i < 4; ++i) if (top + i / 2 < P && left + i % 2 < Q)
                write_lanes(to + ((b * P + top + i / 2) * Q + left + i % 2) * D + n + c, out[i] + more, lanes);
          }
        }
      }
    }
  });
  return y;
}

// x [B, C, H, W], grad [B, D, P, Q] float32 on the CPU, not empty -> dL/dweight [D, C, 3, 3], channels_last or contiguous.
Tensor convolution_winograd_gradient_native(Tensor grad, Tensor x, int64_t padding, bool channels_last) {
  grad = with_layout(grad, true), x = with_layout(x, true);
  const int64_t B = x.size(0), C = x.size(1), D = grad.size(1), P = grad.size(2), Q = grad.size(3);
  const Images inputs{x.size(2), x.size(3), C, (P + 1) / 2, (Q + 1) / 2, floats(x)},
      outputs{P, Q, D, (P + 1) / 2, (Q + 1) / 2, floats(grad)};
  const int64_t tiles = B * inputs.down * inputs.across, size = kPoints * D * C;
  const int64_t panels = whole(C, kPanel);
  const int64_t groups = std::clamp<int64_t>(std::min(kSums / size, tiles / 64), 1, 16);
  const int64_t share = std::min(whole((D * groups + 7) / 8, 12), D),
                shares = (D + share - 1) / share;  // of D, of a task
  const int64_t most = std::clamp<int64_t>(2 * kCache / (kPoints * (panels + share)), 16, 128);
  const Tensor all_sums = empty_strided(x, {groups, kPoints, D, C}, {size, D * C, C, 1});
  float* const sums = writable(all_sums);
  parallel_for(0, groups * shares, 1, [&](int64_t begin, int64_t end) {
    float *const v = kept<kInputs>(kPoints * most * panels), *const e = kept<kOutputs>(kPoints * most * share);
    // Tasks of one group after each other: their inputs are transformed once.
    for (int64_t task = begin, next; task < end; task = next) {
      const int64_t group = task / shares, from = group * tiles / groups, to = (group + 1) * tiles / groups,
                    step = even(to - from, most);
      next = std::min(end, (group + 1) * shares);
      for (int64_t first = from; first < to; first += step) {
        const int64_t count = std::min(step, to - first);
        inputs.inputs(first, count, padding, kPanel, v);
        for (int64_t d = task % shares * share; d < std::min(D, (next - group * shares) * share); d += share) {
          const int64_t width = std::min(share, D - d);
          outputs.gradients(first, count, d, width, e);
          for (int64_t i = 0; i < kPoints; ++i)
            gemm::multiply(width, e + i * count * width, 1, width, {count, C, v + i * count * panels},
                           sums + group * size + (i * D + d) * C, C, first > from);
        }
      }
    }
  });
  const std::vector<int64_t> strides = {9 * C, channels_last ? 1 : 9, channels_last ? 3 * C : 3, channels_last ? C : 1};
  const Tensor grad_weight = empty_strided(x, {D, C, 3, 3}, strides);
  float* const dw = writable(grad_weight);
  parallel_for(0, D, 8, [&](int64_t begin, int64_t end) {
    Buffer<float> taps(9 * C);
    for (int64_t d = begin; d < end; ++d) {
      float* const to = channels_last ? dw + d * 9 * C : taps.data();
      for (int64_t c = 0; c < C; c += kLanes) {
        const int64_t lanes = std::min(kLanes, C - c);
        Vector m[16], rows[12], w[9];
        FASTFF_UNROLL for (int i = 0; i < 16; ++i) {
          m[i] = read_lanes(sums + (i * D + d) * C + c, lanes);
          for (int64_t group = 1; group < groups; ++group)
            m[i] += read_lanes(sums + group * size + (i * D + d) * C + c, lanes);
        }
        FASTFF_UNROLL for (int i = 0; i < 4; ++i) to_weight(m + i, 4, rows + i, 4);
        FASTFF_UNROLL for (int i = 0; i < 3; ++i) to_weight(rows + 4 * i, 1, w + 3 * i, 1);
        FASTFF_UNROLL for (int i = 0; i < 9; ++i) write_lanes(to + i * C + c, w[i], lanes);
      }
      if (!channels_last) gemm::transpose(9, C, taps.data(), C, dw + d * 9 * C, 9);
    }
  });
  return grad_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastff, m) {
  m.def("convolution_winograd_native(Tensor x, Tensor weight, Tensor? bias, int padding, bool transposed) -> Tensor");
  m.def("convolution_winograd_gradient_native(Tensor grad, Tensor x, int padding, bool channels_last) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastff, CPU, m) {
  m.impl("convolution_winograd_native", TORCH_BOX(&convolution_winograd_native));
  m.impl("convolution_winograd_gradient_native", TORCH_BOX(&convolution_winograd_gradient_native));
}
