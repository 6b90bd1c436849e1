// What matrix products alone take from sm_90a: clusters, copies of tiles, wgmma with both operands in shared
// memory, and transposing stores, each a thin name over its instruction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/sm90.cuh"

namespace bbk {

// --- clusters

// Arrives at a barrier of another CTA of the cluster. It orders no writes beyond the CTA, which would cost a
// fence of the whole GPU: such an arrival says that reads are over.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t remote) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}

// Every thread of the cluster waits for every other; what publish_barriers() published is visible after it.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same, and what a thread wrote to any of the CTAs is visible after it.
__device__ __forceinline__ void cluster_barrier_with_writes() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address of this CTA's shared `address` in the CTA `rank` of the cluster.
__device__ __forceinline__ uint32_t remote_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

__device__ __forceinline__ void store_remote(uint32_t remote, const float* values) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "f"(values[0]),
               "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
}

// --- the copy engine

__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ uint64_t evict_last_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void load_tile(uint32_t target, const CUtensorMap* map, int x, int y,
                                          uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "l"(policy)
      : "memory");
}

// The same address and barrier in every CTA of `cta_mask` get the tile.
__device__ __forceinline__ void load_tile_multicast(uint32_t target, const CUtensorMap* map, int x, int y,
                                                    uint32_t barrier, uint16_t cta_mask, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(target),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(cta_mask), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void load_tile_4d(uint32_t target, const CUtensorMap* map, int x, int y, int z,
                                             int w, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(target),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier), "l"(policy)
      : "memory");
}

// Into every CTA of `cta_mask`; kMulticast false: into this one, and the mask says nothing.
template <bool kMulticast>
__device__ __forceinline__ void load_tile_5d(uint32_t target, const CUtensorMap* map, int x, int y, int z,
                                             int w, int v, uint32_t barrier, uint16_t cta_mask,
                                             uint64_t policy) {
  if constexpr (kMulticast) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
        ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8, %9;" ::"r"(target),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v), "r"(barrier), "h"(cta_mask), "l"(policy)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(target),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(v), "r"(barrier), "l"(policy)
        : "memory");
  }
}

// --- wgmma

#define BBK_F8(d, i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define BBK_F32(d, i) BBK_F8(d, i), BBK_F8(d, i + 8), BBK_F8(d, i + 16), BBK_F8(d, i + 24)
#define BBK_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define BBK_R1 BBK_R0 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define BBK_R2 BBK_R1 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BBK_R4                                                                                        \
  BBK_R2                                                                                              \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, "                                                                                             \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BBK_R6                                                                                        \
  BBK_R4                                                                                              \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, " \
  "%83, "                                                                                             \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define BBK_R8                                                                                           \
  BBK_R6                                                                                                 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
  "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// d[64 rows of a, kN rows of b] (+)= a b^T over 16 elements of K, by one warpgroup. d[4 j + i] of a thread is
// row 16 * warp + lane / 4 + 8 * (i / 2), column 8 j + 2 * (lane % 4) + i % 2.
template <typename T, int kN>
struct Wgmma;

#define BBK_WGMMA(T, TYPE, N, COUNT, REGISTERS, OPERANDS, A, B, ACCUMULATE)                                 \
  template <>                                                                                               \
  struct Wgmma<T, N> {                                                                                      \
    __device__ static __forceinline__ void run(float (&d)[COUNT], uint64_t a, uint64_t b, int accumulate) { \
      asm volatile(                                                                                         \
          "{\n"                                                                                             \
          ".reg .pred p;\n"                                                                                 \
          "setp.ne.b32 p, " ACCUMULATE                                                                      \
          ", 0;\n"                                                                                          \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS "}, " A ", " B     \
          ", p, 1, 1, 0, 0;\n"                                                                              \
          "}\n"                                                                                             \
          : OPERANDS                                                                                        \
          : "l"(a), "l"(b), "r"(accumulate));                                                               \
    }                                                                                                       \
  };
#define BBK_OPERANDS_16 BBK_F8(d, 0)
#define BBK_OPERANDS_32 BBK_F8(d, 0), BBK_F8(d, 8)
#define BBK_OPERANDS_64 BBK_F32(d, 0)
#define BBK_OPERANDS_128 BBK_F32(d, 0), BBK_F32(d, 32)
#define BBK_OPERANDS_192 BBK_F32(d, 0), BBK_F32(d, 32), BBK_F32(d, 64)
#define BBK_OPERANDS_256 BBK_F32(d, 0), BBK_F32(d, 32), BBK_F32(d, 64), BBK_F32(d, 96)
#define BBK_WGMMA_SIZES(T, TYPE)                                             \
  BBK_WGMMA(T, TYPE, 16, 8, BBK_R0, BBK_OPERANDS_16, "%8", "%9", "%10")      \
  BBK_WGMMA(T, TYPE, 32, 16, BBK_R1, BBK_OPERANDS_32, "%16", "%17", "%18")   \
  BBK_WGMMA(T, TYPE, 64, 32, BBK_R2, BBK_OPERANDS_64, "%32", "%33", "%34")   \
  BBK_WGMMA(T, TYPE, 128, 64, BBK_R4, BBK_OPERANDS_128, "%64", "%65", "%66") \
  BBK_WGMMA(T, TYPE, 192, 96, BBK_R6, BBK_OPERANDS_192, "%96", "%97", "%98") \
  BBK_WGMMA(T, TYPE, 256, 128, BBK_R8, BBK_OPERANDS_256, "%128", "%129", "%130")

BBK_WGMMA_SIZES(__nv_bfloat16, "bf16")
BBK_WGMMA_SIZES(__half, "f16")

#undef BBK_WGMMA_SIZES
#undef BBK_WGMMA
#undef BBK_F8
#undef BBK_F32
#undef BBK_R0
#undef BBK_R1
#undef BBK_R2
#undef BBK_R4
#undef BBK_R6
#undef BBK_R8
#undef BBK_OPERANDS_16
#undef BBK_OPERANDS_32
#undef BBK_OPERANDS_64
#undef BBK_OPERANDS_128
#undef BBK_OPERANDS_192
#undef BBK_OPERANDS_256

// Stores 8x8 matrices of 16-bit elements transposed: lanes 8 m .. 8 m + 7 hold the addresses of matrix m's
// columns.
__device__ __forceinline__ void store_two_matrices_transposed(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b)
               : "memory");
}

__device__ __forceinline__ void store_four_matrices_transposed(uint32_t address, uint32_t a, uint32_t b,
                                                               uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

}  // namespace bbk
