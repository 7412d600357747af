// A goodness step on a GPU: what the kernels of goodness.h are told, and how samples are divided among blocks of threads.
#pragma once

#include <cstdint>

constexpr int THREADS = 256, WARP = 32, WARPS = THREADS / WARP;
constexpr int TILE = 16;                // positions, channels or classes of a warp's products: mma's m16n8k16, twice n
constexpr int MOST_TILES = 64;          // of a block: their sums of squares then fit where e of 8 tiles comes later
constexpr int MOST_CLASSES = 8 * TILE;  // dL/dx of a tile is one chain of products over all classes
constexpr int GROUPS = 8;               // 16 x 16 pieces of dL/dW that a warp keeps, 8 registers of a thread each

// Where things lie in a block's shared memory, in bytes.
struct Layout {
  int channels;             // rounded up to 16, after one more that is 1 everywhere where there is a bias
  int classes;              // 16, 32, 64 or 128
  int pitch, class_pitch;   // of a row of x and weight, and of a row of e
  int weight, e, goodness;  // x lies at 0
  int gradient, tiles, statistics, grad_tau, bytes;
};

// Rows are an odd number of 16-byte units apart, so that the eight rows that ldmatrix reads at a time lie in different banks.
constexpr int pitch_of(int elements) { return 16 * ((elements / 8) | 1); }

// For so many samples in a block, of so many tiles each.
constexpr Layout layout_of(int samples, int tiles, int C, int K, bool bias) {
  Layout at{};
  at.channels = (C + bias + TILE - 1) / TILE * TILE;
  at.classes = TILE;
  while (at.classes < K) at.classes *= 2;
  at.pitch = pitch_of(at.channels), at.class_pitch = pitch_of(at.classes);
  at.weight = samples * tiles * TILE * at.pitch;
  at.e = at.weight + at.classes * at.pitch;
  at.goodness = at.e + (samples * tiles < WARPS ? samples * tiles : WARPS) * TILE * at.class_pitch;
  at.gradient = at.goodness + samples * at.classes * 4;
  at.tiles = at.gradient + samples * at.classes * 4;
  at.statistics = at.tiles + samples * tiles * 8;
  at.grad_tau = at.statistics + samples * 16;
  at.bytes = at.grad_tau + WARPS * 4;
  return at;
}

struct Device {
  int multiprocessors;
  int shared;     // bytes of shared memory that one block may have
  bool clusters;  // whether blocks can read each other's shared memory (compute capability 9.0 and later)
};

// How samples are divided. blocks: of a sample, one cluster; samples: at a time in a block; tiles: of a sample in a block; grid: blocks in all.
struct Division {
  int blocks, samples, tiles, grid;
};

// The division with the fewest blocks a sample of which two fit a multiprocessor, else one; all 0 where a sample fits nowhere.
constexpr Division division_of(int B, int P, int C, int K, bool bias, Device device) {
  const Layout one = layout_of(1, 1, C, K, bias);
  if (C % 8 != 0 || K > MOST_CLASSES || one.channels * one.classes > GROUPS * WARPS * TILE * TILE) return {};
  constexpr int RESERVED = 1024;  // bytes of shared memory that the system takes for each block
  for (int resident = 2; resident >= 1; --resident) {
    const int most = (device.shared + RESERVED) / resident - RESERVED;
    for (int blocks = 1; blocks <= (device.clusters ? 8 : 1); blocks *= 2) {
      const int tiles = ((P + TILE - 1) / TILE + blocks - 1) / blocks;
      if (tiles > MOST_TILES || layout_of(1, tiles, C, K, bias).bytes > most) continue;
      const int places =
          resident * device.multiprocessors / blocks > 0 ? resident * device.multiprocessors / blocks : 1;
      int samples = 1;  // several where one has fewer tiles than there are warps, unless other places then have none
      while (blocks == 1 && (samples + 1) * tiles <= WARPS && samples * places < B &&
             layout_of(samples + 1, tiles, C, K, bias).bytes <= most)
        ++samples;
      const int groups = (B + samples - 1) / samples;
      return {blocks, samples, tiles, blocks * (groups < places ? groups : places)};
    }
  }
  return {};
}

struct StepArguments {
  const void* x;              // [B, P, C] in bfloat16 or float16, as grad_x and normalized
  const float* weight;        // [K, C]
  const float* bias;          // [K] or null
  const int64_t* target;      // [B]
  const float* learned_tau;   // one number, or null
  const float* grad_scale;    // one number, or null
  void *grad_x, *normalized;  // or null
  float *loss, *goodness;     // [B], [B, K]
  float* partial;             // [grid, K width + 1]: sums over the samples of each block, from which these are made:
  float *grad_weight, *grad_bias, *grad_tau;  // [K, C], [K] or null, one number or null
  int B, P, C, K;
  int width;                                       // C, and one more where there is a bias
  float tau, margin, label_smoothing, scale, eps;  // scale: of the gradients, 1 / B for the mean
  bool half;                                       // float16
  Division division;
  Layout at;  // here, and not computed by each thread: the kernels have no registers to spare
};

// goodness.cu, or for tests a host's substitute of it. The result of `launch` is null, or what went wrong.
Device device_of(int index);
const char* launch(const StepArguments& step, int device);
