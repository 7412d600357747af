// layout_native(Tensor x, bool channels_last) -> Tensor: a copy of x [B, C, H, W], which is dense in one of the two layouts, in the other.
//
// PyTorch's copy_ goes through memory in the order of the result, reads in strides, and takes several times as long.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "gemm.h"
#include "tensors.h"

namespace {

constexpr int64_t kTile = 64, kChannels = 8;  // positions and channels at a time

Tensor layout_native(const Tensor& x, bool channels_last) {
  STD_TORCH_CHECK(x.dim() == 4 && has_layout(x, !channels_last), "layout_native: x must be [B, C, H, W], ",
                  channels_last ? "contiguous" : "channels_last");
  const Tensor y = empty_like(x, channels_last);
  const int64_t B = x.size(0), C = x.size(1), P = x.size(2) * x.size(3);
  const float* const from = floats(x);
  float* const to = writable(y);
  const int64_t tiles = (P + kTile - 1) / kTile;
  parallel_for(0, B * tiles, std::max<int64_t>(1, 32768 / (C * kTile)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / tiles * C * P, p = i % tiles * kTile, n = std::min(kTile, P - p);
      if (channels_last)
        gemm::transpose(C, n, from + sample + p, P, to + sample + p * C, C);
      else  // few channels at a time: their lines in y often are a power of two apart, which is one set of the cache
        for (int64_t c = 0; c < C; c += kChannels)
          gemm::transpose(n, std::min(kChannels, C - c), from + sample + p * C + c, C, to + sample + c * P + p, P);
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastff, m) { m.def("layout_native(Tensor x, bool channels_last) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(fastff, CPU, m) { m.impl("layout_native", TORCH_BOX(&layout_native)); }
