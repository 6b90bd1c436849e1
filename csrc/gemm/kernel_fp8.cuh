// out = x w^T in e4m3 for few tokens: the kernel. Its tiles, its pipeline and what it writes are those of
// kernel.cuh: two neighbouring elements of 8 bits count as one of 16 wherever bytes are moved.
#pragma once

#include "gemm/kernel.cuh"
#include "gemm/stretches.cuh"

namespace bbk {

struct GemmFp8Args : GemmArgs {
  const float* x_scale;       // [num_tokens]
  const float* weight_scale;  // [rows of the weight]
  int up_distance;            // with an activation: rows of the weight from a gate to its up
};

struct RotatedGemmFp8Args : GemmFp8Args {
  RopeKvWriteParams rope;  // its q and caches are written instead of `out`
};

template <class S>
using Fp8Args = std::conditional_t<S::kRotated, RotatedGemmFp8Args, GemmFp8Args>;

// The scales of a thread's two rows; with an activation, of its gate and its up.
template <class S>
__device__ __forceinline__ float2 scales_of_rows(const GemmFp8Args& args, int first_row, int group) {
  const int thread = threadIdx.x % 128;
  const int first_of_warp = first_row + group * 64 + thread / 32 * 16;
  const int row = (S::kGated ? first_of_warp / 2 : first_of_warp) + thread % 32 / 4;
  const int other = row + (S::kGated ? args.up_distance : 8);
  const bool has_other = S::kGated ? row < args.out_features : other < args.out_features;
  return make_float2(row < args.out_features ? args.weight_scale[row] : 0.0f,
                     has_other ? args.weight_scale[other] : 0.0f);
}

// The same of a thread's two places of a head.
template <class Rows>
__device__ __forceinline__ float2 scales_of_places(const RotatedGemmFp8Args& args, const Rows& rows) {
  if (!rows.exists(args.rope)) return make_float2(0.0f, 0.0f);
  const float* place = rows.of_row(args.weight_scale, args.rope);
  return make_float2(place[0], place[args.rope.head_dim / 2]);
}

// Multiplies the sums with the scales of their rows and tokens. Rounded before a bias is added: what the
// compiler contracts would depend on the kernel around it.
template <class S>
__device__ __forceinline__ void apply_scales(float (&sums)[S::kTokens / 2], const float* token_scales,
                                             float2 rows) {
#pragma unroll
  for (int j = 0; j < S::kTokens / 8; ++j) {
    const float2 scale = *reinterpret_cast<const float2*>(token_scales + 8 * j + threadIdx.x % 4 * 2);
    float* d = &sums[4 * j];
    d[0] = __fmul_rn(d[0], scale.x * rows.x), d[1] = __fmul_rn(d[1], scale.y * rows.x);
    d[2] = __fmul_rn(d[2], scale.x * rows.y), d[3] = __fmul_rn(d[3], scale.y * rows.y);
  }
}

// CTAs of a cluster that read a part of a tile for each other: `x` of those that share x, which is a
// neighbour's index, `z` of those that share the weight.
template <class S>
struct Sharing {
  int x, split, z;

