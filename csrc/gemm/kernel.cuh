// out = x w^T for few tokens: the kernel. Rows of the weight are the rows of the tensor cores' tile and all
// tokens its columns, so the weight is read once from memory and small packs waste no arithmetic.
#pragma once

#include "common/launch.cuh"
#include "gemm/rotated.cuh"
#include "gemm/shape.cuh"
#include "layer/rows.cuh"

namespace bbk {

__device__ __forceinline__ float gated(float gate, float up) {
  return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

// What a thread's two rows become with an activation.
template <class S>
__device__ __forceinline__ float gated(float gate, float up) {
  using T = typename S::T;
  if constexpr (S::kRoundedGates) {
    return silu_mul<T>(to_float(from_float<T>(gate)), to_float(from_float<T>(up)));
  } else {
    return gated(gate, up);
  }
}

// Rounds the sums of a part of the tokens and writes them to `out`, through shared memory so that a token's
// neighbouring features leave together.
template <class S, int kPart>
__device__ __forceinline__ void write_out(const float (&sums)[S::kTokens / 2], unsigned char* staging,
                                          const GemmArgs& args, int first_row, int group) {
  using T = typename S::T;
  constexpr int kFirst = 2 * S::template kPartBegin<kPart>;
  constexpr int kCount = 2 * S::template kPartBegin<kPart + 1> - kFirst;
  const int thread = threadIdx.x % 128;
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int matrix = lane / 8;
  const T* bias = static_cast<const T*>(args.bias);

  float bias_low = 0.0f, bias_high = 0.0f;
  if (!S::kGated && bias != nullptr) {
    const int row = first_row + group * 64 + warp * 16 + lane / 4;
    if (row < args.out_features) bias_low = to_float(bias[row]);
    if (row + 8 < args.out_features) bias_high = to_float(bias[row + 8]);
  }
#pragma unroll
  for (int j = 0; j < kCount; j += 2) {
    const float* d = &sums[4 * (kFirst + j)];
    const int token = 8 * j + lane % 8;
    if constexpr (S::kGated) {
      const int column = warp * 8;
      const uint32_t address =
          shared_address(staging) + ((token + 8 * (matrix % 2)) * S::kStagingPitch + column) * 2;
      store_two_matrices_transposed(address, pack_pair<T>(gated<S>(d[0], d[2]), gated<S>(d[1], d[3])),
                                    pack_pair<T>(gated<S>(d[4], d[6]), gated<S>(d[5], d[7])));
    } else {
      const int column = warp * 16 + 8 * (matrix % 2);
      const uint32_t address =
          shared_address(staging) + ((token + 8 * (matrix / 2)) * S::kStagingPitch + column) * 2;
      store_four_matrices_transposed(address, pack_pair<T>(d[0] + bias_low, d[1] + bias_low),
                                     pack_pair<T>(d[2] + bias_high, d[3] + bias_high),
                                     pack_pair<T>(d[4] + bias_low, d[5] + bias_low),
                                     pack_pair<T>(d[6] + bias_high, d[7] + bias_high));
    }
  }
  named_barrier(2 + group, 128);
  constexpr int kVectors = S::kOutColumns / 8;
  const int first_column = (S::kGated ? first_row / 2 : first_row) + group * S::kOutColumns;
  const int share = S::kMulticast > 1 ? blockIdx.z : 0;
  const int end_token = min(args.num_tokens, (share + 1) * args.box_tokens);
  const int first_token = share * args.box_tokens + 8 * kFirst;
  T* out = static_cast<T*>(args.out);
#pragma unroll 4
  for (int i = thread; i < 8 * kCount * kVectors; i += 128) {
    const int token = i / kVectors;
    const int column = i % kVectors * 8;
    const int out_token = first_token + token;
    if (out_token < end_token && first_column + column < args.out_features) {
      *reinterpret_cast<uint4*>(out + out_token * args.out_row_stride + first_column + column) =
          *reinterpret_cast<const uint4*>(staging + (token * S::kStagingPitch + column) * 2);
    }
  }
}

// Where the CTA of these numbers stands in this one's cluster: `row_tile` among those that share tokens,
// `split` along K, `share` of the tokens.
template <class S>
__device__ __forceinline__ uint32_t cluster_rank(int row_tile, int split, int share) {
  return row_tile + S::kXMulticast * (split + S::kSplitK * share);
}

// Index of a warpgroup's vector of four sums in what one split sends to another.
template <class S>
__device__ __forceinline__ int part_index(int group, int vector) {
  return (group * 2 * S::kMaxPairs + vector) * 128 + threadIdx.x % 128;
}

// Bytes that all other CTAs send to split `split`.
template <class S>
__device__ __forceinline__ uint32_t bytes_of_parts(int split) {
  constexpr int kPairs = S::kTokens / 16;
  const int pairs = (split + 1) * kPairs / S::kSplitK - split * kPairs / S::kSplitK;
  return (S::kSplitK - 1) * pairs * 2 * S::kGroups * 128 * 16;
}

// Sends the sums over this CTA's stretch of K to the CTAs that finish their tokens, whose `barrier` counts
// what comes.
template <class S, int kPart = 0>
__device__ __forceinline__ void send_parts(const float (&sums)[S::kTokens / 2], uint32_t parts,
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
        store_remote(remote + part_index<S>(group, j) * 16, &sums[4 * (kFirst + j)], remote_barrier);
      }
    }
    send_parts<S, kPart + 1>(sums, parts, barrier, split, group);
  }
}

