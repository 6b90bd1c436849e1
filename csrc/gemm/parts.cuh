// What the CTAs that split a sum along K send each other, counted by a barrier of the CTA that receives it:
// no fence of the whole GPU, as a cluster's barrier needs for such writes.
#pragma once

#include "gemm/kernel.cuh"

namespace bbk {

// Bytes that all others send to split `split`.
template <class S>
__device__ __forceinline__ uint32_t bytes_of_parts(int split) {
  constexpr int kPairs = S::kTokens / 16;
  const int pairs = (split + 1) * kPairs / S::kSplitK - split * kPairs / S::kSplitK;
  return (S::kSplitK - 1) * pairs * 2 * S::kGroups * 128 * 16;
}

// As send_parts; `barrier` expects what comes, in every CTA.
template <class S, int kPart = 0>
__device__ __forceinline__ void send_counted_parts(const float (&sums)[S::kTokens / 2], uint32_t parts,
                                                   uint32_t barrier, int split, int group) {
  if constexpr (kPart < S::kSplitK) {
    if (kPart != split) {
      const int slot = split < kPart ? split : split - 1;
      const uint32_t rank = cluster_rank<S>(blockIdx.x % S::kXMulticast, kPart, blockIdx.z);
      const uint32_t remote = remote_address(parts, rank) + slot * S::kPartBytes;
      const uint32_t remote_barrier = remote_address(barrier, rank);
      constexpr int kFirst = 2 * S::template kPartBegin<kPart>;
      constexpr int kCount = 2 * S::template kPartBegin<kPart + 1> - kFirst;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        store_remote_counted(remote + part_index<S>(group, j) * 16, &sums[4 * (kFirst + j)], remote_barrier);
      }
    }
    send_counted_parts<S, kPart + 1>(sums, parts, barrier, split, group);
  }
}

}  // namespace bbk