  __device__ __forceinline__ int rank(int at_x, int at_z) const {
    return static_cast<int>(cluster_rank<S>(at_x, split, at_z));
  }
  __device__ __forceinline__ uint16_t mask_of_x() const {
    return static_cast<uint16_t>(((1 << S::kXMulticast) - 1) << rank(0, z));
  }
  __device__ __forceinline__ uint16_t mask_of_weight() const {
    int mask = 0;
#pragma unroll
    for (int at = 0; at < S::kMulticast; ++at) mask |= 1 << rank(x, at);
    return static_cast<uint16_t>(mask);
  }
  // The rank of source `number` < kSources.
  __device__ __forceinline__ int peer(int number) const {
    if (number < S::kXMulticast) return rank(number, z);
    const int at = number - S::kXMulticast;
    return rank(x, at < z ? at : at + 1);
  }
};

// Brings a part of the weight's tile for block `k` (in pairs of elements) into the CTAs that share it.
template <class S, class Args>
__device__ __forceinline__ void copy_weight(uint32_t target, const CUtensorMap* map, int k, int first_row,
                                            uint32_t barrier, const Sharing<S>& sharing, uint64_t policy,
                                            [[maybe_unused]] const Args& args) {
  constexpr int kRowsEach = S::kRows / S::kMulticast;
  const int row = first_row + sharing.z * kRowsEach;
  const uint32_t part = target + sharing.z * kRowsEach * kSwizzledRowBytes;
  if constexpr (S::kRotated) {
    // As many first as second places of one head in each copy.
    const int eights = args.rope.head_dim / 16;
#pragma unroll
    for (int box = 0; box < kRowsEach; box += S::kHeadBoxRows) {
      const int eight = (row + box) / 16;
      const int from[5] = {k, 0, 0, eight % eights, eight / eights};
      if constexpr (S::kMulticast > 1) {
        copy_box_multicast(part + box * kSwizzledRowBytes, map, from, barrier, sharing.mask_of_weight(),
                           policy);
      } else {
        copy_box(part + box * kSwizzledRowBytes, map, from, barrier, policy);
      }
    }
  } else if constexpr (S::kGated && S::kMulticast > 1) {
    copy_box_multicast(part, map, {k, 0, 0, row / 16}, barrier, sharing.mask_of_weight(), policy);
  } else if constexpr (S::kGated) {
    copy_box(part, map, {k, 0, 0, row / 16}, barrier, policy);
  } else if constexpr (S::kMulticast > 1) {
    copy_box_multicast(part, map, {k, row}, barrier, sharing.mask_of_weight(), policy);
  } else {
    copy_box(part, map, {k, row}, barrier, policy);
  }
}

// The same for x: `tokens` of the tile from `first_token` on, of which each CTA fetches as many.
template <class S>
__device__ __forceinline__ void copy_x(uint32_t target, const CUtensorMap* map, int k, int first_token,
                                       int tokens, uint32_t barrier, const Sharing<S>& sharing,
                                       uint64_t policy) {
  if constexpr (S::kXMulticast > 1) {
    const int begin = sharing.x * (tokens / S::kXMulticast);
    copy_box_multicast(target + begin * kSwizzledRowBytes, map, {k, first_token + begin}, barrier,
                       sharing.mask_of_x(), policy);
  } else {
    copy_box(target, map, {k, first_token}, barrier, policy);
  }
}

// The barrier of the first stage that this lane tells of stages that its warp has read: that of a CTA which
// may fill them again. 0: this lane tells none.
template <class S>
__device__ __forceinline__ uint32_t empty_of_lane(uint32_t empty, const Sharing<S>& sharing) {
  const int lane = threadIdx.x % 32;
  if (lane >= S::kSources) return 0;
  return S::kSources > 1 ? remote_address(empty, sharing.peer(lane)) : empty;
}

// Grid: (tiles of kRows, a multiple of kXMulticast, kSplitK, kMulticast); clusters of (kXMulticast, kSplitK,
// kMulticast). Behind the shared memory of gemm_kernel lie the scales of the tile's tokens.
template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    gemm_fp8_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                    const Fp8Args<S> args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared[];
  static_assert(S::kSharedBytes % 8 == 0 && S::kSharedBytes + 4 * S::kTokens <= 232448);
  float* token_scales = reinterpret_cast<float*>(shared + S::kSharedBytes);
  const uint32_t stages = shared_address(shared);
  const uint32_t full = stages + S::kPipelineBytes;
  const uint32_t empty = full + 8 * S::kStages;
  [[maybe_unused]] const uint32_t parts_barrier = stages + S::kPartsBarrier;
  const int warpgroup = warpgroup_of_thread();
  const Sharing<S> sharing = {S::kXMulticast > 1 ? static_cast<int>(blockIdx.x) % S::kXMulticast : 0,
                              S::kSplitK > 1 ? static_cast<int>(blockIdx.y) : 0,
                              S::kMulticast > 1 ? static_cast<int>(blockIdx.z) : 0};
  const int split = sharing.split;
  const int share = sharing.z;
  const int first_row = blockIdx.x * S::kRows;
  const int k_begin = split * args.num_k_blocks / S::kSplitK;
  const int count = (split + 1) * args.num_k_blocks / S::kSplitK - k_begin;

