// fastff::convolution_weight_gradient_native: dL/dweight of a convolution, float32, channels_last, on the CPU. Layer-wise training computes no
// other gradient of a convolution, and oneDNN's runs at two thirds of the rate of its forward pass or less.
//
//   dW[d, u, v, c] = sum_{b, i, j} dy[b, i, j, d] x[b, i s + u - p, j s + v - p, c]
//
// A tile is some rows of an image, or some images where they are small. x is copied in panels of one or two vectors of channels, with its zeros around
// it, so that each of the k k taps is the same panel from another start; dy is copied in blocks of kRows. Registers hold kRows x 1 or 2 vectors
// of sums over all positions of the tile: 6 x 2 x 8 with AVX2's 16 registers, 12 x 2 x 16 with AVX-512's 32. A panel stays in the L1 cache
// (small dW) or L2 cache for all blocks and taps. Tiles are added up with what their roundings lost (Kahan 1965), so that the error does not grow
// with their number; sums of groups of images are added in order: the number of threads changes no bit.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "tensors.h"
#include "vec.h"

namespace {

using vec::kLanes;
using vec::read;
using vec::Vector;
using vec::write;

#ifdef __AVX512F__
constexpr int64_t kRows = 12, kCache = 40 << 10;
#else
constexpr int64_t kRows = 6, kCache = 26 << 10;
#endif

struct Shape {
  int64_t B, H, W, C, P, Q, D, k, stride, padding;  // x [B, H, W, C], dy [B, P, Q, D]
};

// Rows first .. first + rows - 1 of dy, of images image .. image + images - 1; columns from `left` on.
struct Tile {
  int64_t image, images, first, rows, left, columns;
};

int64_t padded_rows(const Shape& s, int64_t rows) { return (rows - 1) * s.stride + s.k; }
int64_t padded_columns(const Shape& s, int64_t columns) { return (columns - 1) * s.stride + s.k; }

// Vectors of a panel that begins at channel c.
int64_t vectors(const Shape& s, int64_t c) { return s.C - c > kLanes ? 2 : 1; }

// panel [images, padded rows, padded columns, N vectors] of channels from c on.
template <int N>
void pack_x(const Shape& s, const Tile& t, const float* x, int64_t c, float* panel) {
  constexpr int64_t wide = N * kLanes;
  const int64_t height = padded_rows(s, t.rows), width = padded_columns(s, t.columns), lanes = std::min(wide, s.C - c);
  for (int64_t b = 0; b < t.images; ++b) {
    for (int64_t r = 0; r < height; ++r) {
      const int64_t h = t.first * s.stride + r - s.padding;
      for (int64_t q = 0; q < width; ++q, panel += wide) {
        const int64_t w = t.left * s.stride + q - s.padding;
        if (h < 0 || h >= s.H || w < 0 || w >= s.W) {
          for (int64_t l = 0; l < wide; ++l) panel[l] = 0;
          continue;
        }
        const float* source = x + (((t.image + b) * s.H + h) * s.W + w) * s.C + c;
        if (lanes == wide)
          for (int j = 0; j < N; ++j) write(panel + j * kLanes, read(source + j * kLanes));
        else
          for (int64_t l = 0; l < wide; ++l) panel[l] = l < lanes ? source[l] : 0;
      }
    }
  }
}

// blocks [D / kRows][positions][kRows], the last one narrower.
void pack_dy(const Shape& s, const Tile& t, const float* dy, float* blocks) {
  const int64_t positions = t.images * t.rows * t.columns;
  for (int64_t line = 0; line < t.images * t.rows; ++line) {
    const int64_t row = (t.image + line / t.rows) * s.P + t.first + line % t.rows;
    const float* source = dy + (row * s.Q + t.left) * s.D;
    for (int64_t at = line * t.columns; at < (line + 1) * t.columns; ++at, source += s.D) {
      int64_t d = 0;
      for (; d + kRows <= s.D; d += kRows) {
        float* target = blocks + d * positions + at * kRows;
        for (int64_t i = 0; i < kRows; ++i) target[i] = source[d + i];
      }
      const int64_t left = s.D - d;
      for (int64_t i = 0; i < left; ++i) blocks[d * positions + at * left + i] = source[d + i];
    }
  }
}

// What tiles are added up in: sum - lost is the sum so far. The first tile is written: at few positions, where there is no other, passes through
// sums and what they lost would take as long as the products.
struct Sums {
  float *sum, *lost;
  bool first;

