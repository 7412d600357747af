// What csrc/cuda/warp.h asks of a GPU, on a CPU: the threads of a cluster's blocks are fibres, which run one after another, each until it waits for
// others. What they do together (shuffles, ldmatrix, mma, barriers) they do when the last of them arrives, so that a barrier that is missing shows
// as a result that depends on their order, and one that not all threads reach as an error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cpu/common.h"

#define DEVICE inline
#define UNROLL
#define UNROLL_4
#define ONE_BY_ONE

using std::max;
using std::min;

struct float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace host {

constexpr int LANES = 32, STACK = 64 << 10, BEYOND = 64;  // 16-byte units behind shared memory, which nothing may write
constexpr uint32_t NOTHING = ~0u;                         // NaN

struct Barrier {
  int members, arrived = 0, turn = 0;

  int arrive() {
    const int mine = turn;
    if (++arrived == members) arrived = 0, ++turn;
    return mine;
  }
};

struct Warp {
  Barrier barrier{LANES};
  std::array<std::array<uint32_t, 8>, LANES> given[2];  // what its lanes bring: two, since some may be a turn ahead
};

struct Block {
  int index, count;
  Barrier* cluster;
  std::vector<Block>* neighbours;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<uint4> memory;
};

struct Fibre {
  Block* block;
  int thread;
  ucontext_t context{};
  std::unique_ptr<char[]> stack{new char[STACK]};
  Barrier* awaited = nullptr;  // and the turn that has to end
  int turn = 0, cluster_turn = 0, rounds = 0;
  bool done = false;
  std::vector<std::function<void()>> copies;  // asynchronous ones, made when they are waited for
};

inline Fibre* running;
inline ucontext_t scheduler;
inline const std::function<void()>* kernel;

inline void await(Barrier& barrier, int turn) {
  if (barrier.turn != turn) return;
  running->awaited = &barrier, running->turn = turn;
  swapcontext(&running->context, &scheduler);
}

inline Warp& warp() { return running->block->warps[running->thread / LANES]; }
inline int lane() { return running->thread % LANES; }

// What all lanes of the warp bring to this place of the program.
inline const std::array<std::array<uint32_t, 8>, LANES>& exchange(const std::array<uint32_t, 8>& mine) {
  auto& given = warp().given[running->rounds++ % 2];
  given[lane()] = mine;
  await(warp().barrier, warp().barrier.arrive());
  return given;
}

inline void enter() {
  (*kernel)();
  running->done = true;
  swapcontext(&running->context, &scheduler);
}

// Runs `body` in every thread of `grid` blocks. Shared memory begins as NaN; seed: of the order in which threads run.
inline void run(int grid, int cluster, int threads, int bytes, unsigned seed, const std::function<void()>& body) {
  kernel = &body;
  std::mt19937 random(seed);
  for (int first = 0; first < grid; first += cluster) {
    Barrier of_cluster{cluster * threads};
    std::vector<Block> blocks;
    for (int i = 0; i < cluster; ++i)
      blocks.push_back({first + i,
                        grid,
                        &of_cluster,
                        &blocks,
                        {threads},
                        std::vector<Warp>(threads / LANES),
                        std::vector<uint4>(bytes / 16 + BEYOND, uint4{NOTHING, NOTHING, NOTHING, NOTHING})});
    std::vector<Fibre> fibres(cluster * threads);
    for (int i = 0; i < cluster * threads; ++i) {
      Fibre& fibre = fibres[i];
      fibre.block = &blocks[i / threads], fibre.thread = i % threads;
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = fibre.stack.get(), fibre.context.uc_stack.ss_size = STACK;
      makecontext(&fibre.context, enter, 0);
    }
    std::vector<std::vector<Fibre*>> warps(fibres.size() / LANES);
    for (size_t i = 0; i < fibres.size(); ++i) warps[i / LANES].push_back(&fibres[i]);
    for (auto& lanes : warps) std::shuffle(lanes.begin(), lanes.end(), random);
    std::shuffle(warps.begin(), warps.end(), random);
    // The first warp that can go on does, and so gets as far ahead of the others as barriers let it.
    for (bool progress = true; progress;) {
      progress = false;
      for (size_t i = 0; i < warps.size() && !progress; ++i)
        for (Fibre* fibre : warps[i]) {
          if (fibre->done || (fibre->awaited && fibre->awaited->turn == fibre->turn)) continue;
          progress = true, running = fibre, fibre->awaited = nullptr;
          swapcontext(&scheduler, &fibre->context);
        }
    }
    const bool ended = std::all_of(fibres.begin(), fibres.end(), [](const Fibre& f) { return f.done; });
    STD_TORCH_CHECK(ended, "threads wait for a barrier that others do not reach");
    for (const Block& block : blocks) {
      const uint32_t* const words = reinterpret_cast<const uint32_t*>(block.memory.data());
      const bool kept =
          std::all_of(words + bytes / 4, words + block.memory.size() * 4, [](uint32_t w) { return w == NOTHING; });
      STD_TORCH_CHECK(kept, "a thread wrote behind the shared memory of its block");
    }
  }
}

}  // namespace host

