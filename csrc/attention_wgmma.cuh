// What attention on sm_90a takes from the hardware: the tensor copy engine with its barriers, and wgmma.
#pragma once

#include <cuda.h>

#include "common.cuh"

namespace bbk {

// Bytes of a row in shared memory under the 128-byte swizzle: 64 elements.
constexpr int kSwizzledRowBytes = 128;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra wait;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A box of the tensor to shared memory; its bytes count towards the barrier.
__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap* map, uint32_t barrier, int x0,
                                         int x1, int x2, int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
      "%5}], [%6];\n" ::"r"(target),
      "l"(map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// Warpgroups trade registers: all of its warps call one of these.
template <int kNumber>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kNumber));
}

template <int kNumber>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kNumber));
}

// Between registers written by ordinary instructions and products that use them.
__device__ __forceinline__ void start_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }

__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving arithmetic on accumulators across a wait or a start of products.
template <int kTiles>
__device__ __forceinline__ void keep_in_registers(float (&c)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[n][i])::"memory");
  }
}

// Makes what this thread stored to shared memory visible to wgmma and the copy engine.
__device__ __forceinline__ void publish_stores() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// A matrix in shared memory with the 128-byte swizzle. Groups of eight rows follow each other; `slice_bytes`
// lead from one 64-element slice to the next, for matrices whose columns are wider than one.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, int slice_bytes) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  constexpr uint64_t kGroupBytes = 8 * kSwizzledRowBytes;
  return kSwizzle128 | (kGroupBytes >> 4) << 32 | static_cast<uint64_t>(slice_bytes >> 4) << 16 |
         (address & 0x3ffff) >> 4;
}

#define BBK_REGISTERS_32                                                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BBK_REGISTERS_64                                                                    \
  BBK_REGISTERS_32                                                                          \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
  "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BBK_TILE(t) "+f"(c[t][0]), "+f"(c[t][1]), "+f"(c[t][2]), "+f"(c[t][3])
#define BBK_TILES_4(t) BBK_TILE(t), BBK_TILE(t + 1), BBK_TILE(t + 2), BBK_TILE(t + 3)
#define BBK_TILES_8(t) BBK_TILES_4(t), BBK_TILES_4(t + 4)
#define BBK_TILES_16(t) BBK_TILES_8(t), BBK_TILES_8(t + 8)
// The operands behind the accumulators count on from their number: a, b, accumulate, transposed.
#define BBK_WGMMA(SHAPE, TYPE, REGISTERS, A, B, ACCUMULATE, TRANSPOSED, TILES)                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\nwgmma.mma_async.sync.aligned." SHAPE \
               ".f32." TYPE "." TYPE " {" REGISTERS "}, {" A "}, " B ", p, 1, 1, " TRANSPOSED ";\n}\n"    \
               : TILES                                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),   \
                 "n"(static_cast<int>(kTransposed)))
#define BBK_WGMMA_64(TYPE) \
  BBK_WGMMA("m64n64k16", TYPE, BBK_REGISTERS_32, "%32, %33, %34, %35", "%36", "%37", "%38", BBK_TILES_8(0))
#define BBK_WGMMA_128(TYPE) \
  BBK_WGMMA("m64n128k16", TYPE, BBK_REGISTERS_64, "%64, %65, %66, %67", "%68", "%69", "%70", BBK_TILES_16(0))

// c[64, 8 * kTiles] = a[64, 16] b[16, 8 * kTiles], added to c if `accumulate`, by the four warps of a
// warpgroup, 16 rows each. b's columns are contiguous in memory, or its rows if kTransposed.
template <typename T, bool kTransposed, int kTiles>
__device__ __forceinline__ void multiply_warpgroup(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b,
                                                   bool accumulate) {
  static_assert(kTiles == 8 || kTiles == 16);
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kTiles == 8) BBK_WGMMA_64("f16");
    if constexpr (kTiles == 16) BBK_WGMMA_128("f16");
  } else {
    if constexpr (kTiles == 8) BBK_WGMMA_64("bf16");
    if constexpr (kTiles == 16) BBK_WGMMA_128("bf16");
  }
}

#undef BBK_REGISTERS_32
#undef BBK_REGISTERS_64
#undef BBK_TILE
#undef BBK_TILES_4
#undef BBK_TILES_8
#undef BBK_TILES_16
#undef BBK_WGMMA
#undef BBK_WGMMA_64
#undef BBK_WGMMA_128

#endif

}  // namespace bbk