  Sums at(int64_t i) const { return {sum + i, lost + i, first}; }
};
template <typename T>
FASTFF_INLINE void add(T& sum, T& lost, T term) {
  const T more = term - lost, next = sum + more;
  lost = (next - sum) - more;
  sum = next;
}

// out[i, 0 .. lanes - 1] += sum over the tile's positions of dy[position, i] x[position, lane]; rows of out lie ldo apart.
template <int M, int N>
FASTFF_INLINE void accumulate(const Shape& s, const Tile& t, const float* dy, const float* x, Sums out, int64_t ldo,
                              int64_t lanes) {
  constexpr int64_t wide = N * kLanes;
  const int64_t width = padded_columns(s, t.columns) * wide, height = padded_rows(s, t.rows) * width,
                step = s.stride * wide;
  Vector sum[M][N] = {};
  for (int64_t b = 0; b < t.images; ++b) {
    for (int64_t r = 0; r < t.rows; ++r) {
      const float* at = x + b * height + r * s.stride * width;
      for (int64_t q = 0; q < t.columns; ++q, at += step, dy += M) {
        Vector right[N];
        FASTFF_UNROLL for (int j = 0; j < N; ++j) right[j] = read(at + j * kLanes);
        FASTFF_UNROLL for (int i = 0; i < M; ++i) {
          FASTFF_UNROLL for (int j = 0; j < N; ++j) sum[i][j] += dy[i] * right[j];
        }
      }
    }
  }
  FASTFF_UNROLL for (int i = 0; i < M; ++i) {
    const Sums row = out.at(i * ldo);
    if (lanes == wide && row.first) {
      FASTFF_UNROLL for (int j = 0; j < N; ++j) write(row.sum + j * kLanes, sum[i][j]);
    } else if (lanes == wide) {
      FASTFF_UNROLL for (int j = 0; j < N; ++j) {
        Vector total = read(row.sum + j * kLanes), lost = read(row.lost + j * kLanes);
        add(total, lost, sum[i][j]);
        write(row.sum + j * kLanes, total);
        write(row.lost + j * kLanes, lost);
      }
    } else {
      float some[wide];
      FASTFF_UNROLL for (int j = 0; j < N; ++j) write(some + j * kLanes, sum[i][j]);
      for (int64_t l = 0; l < lanes; ++l)
        if (row.first)
          row.sum[l] = some[l];
        else
          add(row.sum[l], row.lost[l], some[l]);
    }
  }
}

// accumulate<rows, N> for 1 <= rows <= M.
template <int M, int N>
FASTFF_INLINE void accumulate_rows(int64_t rows, const Shape& s, const Tile& t, const float* dy, const float* x,
                                   Sums out, int64_t ldo, int64_t lanes) {
  if constexpr (M > 1) {
    if (rows < M) return accumulate_rows<M - 1, N>(rows, s, t, dy, x, out, ldo, lanes);
  }
  accumulate<M, N>(s, t, dy, x, out, ldo, lanes);
}

// All taps and all of D for one panel: sums [D, k, k, C] from channel c on.
template <int N>
void accumulate_panel(const Shape& s, const Tile& t, const float* blocks, const float* panel, int64_t c, Sums sums) {
  const int64_t positions = t.images * t.rows * t.columns, lanes = std::min(N * kLanes, s.C - c), ldo = s.k * s.k * s.C;
  for (int64_t d = 0; d < s.D; d += kRows) {
    const float* dy = blocks + d * positions;
    for (int64_t u = 0; u < s.k; ++u) {
      for (int64_t v = 0; v < s.k; ++v) {
        const float* x = panel + (u * padded_columns(s, t.columns) + v) * N * kLanes;
        const Sums out = sums.at(d * ldo + (u * s.k + v) * s.C + c);
        accumulate_rows<kRows, N>(std::min(kRows, s.D - d), s, t, dy, x, out, ldo, lanes);
      }
    }
  }
}

template <int N>
void panel_of(const Shape& s, const Tile& t, const float* x, const float* blocks, int64_t c, float* panel, Sums sums) {
  pack_x<N>(s, t, x, c, panel);
  accumulate_panel<N>(s, t, blocks, panel, c, sums);
}

// x [B, C, H, W], grad [B, D, P, Q] float32 on the CPU, not empty -> dL/dweight [D, C, k, k], channels_last; other layouts are copied into it.
Tensor convolution_weight_gradient_native(Tensor grad, Tensor x, int64_t kernel, int64_t stride, int64_t padding) {
  grad = with_layout(grad, true), x = with_layout(x, true);
  const Shape s{x.size(0),    x.size(2),    x.size(3), x.size(1), grad.size(2),
                grad.size(3), grad.size(1), kernel,    stride,    padding};
  const float *dy = floats(grad), *source = floats(x);
  Tensor grad_weight = empty_strided(x, {s.D, s.C, s.k, s.k}, {s.k * s.k * s.C, 1, s.k * s.C, s.C});
  float* const dw = writable(grad_weight);
  const int64_t size = s.D * s.k * s.k * s.C, wide = vectors(s, 0) * kLanes, panels = (s.C + wide - 1) / wide;
  // A tile's sums go into dW once. dW in the cache: a panel that fits the L1 cache. Else more positions to a tile.
  const bool small = size <= (1 << 18);
  const int64_t most = small ? vec::kChunk : 4 * vec::kChunk, columns = std::min(s.Q, most);
  int64_t rows = std::clamp<int64_t>(most / s.Q, 1, s.P);
  while (small && rows > 1 && padded_rows(s, rows) * padded_columns(s, columns) * wide > kCache / 4) --rows;
  const int64_t images = rows < s.P || columns < s.Q ? 1 : std::clamp<int64_t>(most / (s.P * s.Q), 1, s.B);
  const int64_t groups = std::clamp<int64_t>((1 << 22) / size, 1, std::min<int64_t>(16, (s.B + images - 1) / images));
  const int64_t shares = groups >= 8 ? 1 : std::min(panels, (8 + groups - 1) / groups);  // tasks of a group, by panels
  const bool single = (s.B + groups - 1) / groups <= images && rows == s.P && columns == s.Q;  // tile of each group
  Buffer<float> partial((groups - 1) * size), lost(single ? 0 : groups * size, 0.0f);
  parallel_for(0, groups * shares, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> blocks(images * rows * columns * s.D),
        panel(images * padded_rows(s, rows) * padded_columns(s, columns) * wide);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / shares, share = task % shares;
      float* const sum = group ? partial.data() + (group - 1) * size : dw;
      Sums own{sum, single ? sum : lost.data() + group * size, true};
      const int64_t last = (group + 1) * s.B / groups;
      for (int64_t image = group * s.B / groups; image < last; image += images) {
        for (int64_t first = 0; first < s.P; first += rows) {
          for (int64_t left = 0; left < s.Q; left += columns) {
            const Tile t{image, std::min(images, last - image), first, std::min(rows, s.P - first),
                         left,  std::min(columns, s.Q - left)};
            pack_dy(s, t, dy, blocks.data());
            for (int64_t i = share * panels / shares; i < (share + 1) * panels / shares; ++i) {
              const int64_t c = i * wide;
              (vectors(s, c) == 2 ? panel_of<2> : panel_of<1>)(s, t, source, blocks.data(), c, panel.data(), own);
            }
            own.first = false;
          }
        }
      }
    }
  });
  parallel_for(0, size, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t group = 1; group < groups; ++group)
      vec::add(dw + begin, partial.data() + (group - 1) * size + begin, end - begin);
  });
  return grad_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastff, m) {
  m.def("convolution_weight_gradient_native(Tensor grad, Tensor x, int kernel, int stride, int padding) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastff, CPU, m) {
  m.impl("convolution_weight_gradient_native", TORCH_BOX(&convolution_weight_gradient_native));
}