inline int thread_index() { return host::running->thread; }
inline int block_index() { return host::running->block->index; }
inline int block_count() { return host::running->block->count; }
inline char* shared_memory() { return reinterpret_cast<char*>(host::running->block->memory.data()); }
inline void block_barrier() {
  host::Barrier& barrier = host::running->block->barrier;
  host::await(barrier, barrier.arrive());
}
inline void warp_barrier() { host::exchange({}); }
inline float shuffle_xor(float value, int lanes) {
  return float_of(host::exchange({bits_of(value)})[host::lane() ^ lanes][0]);
}

inline void cluster_arrive() { host::running->cluster_turn = host::running->block->cluster->arrive(); }
inline void cluster_wait() { host::await(*host::running->block->cluster, host::running->cluster_turn); }
inline float load_peer(const float* at, int rank) {
  host::Block& peer = (*host::running->block->neighbours)[rank];
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(at) - shared_memory() +
                                         reinterpret_cast<char*>(peer.memory.data()));
}

inline void copy_async(void* to, const void* from, bool present) {
  host::running->copies.push_back([=] { present ? std::memcpy(to, from, 16) : std::memset(to, 0, 16); });
}
inline void wait_for_copies() {
  for (const auto& copy : host::running->copies) copy();
  host::running->copies.clear();
}

template <bool transposed>
inline void load_matrices(uint32_t (&m)[4], const void* row) {
  std::array<uint32_t, 8> mine;
  std::memcpy(mine.data(), row, 16);
  const auto& given = host::exchange(mine);
  const int outer = host::lane() / 4, inner = host::lane() % 4 * 2;
  const auto at = [&](int matrix, int r, int c) { return given[8 * matrix + r][c / 2] >> (c % 2 * 16) & 0xffffu; };
  for (int i = 0; i < 4; ++i)
    m[i] = transposed ? at(i, inner, outer) | at(i, inner + 1, outer) << 16
                      : at(i, outer, inner) | at(i, outer, inner + 1) << 16;
}

template <typename Bits>
struct Narrow {
  static float2 unpack(uint32_t pair) {
    return {load<float>(Bits{static_cast<uint16_t>(pair)}), load<float>(Bits{static_cast<uint16_t>(pair >> 16)})};
  }
  static uint32_t pack(float low, float high) {
    Bits pair[2];
    store(&pair[0], low), store(&pair[1], high);
    return pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
  }
  static float element(uint32_t pair, int i) { return i ? unpack(pair).y : unpack(pair).x; }

  // a[row][k] lies in lane row % 8 * 4 + k % 8 / 2, number row / 8 + k / 8 * 2; b[k][column] in lane column * 4 + k % 8 / 2, number k / 8.
  static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto& given = host::exchange({a[0], a[1], a[2], a[3], b0, b1});
    for (int i = 0; i < 4; ++i) {
      const int row = host::lane() / 4 + i / 2 * 8, column = host::lane() % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k)
        d[i] += element(given[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2) *
                element(given[column * 4 + k % 8 / 2][4 + k / 8], k % 2);
    }
  }
};
using BFloat16 = Narrow<BFloat16Bits>;
using Float16 = Narrow<HalfBits>;
