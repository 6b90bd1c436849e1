// What attention alone takes from sm_90a: copies of boxes of the cache, and wgmma with its left operand in
// registers.
#pragma once

#include <type_traits>

#include "common/elements.cuh"
#include "common/sm90.cuh"

namespace bbk {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A box of the tensor to shared memory; its bytes count towards the barrier.
__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap* map, uint32_t barrier, int x0,
                                         int x1, int x2, int x3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
      "%5}], [%6];\n" ::"r"(target),
      "l"(map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(barrier)
      : "memory");
}

// The same for a box that nobody reads again: its place in L2 is given away first.
__device__ __forceinline__ void copy_box_once(uint32_t target, const CUtensorMap* map, uint32_t barrier,
                                              int x0, int x1, int x2, int x3) {
  asm volatile(
      "{\n"
      ".reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, "
      "{%2, %3, %4, %5}], [%6], policy;\n"
      "}\n" ::"r"(target),
      "l"(map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(barrier)
      : "memory");
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