  if (threadIdx.x == 0) {
    prefetch_map(&x_map);
    prefetch_map(&weight_map);
    for (int stage = 0; stage < S::kStages; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, S::kSources * S::kGroups * 4);
    }
    if constexpr (S::kSplitK > 1) {
      barrier_init(parts_barrier, 1);
      barrier_arrive_expecting(parts_barrier, bytes_of_parts<S>(split));
    }
    publish_barriers();
  }
  __syncthreads();
  if constexpr (S::kCluster > 1) cluster_barrier();
  allow_successors();

  if (warpgroup == S::kGroups) {
    give_registers<S::kProducerRegisters>();
    if (threadIdx.x == S::kGroups * 128) {
      const uint64_t read_once = evict_first_policy();
      const uint64_t keep = evict_last_policy();
      const auto fetch_weight = [&](int stage, int i) {
        const uint32_t barrier = full + 8 * stage;
        barrier_arrive_expecting(barrier, S::kWeightBytes + args.box_tokens * kSwizzledRowBytes);
        copy_weight<S>(stages + stage * S::kStageBytes, &weight_map, (k_begin + i) * S::kBlockK, first_row,
                       barrier, sharing, read_once, args);
      };
      const auto fetch_x = [&](int stage, int i) {
        copy_x<S>(stages + stage * S::kStageBytes + S::kWeightBytes, &x_map, (k_begin + i) * S::kBlockK,
                  share * args.box_tokens, args.box_tokens, full + 8 * stage, sharing, keep);
      };
      // A weight that nobody writes comes while the kernel before still runs.
      if (!args.static_weight) wait_for_predecessors();
      const int ahead = count < S::kStages ? count : S::kStages;
      Turn<S> turn;
#pragma unroll 1
      for (int i = 0; i < ahead; ++i) fetch_weight(i, i);
      wait_for_predecessors();
#pragma unroll 1
      for (int i = 0; i < ahead; ++i) {
        fetch_x(i, i);
        turn.advance();
      }
#pragma unroll 1
      for (int i = S::kStages; i < count; ++i) {
        barrier_wait(empty + 8 * turn.stage, turn.parity ^ 1);
        fetch_weight(turn.stage, i);
        fetch_x(turn.stage, i);
        turn.advance();
      }
      if constexpr (S::kSources > 1) {
        // Other CTAs arrive at these barriers for the last time: they must still be there.
#pragma unroll 1
        for (int i = 0; i < S::kStages; ++i) {
          barrier_wait(empty + 8 * turn.stage, turn.parity ^ 1);
          turn.advance();
        }
      }
    }
    __syncwarp();
    if constexpr (S::kSplitK > 1) cluster_barrier();
  } else {
    take_registers<S::kConsumerRegisters>();
    wait_for_predecessors();  // the activations are waited for in any case
    if (threadIdx.x < S::kTokens) {
      const int token = share * args.box_tokens + threadIdx.x;
      token_scales[threadIdx.x] = token < args.num_tokens ? args.x_scale[token] : 0.0f;
    }
    [[maybe_unused]] std::conditional_t<S::kRotated, RotatedRows<S>, int> rows;
    if constexpr (S::kRotated) rows.load(args, first_row, warpgroup);
    named_barrier(1, S::kGroups * 128);
    float sums[S::kTokens / 2] = {};
    // They come from memory while the tensor cores compute.
    float2 row_scales;
    if constexpr (S::kRotated) {
      row_scales = scales_of_places(args, rows);
    } else {
      row_scales = scales_of_rows<S>(args, first_row, warpgroup);
    }
    {
      Stretches<S> stretches(stages, full, empty_of_lane<S>(empty, sharing), warpgroup);
      stretches.add(sums, count);
    }
    apply_scales<S>(sums, token_scales, row_scales);
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
