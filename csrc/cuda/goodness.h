// A whole local step on the goodness of a projection, each sample read once from device memory; formulas: fastff/reference.py.
//
//   load          x of a sample into shared memory, where it stays until its gradient takes its place
//   first sweep   a = x W^T by tiles of 16 positions; sums of a^2 for g, mean and squares for layer norm
//   loss          g of all blocks of the sample (a cluster), cross-entropy, d = softmax(u) - q; all else in dL/dg is one factor for the batch
//   second sweep  by slabs of 8 tiles: a again, e = d a; dL/dW += e^T x, kept in registers over all samples of the block; normalized x;
//                 dL/dx = factor e W over x in shared memory, from where it is written
//
// A bias is the weight of one more channel, which is 1 everywhere. Products are of 16-bit numbers (x's type; weight and e are rounded to it) and
// added in float32. There are no atomics: the same input gives the same bits on the same device, whose size decides in how many parts dL/dW is added.
//
// On a CPU tests/cuda_host/warp.h comes before this file, in place of csrc/cuda/warp.h.
#pragma once

#include <cmath>

#include "step.h"
#ifdef __CUDACC__
#include "warp.h"
#endif

DEVICE float warp_sum(float value) {
  UNROLL for (int lanes = WARP / 2; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
  return value;
}
DEVICE float warp_max(float value) {
  UNROLL for (int lanes = WARP / 2; lanes > 0; lanes /= 2) value = fmaxf(value, shuffle_xor(value, lanes));
  return value;
}

// How many of `total` positions are in part i, if each part has `each`.
DEVICE int share(int i, int each, int total) { return min(max(total - i * each, 0), each); }

DEVICE float tau_of(const StepArguments& s) { return s.tau * (s.learned_tau ? *s.learned_tau : 1.0f); }
DEVICE float scale_of(const StepArguments& s) { return s.scale * (s.grad_scale ? *s.grad_scale : 1.0f); }
DEVICE float factor_of_gradients(const StepArguments& s) { return scale_of(s) * tau_of(s) * 2.0f / s.P; }

struct Moments {
  float mean, squares;  // squares: of the differences from the mean, added up
};

// One block. T: BFloat16 or Float16; KT: classes / 16. A thread's place in the products is that of mma: row lane / 4 and, of the 16-bit numbers
// that lie next to each other, the pair lane % 4.
template <typename T, int KT>
class GoodnessStep {
  static constexpr int CLASSES = KT * TILE, AT_ONCE = KT < 2 ? KT : 2, PIECES = GROUPS / KT, CHUNK = 2;

  const StepArguments& s;
  const Layout& at = s.at;
  char* const memory = shared_memory();
  const int thread = thread_index(), warp = thread / WARP, lane = thread % WARP;
  const int tiles = s.division.tiles, samples = s.division.samples, blocks = s.division.blocks;
  const int rank = block_index() % blocks, units = s.C / 8;                      // 16-byte units of a position
  const int start = rank * tiles * TILE, count = share(rank, tiles* TILE, s.P);  // positions of a sample here
  const float factor = factor_of_gradients(s);
  float grad_weight[PIECES][KT][2][4] = {};  // of channels 16 (warp + 8 i) .. + 15

  DEVICE char* row(int i) const { return memory + i * at.pitch; }
  DEVICE char* weight_row(int k) const { return memory + at.weight + k * at.pitch; }
  DEVICE char* e_row(int i) const { return memory + at.e + i * at.class_pitch; }
  template <typename U = float>
  DEVICE U* numbers(int offset) const {
    return reinterpret_cast<U*>(memory + offset);
  }
  DEVICE int positions(int tile) const { return share(tile % tiles, TILE, count); }
  DEVICE int64_t element(int sample, int position) const {
    return (static_cast<int64_t>(sample) * s.P + start + position) * s.C;
  }

  DEVICE void load_weight() {
    const int pairs = at.channels / 2;
    ONE_BY_ONE for (int i = thread; i < CLASSES * pairs; i += THREADS) {
      const int k = i / pairs, c = i % pairs * 2;
      float w[2] = {0, 0};
      if (k < s.K && c < s.C) w[0] = s.weight[k * s.C + c], w[1] = s.weight[k * s.C + c + 1];
      if (k < s.K && c == s.C && s.bias) w[0] = s.bias[k];
      *reinterpret_cast<uint32_t*>(weight_row(k) + c * 2) = T::pack(w[0], w[1]);
    }
  }

  DEVICE void load_samples(int first) {
    const int rows = tiles * TILE, all = at.channels / 8;
    ONE_BY_ONE for (int i = thread; i < samples * rows * all; i += THREADS) {
      const int r = i / all, unit = i % all, sample = first + r / rows, position = r % rows;
      const bool here = sample < s.B && position < count;
      char* const to = row(r) + unit * 16;
      if (unit == units && s.bias) {
        *reinterpret_cast<uint4*>(to) = uint4{T::pack(here ? 1.0f : 0.0f, 0), 0, 0, 0};
      } else {
        const bool data = here && unit < units;
        copy_async(to, static_cast<const uint16_t*>(s.x) + (data ? element(sample, position) + unit * 8 : 0), data);
      }
    }
    wait_for_copies();
    block_barrier();
  }

  // a of a tile and 16 AT_ONCE classes from class 16 k0 on.
  DEVICE void products(int tile, int k0, float (&a)[2 * AT_ONCE][4]) const {
    const char* x = row(tile * TILE + lane % 16) + lane / 16 * 16;
    const char* w = weight_row(k0 * TILE + lane % 8 + lane / 16 * 8) + lane / 8 % 2 * 16;
    ONE_BY_ONE for (int c = 0; c < at.channels; c += TILE, x += TILE * 2, w += TILE * 2) {
      uint32_t left[4], right[4];
      load_matrices<false>(left, x);
      UNROLL for (int k = 0; k < AT_ONCE; ++k) {
        load_matrices<false>(right, w + k * TILE * at.pitch);
        T::mma(a[2 * k], left, right[0], right[1]);
        T::mma(a[2 * k + 1], left, right[2], right[3]);
      }
    }
  }

  DEVICE Moments moments(int tile) const {
    const int n = positions(tile) * units;
    float sum = 0, squares = 0;
    ONE_BY_ONE for (int i = lane; i < n; i += WARP) {
      const uint4 x = *reinterpret_cast<const uint4*>(row(tile * TILE + i / units) + i % units * 16);
      UNROLL for (const uint32_t pair : {x.x, x.y, x.z, x.w}) sum += T::unpack(pair).x + T::unpack(pair).y;
    }
    const float mean = n ? warp_sum(sum) / (n * 8) : 0.0f;
    ONE_BY_ONE for (int i = lane; i < n; i += WARP) {
      const uint4 x = *reinterpret_cast<const uint4*>(row(tile * TILE + i / units) + i % units * 16);
      UNROLL for (const uint32_t pair : {x.x, x.y, x.z, x.w}) {
        const float low = T::unpack(pair).x - mean, high = T::unpack(pair).y - mean;
        squares += low * low + high * high;
      }
    }
    return {mean, warp_sum(squares)};
  }

  // The moments of `total` positions of which part(i) are those of share(i, each, total).
  template <typename F>
  DEVICE Moments joined(int parts, int each, int total, const F& part) const {
    float sum = 0, squares = 0;
    ONE_BY_ONE for (int i = lane; i < parts; i += WARP) sum += share(i, each, total) * part(i).mean;
    const float mean = warp_sum(sum) / max(total, 1);
    ONE_BY_ONE for (int i = lane; i < parts; i += WARP) {
      const Moments m = part(i);
      squares += m.squares + share(i, each, total) * s.C * (m.mean - mean) * (m.mean - mean);
    }
    return {mean, warp_sum(squares)};
  }

  // Sums of a^2 and moments of this block's positions.
  DEVICE void first_sweep() {
    float* const squares = numbers(at.e);
    ONE_BY_ONE for (int tile = warp; tile < samples * tiles; tile += WARPS) {
      ONE_BY_ONE for (int k0 = 0; k0 < KT; k0 += AT_ONCE) {
        float a[2 * AT_ONCE][4] = {};
        products(tile, k0, a);
        UNROLL for (int j = 0; j < 2 * AT_ONCE; ++j) UNROLL for (int i = 0; i < 2; ++i) {
          float sum = a[j][i] * a[j][i] + a[j][i + 2] * a[j][i + 2];
          UNROLL for (int lanes = 4; lanes < WARP; lanes *= 2) sum += shuffle_xor(sum, lanes);
          if (lane < 4) squares[tile * CLASSES + k0 * TILE + j * 8 + lane * 2 + i] = sum;
        }
      }
      if (s.normalized) {
        const Moments m = moments(tile);
        if (lane == 0) numbers<Moments>(at.tiles)[tile] = m;
      }
    }
    block_barrier();
    ONE_BY_ONE for (int i = thread; i < samples * CLASSES; i += THREADS) {
      const float* of_tile = squares + i / CLASSES * tiles * CLASSES + i % CLASSES;
      float sum = 0;
      ONE_BY_ONE for (int t = 0; t < tiles; ++t) sum += of_tile[t * CLASSES];
      numbers(at.goodness)[i] = sum;
    }
    ONE_BY_ONE for (int i = warp; s.normalized && i < samples; i += WARPS) {
      const Moments* const of_tile = numbers<Moments>(at.tiles) + i * tiles;
      const Moments m = joined(tiles, TILE, count, [&](int t) { return of_tile[t]; });
      if (lane == 0) numbers<Moments>(at.statistics)[2 * i] = m;
    }
  }

  // Loss of one sample, by one warp, from sums of all blocks; leaves d in shared memory.
  DEVICE void loss(int i, int sample) {
    const float* const sums = numbers(at.goodness) + i * CLASSES;
    float* const d = numbers(at.gradient) + i * CLASSES;
    const int64_t hit = s.target[sample];
    const float tau = tau_of(s);
    const auto logit = [&](int k) { return tau * d[k] - (k == hit ? s.margin : 0.0f); };
    float top = -INFINITY, total = 0, sum = 0, product = 0;
    ONE_BY_ONE for (int k = lane; k < s.K; k += WARP) {
      float g = 0;
      ONE_BY_ONE for (int r = 0; r < blocks; ++r) g += load_peer(sums + k, r);
      d[k] = g / s.P;
      top = fmaxf(top, logit(k)), sum += logit(k);
      if (rank == 0) s.goodness[static_cast<int64_t>(sample) * s.K + k] = d[k];
    }
    top = warp_max(top), sum = warp_sum(sum);
    ONE_BY_ONE for (int k = lane; k < s.K; k += WARP) total += expf(logit(k) - top);
    total = warp_sum(total);
    warp_barrier();
    const float smooth = s.label_smoothing / s.K, at_hit = hit >= 0 && hit < s.K ? logit(hit) : NAN;
    warp_barrier();  // every lane has read d[hit] before it becomes the gradient
    ONE_BY_ONE for (int k = lane; k < s.K; k += WARP) {
      const float g = d[k];
      d[k] = expf(logit(k) - top) / total - ((k == hit ? 1.0f - s.label_smoothing : 0.0f) + smooth);
      product += d[k] * g;
    }
    product = warp_sum(product);
    if (rank == 0 && lane == 0) {
      numbers(at.grad_tau)[warp] += product;
      s.loss[sample] = top + logf(total) - (1.0f - s.label_smoothing) * at_hit - smooth * sum;
    }
  }

  // Losses and statistics of the samples from `first` on, between the barriers.
  DEVICE void losses(int first) {
    if (blocks > 1)
      cluster_arrive(), cluster_wait();
    else
      block_barrier();
    ONE_BY_ONE for (int i = warp; i < samples; i += WARPS) {
      float* const d = numbers(at.gradient) + i * CLASSES;
      ONE_BY_ONE for (int k = lane; k < CLASSES; k += WARP) d[k] = 0;
      warp_barrier();
      if (first + i < s.B) loss(i, first + i);
      const float* const mine = numbers(at.statistics) + 4 * i;
      const Moments m = joined(blocks, tiles * TILE, s.P, [&](int r) {
        return s.normalized ? Moments{load_peer(mine, r), load_peer(mine + 1, r)} : Moments{0, 0};
      });
      const float squares = m.squares / (static_cast<float>(s.P) * s.C);
      if (lane == 0) numbers<Moments>(at.statistics)[2 * i + 1] = {m.mean, 1.0f / sqrtf(squares + s.eps)};
    }
    if (blocks > 1) cluster_arrive();  // its neighbours' numbers are read
    block_barrier();
  }

  // e = d a of a tile, into the warp's rows.
  DEVICE void scaled_products(int tile) const {
    const float* const d = numbers(at.gradient) + tile / tiles * CLASSES + lane % 4 * 2;
    ONE_BY_ONE for (int k0 = 0; k0 < KT; k0 += AT_ONCE) {
      float a[2 * AT_ONCE][4] = {};
      products(tile, k0, a);
      UNROLL for (int j = 0; j < 2 * AT_ONCE; ++j) {
        const int k = k0 * TILE + j * 8;
        UNROLL for (int i = 0; i < 2; ++i) {
          char* const e = e_row(warp * TILE + lane / 4 + 8 * i) + (k + lane % 4 * 2) * 2;
          *reinterpret_cast<uint32_t*>(e) = T::pack(a[j][2 * i] * d[k], a[j][2 * i + 1] * d[k + 1]);
        }
      }
    }
  }

  // dL/dW += e^T x over the slab from `slab` on, for this warp's channels.
  DEVICE void add_weight_gradient(int slab) {
    ONE_BY_ONE for (int tile = slab; tile < min(slab + WARPS, samples * tiles); ++tile) {
      UNROLL for (int k = 0; k < KT; ++k) {
        uint32_t left[4], right[4];
        load_matrices<true>(left,
                            e_row((tile - slab) * TILE + lane % 8 + lane / 16 * 8) + (k * TILE + lane / 8 % 2 * 8) * 2);
        UNROLL for (int i = 0; i < PIECES; ++i) {
          const int c = (warp + WARPS * i) * TILE;
          if (c >= at.channels) break;
          load_matrices<true>(right, row(tile * TILE + lane % 16) + (c + lane / 16 * 8) * 2);
          T::mma(grad_weight[i][k][0], left, right[0], right[1]);
          T::mma(grad_weight[i][k][1], left, right[2], right[3]);
        }
      }
    }
  }

  // A warp's tile of a result, from where it is computed for each 16-byte unit of the tile: 16 bytes a lane, neighbours next to each other.
  template <typename F>
  DEVICE void write(void* result, int sample, int tile, const F& unit) const {
    uint4* const to = reinterpret_cast<uint4*>(static_cast<uint16_t*>(result) + element(sample, tile % tiles * TILE));
    ONE_BY_ONE for (int i = lane; i < positions(tile) * units; i += WARP) to[i] =
        unit(*reinterpret_cast<const uint4*>(row(tile * TILE + i / units) + i % units * 16));
  }

  DEVICE void write_normalized(int sample, int tile) const {
    const Moments m = numbers<Moments>(at.statistics)[tile / tiles * 2 + 1];
    const auto normal = [&](uint32_t pair) {
      const float2 x = T::unpack(pair);
      return T::pack((x.x - m.mean) * m.squares, (x.y - m.mean) * m.squares);  // squares: here 1 / standard deviation
    };
    write(s.normalized, sample, tile,
          [&](uint4 x) { return uint4{normal(x.x), normal(x.y), normal(x.z), normal(x.w)}; });
  }

  // dL/dx of a tile, over x.
  DEVICE void write_gradient(int sample, int tile) const {
    ONE_BY_ONE for (int c0 = 0; c0 < at.channels; c0 += CHUNK * TILE) {
      float grad[2 * CHUNK][4] = {};
      UNROLL for (int k = 0; k < KT; ++k) {
        uint32_t left[4], right[4];
        load_matrices<false>(left, e_row(warp * TILE + lane % 16) + (k * TILE + lane / 16 * 8) * 2);
        UNROLL for (int j = 0; j < CHUNK; ++j) {
          const int c = c0 + j * TILE;
          if (c >= at.channels) break;
          load_matrices<true>(right, weight_row(k * TILE + lane % 16) + (c + lane / 16 * 8) * 2);
          T::mma(grad[2 * j], left, right[0], right[1]);
          T::mma(grad[2 * j + 1], left, right[2], right[3]);
        }
      }
      UNROLL for (int j = 0; j < 2 * CHUNK; ++j) {
        const int c = c0 + j * 8;
        if (c >= at.channels) break;
        UNROLL for (int i = 0; i < 2; ++i) *
            reinterpret_cast<uint32_t*>(row(tile * TILE + lane / 4 + 8 * i) + (c + lane % 4 * 2) * 2) =
            T::pack(grad[j][2 * i] * factor, grad[j][2 * i + 1] * factor);
      }
    }
    warp_barrier();
    write(s.grad_x, sample, tile, [](uint4 x) { return x; });
  }

  DEVICE void second_sweep(int first) {
    ONE_BY_ONE for (int slab = 0; slab < samples * tiles; slab += WARPS) {
      const int tile = slab + warp, sample = first + tile / tiles;
      if (tile < samples * tiles) scaled_products(tile);
      block_barrier();
      add_weight_gradient(slab);
      block_barrier();
      if (tile < samples * tiles && sample < s.B) {
        if (s.normalized) write_normalized(sample, tile);
        warp_barrier();
        if (s.grad_x) write_gradient(sample, tile);
      }
      warp_barrier();
    }
  }

  DEVICE void write_partial() {
    float* const to = s.partial + static_cast<int64_t>(block_index()) * (s.K * s.width + 1);
    UNROLL for (int k = 0; k < KT; ++k) UNROLL for (int j = 0; j < 2; ++j) {
      const int at_k = k * TILE + lane / 4 + 8 * j;
      if (at_k >= s.K) continue;
      UNROLL for (int i = 0; i < 4 * PIECES; ++i) {
        const int at_c = (warp + WARPS * (i / 4)) * TILE + i / 2 % 2 * 8 + lane % 4 * 2 + i % 2;
        if (at_c < s.width) to[at_k * s.width + at_c] = grad_weight[i / 4][k][i / 2 % 2][2 * j + i % 2];
      }
    }
    float sum = 0;
    ONE_BY_ONE for (int i = 0; i < WARPS; ++i) sum += numbers(at.grad_tau)[i];
    if (thread == 0) to[s.K * s.width] = sum;
  }

 public:
  DEVICE explicit GoodnessStep(const StepArguments& s) : s(s) {}

  DEVICE void run() {
    load_weight();
    if (thread < WARPS) numbers(at.grad_tau)[thread] = 0;
    const int group = block_index() / blocks, groups = block_count() / blocks;
    ONE_BY_ONE for (int first = group * samples; first < s.B; first += groups * samples) {
      load_samples(first);
      first_sweep();
      losses(first);
      second_sweep(first);
      if (blocks > 1) cluster_wait();  // from here on this block's numbers may change, or the block end
      block_barrier();
    }
    write_partial();
  }
};

// Gradients of the parameters: sums over the blocks, in one order. A block of threads has 32 columns.
DEVICE void add_partial(const StepArguments& s) {
  const int warp = thread_index() / WARP, lane = thread_index() % WARP, columns = s.K * s.width + 1;
  const int column = block_index() * WARP + lane;
  float* const sums = reinterpret_cast<float*>(shared_memory());
  float sum = 0;
  if (column < columns) {
    UNROLL_4 for (int part = warp; part < s.division.grid; part += WARPS) sum +=
        s.partial[static_cast<int64_t>(part) * columns + column];
  }
  sums[warp * WARP + lane] = sum;
  block_barrier();
  if (warp > 0 || column >= columns) return;
  for (int i = 1; i < WARPS; ++i) sum += sums[i * WARP + lane];
  const int k = column / s.width, c = column % s.width;
  if (column == columns - 1) {
    if (s.grad_tau) *s.grad_tau = scale_of(s) * s.tau * sum;
  } else if (c < s.C) {
    s.grad_weight[k * s.C + c] = factor_of_gradients(s) * sum;
  } else {
    s.grad_bias[k] = factor_of_gradients(s) * sum;
  }
}