// Adds what the other CTAs sent, in the order of K, and writes the result; `rows`: see RotatedRows.
template <class S, int kPart = 0, class Args, class Rows>
__device__ __forceinline__ void finish_part(float (&sums)[S::kTokens / 2], const unsigned char* parts,
                                            unsigned char* staging, const Args& args, int split,
                                            int first_row, int group, Rows& rows) {
  if constexpr (kPart < S::kSplitK) {
    if (kPart == split) {
      constexpr int kFirst = 2 * S::template kPartBegin<kPart>;
      constexpr int kCount = 2 * S::template kPartBegin<kPart + 1> - kFirst;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        float* d = &sums[4 * (kFirst + j)];
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int other = 0; other < S::kSplitK; ++other) {
          float4 part = make_float4(d[0], d[1], d[2], d[3]);
          if (other != kPart) {
            const int slot = other < kPart ? other : other - 1;
            part =
                *reinterpret_cast<const float4*>(parts + slot * S::kPartBytes + part_index<S>(group, j) * 16);
          }
          total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
        }
        d[0] = total.x, d[1] = total.y, d[2] = total.z, d[3] = total.w;
      }
      if constexpr (S::kRotated) {
        rows.template write<kPart>(sums, staging, args, group);
      } else {
        write_out<S, kPart>(sums, staging, args, first_row, group);
      }
    }
    finish_part<S, kPart + 1>(sums, parts, staging, args, split, first_row, group, rows);
  }
}

