// fastff::depthwise_native and depthwise_backward_native: depthwise convolution with 3 x 3 or 5 x 5 filters and its gradients, float32 on the CPU.
//
//   y[b, i, j, c]  = sum_uv w[u, v, c] x[b, i s + u - p, j s + v - p, c]
//   dw[u, v, c]    = sum_bij dy[b, i, j, c] x[b, i s + u - p, j s + v - p, c]
//   dx             one correlation of dy for each residue (i mod s, j mod s) of the input position, with the flipped filter taps that reach it
//
// A task is 16 channels of an image. In channels_last the blocks of 16 are one task, which works in place; contiguous images, and the channels
// that 16 leaves over, are copied to [H W, 16] in cache. Registers hold 4 positions by 16 channels of y, or nine or ten taps of dw by a vector
// of 8 (16 with AVX-512). At the edges positions are taken one by one, with the taps that meet the image. Sums over images are made by groups of
// images in order: the number of threads changes no bit. Measurements: docs/cpu.md.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "gemm.h"
#include "tensors.h"
#include "vec.h"

namespace {

using gemm::transpose;
using vec::kLanes;
using vec::read;
using vec::Vector;
using vec::write;
constexpr int64_t kPanel = 16;
constexpr int kVectors = kPanel / kLanes;

// 16 channels of an image: pixels `pitch` and rows `row` floats apart.
struct Plane {
  int64_t H, W, pitch, row;
};

// Filters of K x L taps [K, L, 16] over a plane; the output is a plane too.
struct Correlation {
  Plane in, out;
  int64_t K, L, stride, above, left;  // above, left: zeros before the first row and column
};

// Prefetches row i of an image while the row before it is worked on: 16 channels of many are too far apart for the hardware prefetcher.
void fetch(const Plane& plane, const float* image, int64_t i) {
  if (i < 0 || i >= plane.H) return;
  for (int64_t q = 0; q < plane.row; q += 64 / sizeof(float)) __builtin_prefetch(image + i * plane.row + q, 0, 2);
}

// What row i + 1 of the output meets of x and row i did not.
void fetch_next(const Correlation& f, const float* x, int64_t i) {
  for (int64_t u = f.K - f.stride; u < f.K; ++u) fetch(f.in, x, (i + 1) * f.stride - f.above + u);
}

// J outputs beside each other from taps u0 .. u1 - 1, v0 .. v1 - 1; x is where tap 0, 0 of the first would be.
template <int J>
FASTFF_INLINE void outputs(const Correlation& f, const float* x, const float* w, int64_t u0, int64_t u1, int64_t v0,
                           int64_t v1, float* y) {
  Vector sum[J][kVectors] = {};
  for (int64_t u = u0; u < u1; ++u) {
    for (int64_t v = v0; v < v1; ++v) {
      const float *tap = w + (u * f.L + v) * kPanel, *at = x + u * f.in.row + v * f.in.pitch;
      Vector weights[kVectors];
      FASTFF_UNROLL for (int h = 0; h < kVectors; ++h) weights[h] = read(tap + h * kLanes);
      FASTFF_UNROLL for (int j = 0; j < J; ++j) {
        FASTFF_UNROLL for (int h = 0; h < kVectors; ++h) sum[j][h] +=
            weights[h] * read(at + j * f.stride * f.in.pitch + h * kLanes);
      }
    }
  }
  FASTFF_UNROLL for (int j = 0; j < J; ++j) {
    FASTFF_UNROLL for (int h = 0; h < kVectors; ++h) write(y + j * f.out.pitch + h * kLanes, sum[j][h]);
  }
}

// Outputs of a row whose taps all meet the image.
int64_t first_inside(int64_t before, int64_t stride) { return (before + stride - 1) / stride; }
int64_t end_inside(int64_t before, int64_t size, int64_t taps, int64_t stride, int64_t outputs) {
  const int64_t room = size + before - taps;
  return room < 0 ? 0 : std::min(outputs, room / stride + 1);
}

// Row i of the output, `blocks` times 16 channels that lie beside each other; w [blocks, K, L, 16]. All channels of a few positions, then the next:
// the other way round reads and writes 64 bytes here and there (3 times as slow).
void correlate_row(const Correlation& f, const float* x, const float* w, int64_t i, int64_t blocks, float* y) {
  const int64_t u0 = std::max<int64_t>(0, f.above - i * f.stride), u1 = std::min(f.K, f.in.H + f.above - i * f.stride);
  const int64_t start = std::min(first_inside(f.left, f.stride), f.out.W),
                stop = end_inside(f.left, f.in.W, f.L, f.stride, f.out.W);
  const int64_t taps = f.K * f.L * kPanel;
  const float* base = x + (i * f.stride - f.above) * f.in.row - f.left * f.in.pitch;
  for (int64_t j = 0; j < f.out.W;) {
    const bool inside = j >= start && j + 4 <= stop;
    const int64_t v0 = std::max<int64_t>(0, f.left - j * f.stride), v1 = std::min(f.L, f.in.W + f.left - j * f.stride);
    const float* at = base + j * f.stride * f.in.pitch;
    float* target = y + i * f.out.row + j * f.out.pitch;
    for (int64_t block = 0; block < blocks; ++block, at += kPanel, target += kPanel)
      if (inside)
        outputs<4>(f, at, w + block * taps, u0, u1, 0, f.L, target);
      else
        outputs<1>(f, at, w + block * taps, u0, u1, v0, v1, target);
    j += inside ? 4 : 1;
  }
}

// What U rows of K taps meet: dw [U, K, 16] += of a vector of 16 channels, dy and x at the first position and at the first tap's pixel there.
// Positions start .. stop - 1 of from .. to - 1 meet all K taps, at the edges some are outside the image.
template <int K, int U>
FASTFF_INLINE void taps(const Correlation& f, const float* x, const float* dy, int64_t from, int64_t to, int64_t start,
                        int64_t stop, float* dw) {
  const int64_t step = f.stride * f.in.pitch;
  Vector sum[U][K];
  FASTFF_UNROLL for (int t = 0; t < U * K; ++t) sum[t / K][t % K] = read(dw + t * kPanel);
  const auto edge = [&](int64_t j) __attribute__((always_inline)) {
    const int64_t v0 = f.left - j * f.stride, v1 = f.in.W + f.left - j * f.stride;
    const Vector g = read(dy + j * f.out.pitch);
    FASTFF_UNROLL for (int v = 0; v < K; ++v) {
      if (v < v0 || v >= v1) continue;
      FASTFF_UNROLL for (int u = 0; u < U; ++u) sum[u][v] += g * read(x + j * step + u * f.in.row + v * f.in.pitch);
    }
  };
  for (int64_t j = from; j < start; ++j) edge(j);
  for (int64_t j = start; j < stop; ++j) {
    const Vector g = read(dy + j * f.out.pitch);
    FASTFF_UNROLL for (int u = 0; u < U; ++u) {
      FASTFF_UNROLL for (int v = 0; v < K; ++v) sum[u][v] += g * read(x + j * step + u * f.in.row + v * f.in.pitch);
    }
  }
  for (int64_t j = std::max(start, stop); j < to; ++j) edge(j);
  FASTFF_UNROLL for (int t = 0; t < U * K; ++t) write(dw + t * kPanel, sum[t / K][t % K]);
}

// dw [blocks, K, K, 16] += what positions from .. to - 1 of row i of dy meet: U rows of taps at a time, single ones where the image ends.
template <int K, int U>
FASTFF_INLINE void taps_of_row(const Correlation& f, const float* x, const float* dy, int64_t i, int64_t from,
                               int64_t to, int64_t blocks, float* dw) {
  const int64_t u0 = std::max<int64_t>(0, f.above - i * f.stride),
                u1 = std::min<int64_t>(K, f.in.H + f.above - i * f.stride);
  const int64_t start = std::clamp(first_inside(f.left, f.stride), from, to),
                stop = std::min(end_inside(f.left, f.in.W, K, f.stride, f.out.W), to);
  for (int64_t half = 0; half < blocks * kPanel; half += kLanes) {
    const float *g = dy + i * f.out.row + half,
                *corner = x + (i * f.stride - f.above) * f.in.row - f.left * f.in.pitch + half;
    float* target = dw + half / kPanel * K * K * kPanel + half % kPanel;
    for (int64_t u = u0; u < u1;) {
      if (u + U <= u1) {
        taps<K, U>(f, corner + u * f.in.row, g, from, to, start, stop, target + u * K * kPanel);
        u += U;
      } else {
        taps<K, 1>(f, corner + u * f.in.row, g, from, to, start, stop, target + u * K * kPanel);
        ++u;
      }
    }
  }
}

// The same for a whole row, some positions at a time.
void add_taps(const Correlation& f, const float* x, const float* dy, int64_t i, int64_t blocks, vec::LineSum& dw) {
  for (int64_t from = 0; from < f.out.W; from += vec::kChunk) {
    const int64_t to = std::min(from + vec::kChunk, f.out.W);
    f.K == 3 ? taps_of_row<3, 3>(f, x, dy, i, from, to, blocks, dw.data())
             : taps_of_row<5, 2>(f, x, dy, i, from, to, blocks, dw.data());
    dw.added(to - from);
  }
}

// Images [B, C, H, W] of one of the two layouts, and how tasks see them: `wide` blocks of 16 channels together in place, or single blocks in a copy.
struct Images {
  int64_t C, H, W;
  bool channels_last;

