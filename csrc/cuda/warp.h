// What the kernels ask of a GPU: threads, barriers, tensor cores, shared memory of neighbours. tests/cuda_host/warp.h has the same for a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define UNROLL_4 _Pragma("unroll 4")
#define ONE_BY_ONE _Pragma("unroll 1")  // a loop whose turns, interleaved, would need more registers than there are

// On devices without clusters a sample has one block, and what follows on clusters is never called.
#if __CUDA_ARCH__ >= 900
#define FASTFF_CLUSTERS 1
#else
#define FASTFF_CLUSTERS 0
#endif

DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
DEVICE int block_count() { return static_cast<int>(gridDim.x); }
DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
DEVICE void block_barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }
DEVICE float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }

DEVICE uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

// Barrier of a cluster in two halves: what threads wrote before they arrive is there for those that have waited.
DEVICE void cluster_arrive() {
#if FASTFF_CLUSTERS
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
DEVICE void cluster_wait() {
#if FASTFF_CLUSTERS
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The number at the same place in the shared memory of the cluster's block `rank`.
DEVICE float load_peer(const float* at, int rank) {
  float value = *at;
#if FASTFF_CLUSTERS
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(at)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
#endif
  return value;
}

// 16 bytes from device to shared memory, zeros where `present` is false. They are there for the thread that has waited.
DEVICE void copy_async(void* to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(present ? 16 : 0)
               : "memory");
}
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit numbers, to whose 32 rows the lanes point in turn; each transposed on its way, or not.
template <bool transposed>
DEVICE void load_matrices(uint32_t (&m)[4], const void* row) {
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// bfloat16 and float16: pairs of them in a register, and d += a b on tensor cores with a [16, 16] and b [16, 8].
struct BFloat16 {
  static DEVICE float2 unpack(uint32_t pair) { return __bfloat1622float2(reinterpret_cast<__nv_bfloat162&>(pair)); }
  static DEVICE uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Float16 {
  static DEVICE float2 unpack(uint32_t pair) { return __half22float2(reinterpret_cast<__half2&>(pair)); }
  static DEVICE uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  static DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};