// Grid: (tiles of kRows along the weight's rows, kSplitK, kMulticast); clusters of (1, kSplitK, kMulticast).
template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                const typename S::Args args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  static_assert(S::kXMulticast == 1 && (S::kSplitK == 1 || S::kMulticast == 1), "a cluster has one reason");
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t stages = shared_address(shared);
  const uint32_t full = stages + S::kPipelineBytes;
  const uint32_t empty = full + 8 * S::kStages;
  [[maybe_unused]] const uint32_t parts_barrier = stages + S::kPartsBarrier;
  const int warpgroup = threadIdx.x / 128;
  const int split = S::kSplitK > 1 ? blockIdx.y : 0;
  const int share = S::kMulticast > 1 ? blockIdx.z : 0;
  const int first_row = blockIdx.x * S::kRows;
  const int k_begin = split * args.num_k_blocks / S::kSplitK;
  const int count = (split + 1) * args.num_k_blocks / S::kSplitK - k_begin;

  if (threadIdx.x == 0) {
    prefetch_map(&x_map);
    prefetch_map(&weight_map);
    for (int stage = 0; stage < S::kStages; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, S::kMulticast * S::kGroups * 4);
    }
    if constexpr (S::kSplitK > 1) {
      barrier_init(parts_barrier, 1);
      barrier_arrive_expecting(parts_barrier, bytes_of_parts<S>(split));
    }
    publish_barriers();
  }
  __syncthreads();
  if constexpr (S::kSplitK * S::kMulticast > 1) cluster_barrier();
  allow_successors();

  const uint64_t read_once = evict_first_policy();
  const uint64_t keep = evict_last_policy();
  const auto fetch_weight = [&](int i) {
    const int stage = i % S::kStages;
    const uint32_t barrier = full + 8 * stage;
    barrier_arrive_expecting(barrier, S::kWeightBytes + args.box_tokens * S::kBlockK * 2);
    const uint32_t target = stages + stage * S::kStageBytes;
    const int k = (k_begin + i) * S::kBlockK;
    if constexpr (S::kRotated) {
      // As many first as second places of one head in each copy; a share is a part of the tile for all CTAs.
      constexpr int kRowsEach = S::kRows / S::kMulticast;
      const int eights = args.rope.head_dim / 16;
#pragma unroll
      for (int box = 0; box < kRowsEach / S::kHeadBoxRows; ++box) {
        const int row = share * kRowsEach + box * S::kHeadBoxRows;
        const int eight = (first_row + row) / 16;
        const int from[5] = {k, 0, 0, eight % eights, eight / eights};
        if constexpr (S::kMulticast > 1) {
          copy_box_multicast(target + row * S::kBlockK * 2, &weight_map, from, barrier,
                             (1 << S::kMulticast) - 1, read_once);
        } else {
          copy_box(target + row * S::kBlockK * 2, &weight_map, from, barrier, read_once);
        }
      }
    } else if constexpr (S::kGated) {
      copy_box(target, &weight_map, {k, 0, 0, first_row / 16}, barrier, read_once);
    } else if constexpr (S::kMulticast > 1) {
      // A part of the tile into all CTAs of the cluster.
      constexpr int kRowsEach = S::kRows / S::kMulticast;
      copy_box_multicast(target + share * kRowsEach * S::kBlockK * 2, &weight_map,
                         {k, first_row + share * kRowsEach}, barrier, (1 << S::kMulticast) - 1, read_once);
    } else {
      copy_box(target, &weight_map, {k, first_row}, barrier, read_once);
    }
  };
  const auto fetch_x = [&](int i) {
    const int stage = i % S::kStages;
    copy_box(stages + stage * S::kStageBytes + S::kWeightBytes, &x_map,
             {(k_begin + i) * S::kBlockK, share * args.box_tokens}, full + 8 * stage, keep);
  };
  const auto fetch_first = [&] {
    // A weight that nobody writes comes while the kernel before still runs.
    if (!args.static_weight) wait_for_predecessors();
    const int ahead = count < S::kStages ? count : S::kStages;
#pragma unroll 1
    for (int i = 0; i < ahead; ++i) fetch_weight(i);
    wait_for_predecessors();
#pragma unroll 1
    for (int i = 0; i < ahead; ++i) fetch_x(i);
  };
  // Waits until all that compute with it are done with what block i replaces.
  const auto fetch = [&](int i) {
    barrier_wait(empty + 8 * (i % S::kStages), (i / S::kStages + 1) & 1);
    fetch_weight(i);
    fetch_x(i);
  };

  if (warpgroup == S::kGroups) {
    give_registers<S::kProducerRegisters>();
    if (threadIdx.x == S::kGroups * 128) {
      fetch_first();
#pragma unroll 1
      for (int i = S::kStages; i < count; ++i) fetch(i);
      if constexpr (S::kMulticast > 1) {
        // The other CTA arrives at these barriers for the last time: they must still be there.
        for (int i = count < S::kStages ? 0 : count - S::kStages; i < count; ++i) {
          barrier_wait(empty + 8 * (i % S::kStages), (i / S::kStages) & 1);
        }
      }
    }
    __syncwarp();
    if constexpr (S::kSplitK > 1) cluster_barrier();
  } else {
    if constexpr (S::kProducer) {
      take_registers<S::kConsumerRegisters>();
    } else {
      if (threadIdx.x == 0) fetch_first();
      __syncwarp();
    }
    using Product = Wgmma<typename S::T, S::kTokens>;
    const int lane = threadIdx.x % 32;
    const auto release = [&](int i) {
      const uint32_t barrier = empty + 8 * (i % S::kStages);
      if constexpr (S::kMulticast > 1) {
        if (lane < S::kMulticast) barrier_arrive_remote(remote_address(barrier, lane));
      } else {
        if (lane == 0) barrier_arrive(barrier);
      }
    };
    [[maybe_unused]] std::conditional_t<S::kRotated, RotatedRows<S>, int> rows;
    if constexpr (S::kRotated) {
      wait_for_predecessors();  // the activations are waited for in any case
      rows.load(args, first_row, warpgroup);
    }
    float sums[S::kTokens / 2];
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int stage = i % S::kStages;
      barrier_wait(full + 8 * stage, (i / S::kStages) & 1);
      const uint32_t weight = stages + stage * S::kStageBytes + warpgroup * 64 * S::kBlockK * 2;
      const uint64_t a = matrix_descriptor(weight);
      const uint64_t b = matrix_descriptor(stages + stage * S::kStageBytes + S::kWeightBytes);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < S::kBlockK / Product::kK; ++k) {
        // Descriptors count in 16 bytes: 16 elements of K are 2.
        Product::run(sums, a + 2 * k, b + 2 * k, i > 0 || k > 0);
      }
      wgmma_commit();
      // Products of the block before are done: its stage may be filled again.
      wgmma_wait<1>();
      if (i > 0) {
        release(i - 1);
        if constexpr (!S::kProducer) {
          if (threadIdx.x == 0 && i - 1 + S::kStages < count) fetch(i - 1 + S::kStages);
          __syncwarp();
        }
      }
    }
    wgmma_wait<0>();
    if constexpr (S::kMulticast > 1) release(count - 1);
    wait_for_predecessors();
    unsigned char* staging = shared + S::kPartsBytes + warpgroup * S::kStagingBytes;
    if constexpr (S::kSplitK > 1) {
      __syncwarp();
      cluster_barrier();  // nobody reads a pipeline any more
      send_parts<S>(sums, stages, parts_barrier, split, warpgroup);
      barrier_wait(parts_barrier, 0);
      finish_part<S>(sums, shared, staging, args, split, first_row, warpgroup, rows);
    } else {
      named_barrier(1, S::kGroups * 128);  // no warpgroup reads the pipeline any more
      if constexpr (S::kRotated) {
        rows.write(sums, staging, args, warpgroup);
      } else {
        write_out<S, 0>(sums, staging, args, first_row, warpgroup);
      }
    }
  }
#endif
}

}  // namespace bbk