  int64_t wide() const { return channels_last ? C / kPanel : 0; }
  int64_t tasks() const { return (wide() ? 1 : 0) + (C + kPanel - 1) / kPanel - wide(); }
  bool in_place(int64_t task) const { return wide() && task == 0; }
  int64_t channel(int64_t task) const { return in_place(task) ? 0 : (wide() + task - (wide() ? 1 : 0)) * kPanel; }
  int64_t blocks(int64_t task) const { return in_place(task) ? wide() : 1; }
  Plane plane(int64_t task) const { return in_place(task) ? Plane{H, W, C, W * C} : Plane{H, W, kPanel, W * kPanel}; }

  int64_t at(int64_t b, int64_t c) const { return channels_last ? b * H * W * C + c : (b * C + c) * H * W; }

  // Image b of a task: in place, or copied.
  const float* load(const float* x, int64_t b, int64_t task, Buffer<float>& copy) const {
    const int64_t c = channel(task), lanes = std::min(kPanel, C - c);
    const float* from = x + at(b, c);
    if (in_place(task)) return from;
    copy.resize(H * W * kPanel);
    if (!channels_last)
      transpose(lanes, H * W, from, H * W, copy.data(), kPanel);
    else
      for (int64_t q = 0; q < H * W; ++q) std::copy_n(from + q * C, lanes, copy.data() + q * kPanel);
    return copy.data();
  }
  float* target(float* y, int64_t b, int64_t task, Buffer<float>& copy) const {
    if (in_place(task)) return y + at(b, 0);
    copy.resize(H * W * kPanel);
    return copy.data();
  }
  void store(const Buffer<float>& copy, float* y, int64_t b, int64_t task) const {
    if (in_place(task)) return;
    const int64_t c = channel(task), lanes = std::min(kPanel, C - c);
    float* to = y + at(b, c);
    if (channels_last) {
      for (int64_t q = 0; q < H * W; ++q) std::copy_n(copy.data() + q * kPanel, lanes, to + q * C);
    } else if (lanes == kPanel) {
      transpose(H * W, kPanel, copy.data(), kPanel, to, H * W);
    } else {
      for (int64_t l = 0; l < lanes; ++l)
        for (int64_t q = 0; q < H * W; ++q) to[l * H * W + q] = copy[q * kPanel + l];
    }
  }
};

// Taps u = first_u + t s, v likewise, of filters [C, 1, k, k] as [blocks, K, L, 16]; flipped: in reverse order.
Buffer<float> pack(const float* weight, int64_t C, int64_t k, int64_t K, int64_t L, int64_t first_u, int64_t first_v,
                   int64_t s, bool flipped) {
  const int64_t blocks = (C + kPanel - 1) / kPanel;
  Buffer<float> w(blocks * K * L * kPanel, 0.0f);
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t u = 0; u < K; ++u) {
      for (int64_t v = 0; v < L; ++v) {
        const int64_t t = flipped ? (K - 1 - u) * L + (L - 1 - v) : u * L + v;
        w[((c / kPanel) * K * L + t) * kPanel + c % kPanel] =
            weight[c * k * k + (first_u + u * s) * k + first_v + v * s];
      }
    }
  }
  return w;
}

