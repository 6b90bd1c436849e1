// wgmma, the matrix products of sm_90a: d[64, N] (+)= a[64, K] b[K, N] by the four warps of a warpgroup, 16
// rows each, with sums in fp32. Only code under __CUDA_ARCH_FEAT_SM90_ALL may call it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace bbk {

// Bytes of a row in shared memory under the 128-byte swizzle: 64 elements of 16 bits.
constexpr int kSwizzledRowBytes = 128;

// A matrix in shared memory with the 128-byte swizzle. Groups of eight rows follow each other; `slice_bytes`
// lead from one slice of 128 bytes to the next, for matrices whose rows are wider than one. Descriptors count
// in 16 bytes.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, int slice_bytes = 16) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  constexpr uint64_t kGroupBytes = 8 * kSwizzledRowBytes;
  return kSwizzle128 | (kGroupBytes >> 4) << 32 | static_cast<uint64_t>(slice_bytes >> 4) << 16 |
         (address & 0x3ffff) >> 4;
}

// The warpgroup of this thread, in a form that the compiler knows to be the same for a warp: descriptors that
// depend on it are computed once for all its threads.
__device__ __forceinline__ int warpgroup_of_thread() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 128), 0);
}

// Between registers written by ordinary instructions and products that use them.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kPending committed groups are still on their way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving arithmetic on sums across a wait or a start of products.
template <int kCount>
__device__ __forceinline__ void keep_in_registers(float (&sums)[kCount]) {
#pragma unroll
  for (float& sum : sums) asm volatile("" : "+f"(sum)::"memory");
}

// Sums by tiles of 8 columns as a product takes them.
template <int kTiles>
__device__ __forceinline__ float (&flat(float (&sums)[kTiles][4]))[4 * kTiles] {
  return reinterpret_cast<float (&)[4 * kTiles]>(sums);
}

// One instruction, for elements of T and N columns of b. `Product::run(d, a, b, accumulate)` starts it,
// without `accumulate` d is overwritten. d[4 j + i] of a thread is row 16 * warp + lane / 4 + 8 * (i / 2),
// column 8 j + 2 * (lane % 4) + i % 2.
//
// a: a descriptor of rows of K contiguous elements, or registers: a thread's four, each with two or four
// neighbouring elements of a row (mma.sync's layout). b: a descriptor of columns of K contiguous elements, or
// of rows of N with kTransposedB, which 16-bit elements alone can have.
template <typename T, int kN, bool kTransposedB = false>
struct Wgmma;

// The sums as operands: eight of them, and what goes for N columns.
#define BBK_SUMS_8(i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define BBK_SUMS_32(i) BBK_SUMS_8(i), BBK_SUMS_8(i + 8), BBK_SUMS_8(i + 16), BBK_SUMS_8(i + 24)
#define BBK_SUMS_N16 BBK_SUMS_8(0)
#define BBK_SUMS_N32 BBK_SUMS_8(0), BBK_SUMS_8(8)
#define BBK_SUMS_N64 BBK_SUMS_32(0)
#define BBK_SUMS_N128 BBK_SUMS_32(0), BBK_SUMS_32(32)
#define BBK_SUMS_N160 BBK_SUMS_N128, BBK_SUMS_8(64), BBK_SUMS_8(72)
#define BBK_SUMS_N192 BBK_SUMS_N128, BBK_SUMS_32(64)
#define BBK_SUMS_N256 BBK_SUMS_N192, BBK_SUMS_32(96)

// Their names in the instruction.
#define BBK_NAMES_N16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define BBK_NAMES_N32 BBK_NAMES_N16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define BBK_NAMES_N64 \
  BBK_NAMES_N32       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BBK_NAMES_N128                                                               \
  BBK_NAMES_N64                                                                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BBK_NAMES_N160 \
  BBK_NAMES_N128       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define BBK_NAMES_N192                                                               \
  BBK_NAMES_N128                                                                     \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define BBK_NAMES_N256                                                                           \
  BBK_NAMES_N192                                                                                 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// N columns; O0 ... O6 are the numbers of the operands behind the N / 2 sums.
