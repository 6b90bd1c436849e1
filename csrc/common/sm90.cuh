// Instructions of sm_90 that kernels build on: barriers in shared memory, clusters of CTAs, the copy engine
// (TMA), registers traded between warpgroups and transposing stores, each a thin name over its instruction.
// common/wgmma.cuh has the products. Only code under __CUDA_ARCH_FEAT_SM90_ALL may call them: other
// architectures cannot assemble them.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace bbk {

// Barriers in shared memory

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the cluster and to the copy engine.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The phase ends only once that many bytes have been copied, too.
__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Waits for the `threads` threads that use the named barrier `id`.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Clusters

// Arrives at a barrier of another CTA of the cluster. It orders no writes beyond the CTA, which would cost a
// fence of the whole GPU: such an arrival says that reads are over.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t remote) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
}

// Every thread of the cluster waits for every other; what publish_barriers() published is visible after it.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address of this CTA's shared `address` in the CTA `rank` of the cluster.
__device__ __forceinline__ uint32_t remote_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// Stores to another CTA's shared memory. The 16 bytes count towards a barrier there: a wait for it sees them.
// A cluster's barrier that orders such writes would be a fence of the whole GPU.
__device__ __forceinline__ void store_remote(uint32_t remote, const float* values, uint32_t remote_barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          remote),
      "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "r"(remote_barrier)
      : "memory");
}

// The copy engine

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Makes what this thread stored to shared memory visible to wgmma and the copy engine.
__device__ __forceinline__ void publish_stores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// How L2 treats what a copy reads: gives its place away first, as for bytes that nobody reads again, or last.
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

// copy_box brings a box of the tensor, as large as the map says, from the coordinates `at` (innermost first)
// to shared memory; its bytes count towards the barrier. `policy` tells L2 how to treat what is read.
// copy_box_multicast brings it to every CTA of `cta_mask`, to the same address and barrier there.
#define BBK_COPY(OPTIONS, DIMS, AT, BEHIND, ...)                                                       \
  asm volatile("cp.async.bulk.tensor." DIMS                                                            \
               "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes" OPTIONS " [%0], [%1, {" AT \
               "}], [%2]" BEHIND ";" ::"r"(target),                                                    \
               "l"(map), "r"(barrier), __VA_ARGS__                                                     \
               : "memory")
#define BBK_AT_2 "%3, %4"
#define BBK_AT_4 "%3, %4, %5, %6"
#define BBK_AT_5 "%3, %4, %5, %6, %7"
#define BBK_PLACE_2 "r"(at[0]), "r"(at[1])
#define BBK_PLACE_4 BBK_PLACE_2, "r"(at[2]), "r"(at[3])
#define BBK_PLACE_5 BBK_PLACE_4, "r"(at[4])

template <int kDims>
__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap* map, const int (&at)[kDims],
                                         uint32_t barrier) {
  static_assert(kDims == 2 || kDims == 4 || kDims == 5);
  if constexpr (kDims == 2) BBK_COPY("", "2", BBK_AT_2, "", BBK_PLACE_2);
  if constexpr (kDims == 4) BBK_COPY("", "4", BBK_AT_4, "", BBK_PLACE_4);
  if constexpr (kDims == 5) BBK_COPY("", "5", BBK_AT_5, "", BBK_PLACE_5);
}

template <int kDims>
__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap* map, const int (&at)[kDims],
                                         uint32_t barrier, uint64_t policy) {
  static_assert(kDims == 2 || kDims == 4 || kDims == 5);
#define BBK_HINT ".L2::cache_hint"
  if constexpr (kDims == 2) BBK_COPY(BBK_HINT, "2", BBK_AT_2, ", %5", BBK_PLACE_2, "l"(policy));
  if constexpr (kDims == 4) BBK_COPY(BBK_HINT, "4", BBK_AT_4, ", %7", BBK_PLACE_4, "l"(policy));
  if constexpr (kDims == 5) BBK_COPY(BBK_HINT, "5", BBK_AT_5, ", %8", BBK_PLACE_5, "l"(policy));
#undef BBK_HINT
}

template <int kDims>
__device__ __forceinline__ void copy_box_multicast(uint32_t target, const CUtensorMap* map,
                                                   const int (&at)[kDims], uint32_t barrier,
                                                   uint16_t cta_mask) {
  static_assert(kDims == 2 || kDims == 4 || kDims == 5);
#define BBK_CAST ".multicast::cluster"
  if constexpr (kDims == 2) BBK_COPY(BBK_CAST, "2", BBK_AT_2, ", %5", BBK_PLACE_2, "h"(cta_mask));
  if constexpr (kDims == 4) BBK_COPY(BBK_CAST, "4", BBK_AT_4, ", %7", BBK_PLACE_4, "h"(cta_mask));
  if constexpr (kDims == 5) BBK_COPY(BBK_CAST, "5", BBK_AT_5, ", %8", BBK_PLACE_5, "h"(cta_mask));
#undef BBK_CAST
}

template <int kDims>
__device__ __forceinline__ void copy_box_multicast(uint32_t target, const CUtensorMap* map,
                                                   const int (&at)[kDims], uint32_t barrier,
                                                   uint16_t cta_mask, uint64_t policy) {
  static_assert(kDims == 2 || kDims == 4 || kDims == 5);
#define BBK_BOTH ".multicast::cluster.L2::cache_hint"
#define BBK_OPERANDS "h"(cta_mask), "l"(policy)
  if constexpr (kDims == 2) BBK_COPY(BBK_BOTH, "2", BBK_AT_2, ", %5, %6", BBK_PLACE_2, BBK_OPERANDS);
  if constexpr (kDims == 4) BBK_COPY(BBK_BOTH, "4", BBK_AT_4, ", %7, %8", BBK_PLACE_4, BBK_OPERANDS);
  if constexpr (kDims == 5) BBK_COPY(BBK_BOTH, "5", BBK_AT_5, ", %8, %9", BBK_PLACE_5, BBK_OPERANDS);
#undef BBK_BOTH
#undef BBK_OPERANDS
}

// Brings a box from shared memory to the tensor; what lies outside of it is left out. What this thread
// started so since its last commit_boxes() is a group.
__device__ __forceinline__ void store_box(const CUtensorMap* map, const int (&at)[2], uint32_t source) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
               "r"(at[0]), "r"(at[1]), "r"(source)
               : "memory");
}

__device__ __forceinline__ void commit_boxes() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until shared memory has been read by all groups of this thread.
__device__ __forceinline__ void wait_until_boxes_are_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

#undef BBK_COPY
#undef BBK_AT_2
#undef BBK_AT_4
#undef BBK_AT_5
#undef BBK_PLACE_2
#undef BBK_PLACE_4
#undef BBK_PLACE_5

// Registers: warpgroups trade them, and all warps of one call the same of these

template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Stores

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