// x [B, C, H, W] and weight [C, 1, k, k], k = 3 or 5, float32 on the CPU, not empty, as fastff/ops/depthwise.py sees to.
Tensor depthwise_native(Tensor x, Tensor weight, int64_t stride, int64_t padding) {
  x = dense(x), weight = torch::stable::contiguous(weight);
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), k = weight.size(2);
  const int64_t P = (H + 2 * padding - k) / stride + 1, Q = (W + 2 * padding - k) / stride + 1;
  const Images in{C, H, W, is_channels_last(x)}, out{C, P, Q, in.channels_last};
  Tensor y = in.channels_last ? empty_strided(x, {B, C, P, Q}, {P * Q * C, 1, Q * C, C}) : empty(x, {B, C, P, Q});
  const Buffer<float> w = pack(floats(weight), C, k, k, k, 0, 0, 1, false);
  const int64_t tasks = in.tasks();
  parallel_for(0, B * tasks, std::max<int64_t>(1, 32768 / (H * W * C)), [&](int64_t begin, int64_t end) {
    Buffer<float> copy, result;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tasks, task = i % tasks, block = in.channel(task) / kPanel;
      const Correlation f{in.plane(task), out.plane(task), k, k, stride, padding, padding};
      const float* from = in.load(floats(x), b, task, copy);
      float* to = out.target(writable(y), b, task, result);
      for (int64_t r = 0; r < P; ++r) {
        if (in.in_place(task)) fetch_next(f, from, r);
        correlate_row(f, from, w.data() + block * k * k * kPanel, r, in.blocks(task), to);
      }
      out.store(result, writable(y), b, task);
    }
  });
  return y;
}