#define BBK_WGMMA_N(T, TYPE, K, CHOICES, N, O0, O1, O2, O3, O4, O5, O6)                                      \
  template <bool kTransposedB>                                                                               \
  struct Wgmma<T, N, kTransposedB> {                                                                         \
    static constexpr int kK = K;                                                                             \
    static_assert(!kTransposedB || sizeof(T) == 2, "elements of 8 bits have no transposed operand");         \
    __device__ static __forceinline__ void run(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #O2                                                  \
                   ", 0;\n"                                                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k" #K ".f32." TYPE "." TYPE " {" BBK_NAMES_N##N   \
                   "}, %" #O0 ", %" #O1 ", p, 1, 1" CHOICES(", 0", O3) ";\n}\n"                              \
                   : BBK_SUMS_N##N                                                                           \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)),                                      \
                     "n"(static_cast<int>(kTransposedB)));                                                   \
    }                                                                                                        \
    __device__ static __forceinline__ void run(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,        \
                                               bool accumulate) {                                            \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #O5                                                  \
                   ", 0;\n"                                                                                  \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k" #K ".f32." TYPE "." TYPE " {" BBK_NAMES_N##N   \
                   "}, {%" #O0 ", %" #O1 ", %" #O2 ", %" #O3 "}, %" #O4 ", p, 1, 1" CHOICES("", O6) ";\n}\n" \
                   : BBK_SUMS_N##N                                                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),  \
                     "n"(static_cast<int>(kTransposedB)));                                                   \
    }                                                                                                        \
  };
#define BBK_WGMMA(T, TYPE, K, CHOICES)                                 \
  BBK_WGMMA_N(T, TYPE, K, CHOICES, 16, 8, 9, 10, 11, 12, 13, 14)       \
  BBK_WGMMA_N(T, TYPE, K, CHOICES, 32, 16, 17, 18, 19, 20, 21, 22)     \
  BBK_WGMMA_N(T, TYPE, K, CHOICES, 64, 32, 33, 34, 35, 36, 37, 38)     \
  BBK_WGMMA_N(T, TYPE, K, CHOICES, 128, 64, 65, 66, 67, 68, 69, 70)    \
  BBK_WGMMA_N(T, TYPE, K, CHOICES, 160, 80, 81, 82, 83, 84, 85, 86)    \
  BBK_WGMMA_N(T, TYPE, K, CHOICES, 192, 96, 97, 98, 99, 100, 101, 102) \
  BBK_WGMMA_N(T, TYPE, K, CHOICES, 256, 128, 129, 130, 131, 132, 133, 134)

// How the instruction says which operands are transposed, a and b or b alone; that of 8-bit elements
// (BBK_WGMMA_FIXED) does not say it.
#define BBK_WGMMA_TRANSPOSES(OF_A, OF_B) OF_A ", %" #OF_B
#define BBK_WGMMA_FIXED(OF_A, OF_B)

BBK_WGMMA(__nv_bfloat16, "bf16", 16, BBK_WGMMA_TRANSPOSES)
BBK_WGMMA(__half, "f16", 16, BBK_WGMMA_TRANSPOSES)
BBK_WGMMA(__nv_fp8_e4m3, "e4m3", 32, BBK_WGMMA_FIXED)

#undef BBK_SUMS_8
#undef BBK_SUMS_32
#undef BBK_SUMS_N16
#undef BBK_SUMS_N32
#undef BBK_SUMS_N64
#undef BBK_SUMS_N128
#undef BBK_SUMS_N160
#undef BBK_SUMS_N192
#undef BBK_SUMS_N256
#undef BBK_NAMES_N16
#undef BBK_NAMES_N32
#undef BBK_NAMES_N64
#undef BBK_NAMES_N128
#undef BBK_NAMES_N160
#undef BBK_NAMES_N192
#undef BBK_NAMES_N256
#undef BBK_WGMMA_N
#undef BBK_WGMMA
#undef BBK_WGMMA_TRANSPOSES
#undef BBK_WGMMA_FIXED

}  // namespace bbk