// One of the s^2 correlations that make dx: of rows h = place_h + s a and columns w = place_w + s b.
struct Part {
  int64_t place_h, place_w, K, L, above, left;
  Buffer<float> w;
};

std::vector<Part> parts_of(const float* weight, int64_t C, int64_t k, int64_t stride, int64_t padding) {
  std::vector<Part> parts;
  for (int64_t h = 0; h < stride; ++h) {
    for (int64_t w = 0; w < stride; ++w) {
      const int64_t u = (h + padding) % stride, v = (w + padding) % stride;  // the first taps that meet this place
      const int64_t K = u < k ? (k - 1 - u) / stride + 1 : 0, L = v < k ? (k - 1 - v) / stride + 1 : 0;
      Part part{h, w, K, L, K - 1 - (h + padding - u) / stride, L - 1 - (w + padding - v) / stride, {}};
      part.w = pack(weight, C, k, K, L, u, v, stride, true);
      parts.push_back(std::move(part));
    }
  }
  return parts;
}

// grad [B, C, P, Q] -> (dL/dx as x, or empty; dL/dweight [C, 1, k, k]).
std::tuple<Tensor, Tensor> depthwise_backward_native(Tensor grad, Tensor x, Tensor weight, int64_t stride,
                                                     int64_t padding, bool need_x) {
  x = dense(x), weight = torch::stable::contiguous(weight);
  const bool channels_last = is_channels_last(x);
  grad = with_layout(grad, channels_last);
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), k = weight.size(2), P = grad.size(2),
                Q = grad.size(3);
  const int64_t blocks = (C + kPanel - 1) / kPanel, size = blocks * k * k * kPanel;
  const Images in{C, H, W, channels_last}, out{C, P, Q, channels_last};
  Tensor dx = need_x ? empty_like(x, channels_last) : absent(x), dw = empty(x, {C, 1, k, k});
  const std::vector<Part> parts = need_x ? parts_of(floats(weight), C, k, stride, padding) : std::vector<Part>();
  const int64_t groups = std::min<int64_t>(B, 8), tasks = in.tasks();  // whatever the number of threads
  Buffer<float> partial(groups * size, 0.0f);
  parallel_for(0, groups * tasks, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> copy, dy, result;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / tasks, task = i % tasks, block = in.channel(task) / kPanel;
      vec::LineSum sum(in.blocks(task) * k * k * kPanel);
      for (int64_t b = group * B / groups; b < (group + 1) * B / groups; ++b) {
        const Correlation f{in.plane(task), out.plane(task), k, k, stride, padding, padding};
        const float *from = in.load(floats(x), b, task, copy), *g = out.load(floats(grad), b, task, dy);
        for (int64_t r = 0; r < P; ++r) {
          if (in.in_place(task)) {
            fetch_next(f, from, r);
            fetch(f.out, g, r + 1);
          }
          add_taps(f, from, g, r, in.blocks(task), sum);
        }
        if (!need_x) continue;
        float* to = in.target(writable(dx), b, task, result);
        for (const Part& part : parts) {
          const Plane whole = f.in;
          const Plane some{(H - part.place_h + stride - 1) / stride, (W - part.place_w + stride - 1) / stride,
                           whole.pitch * stride, whole.row * stride};
          if (some.H <= 0 || some.W <= 0) continue;
          const Correlation c{f.out, some, part.K, part.L, 1, part.above, part.left};
          float* corner = to + part.place_h * whole.row + part.place_w * whole.pitch;
          const float* w = part.w.data() + block * part.K * part.L * kPanel;
          for (int64_t r = 0; r < some.H; ++r) correlate_row(c, g, w, r, in.blocks(task), corner);
        }
        in.store(result, writable(dx), b, task);
      }
      float* const own = partial.data() + group * size + block * k * k * kPanel;
      sum.take([=](int64_t c, float total) { own[c] = total; });
    }
  });
  parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t t = 0; t < k * k; ++t) {
        double total[kPanel] = {};
        for (int64_t group = 0; group < groups; ++group)
          for (int64_t l = 0; l < kPanel; ++l) total[l] += partial[group * size + (block * k * k + t) * kPanel + l];
        for (int64_t l = 0; l < std::min(kPanel, C - block * kPanel); ++l)
          writable(dw)[(block * kPanel + l) * k * k + t] = static_cast<float>(total[l]);
      }
    }
  });
  return {dx, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastff, m) {
  m.def("depthwise_native(Tensor x, Tensor weight, int stride, int padding) -> Tensor");
  m.def(
      "depthwise_backward_native(Tensor grad, Tensor x, Tensor weight, int stride, int padding, bool need_x) -> "
      "(Tensor dx, Tensor dw)");
}
STABLE_TORCH_LIBRARY_IMPL(fastff, CPU, m) {
  m.impl("depthwise_native", TORCH_BOX(&depthwise_native));
  m.impl("depthwise_backward_native", TORCH_BOX(&depthwise_backward_native));
}
