// out = x w^T in e4m3 for any number of tokens: as many CTAs as the GPU runs at once go from tile to tile.
// What a warpgroup writes leaves through the copy engine while it computes its next tile, for which the first
// stages are there by then. Tiles of the same rows of the weight follow each other, so that a weight comes
// from memory once.
#pragma once

#include "gemm/kernel_fp8.cuh"

namespace bbk {

template <class S>
struct GemmFp8WavesArgs : Fp8Args<S> {
  int token_groups;  // tiles of a cluster along the tokens
  int num_tiles;     // of a cluster
};

// Shared memory behind the pipeline: what leaves, a box for each warpgroup, or what is to be rotated; the
// pipeline's barriers; the scales of the tokens, for each warpgroup.
template <class S>
struct WavesLayout {
  static constexpr int kBoxRowBytes = 2 * S::kOutColumns;
  static constexpr int kBoxBytes = S::kRotated ? S::kStagingBytes : S::kTokens * kBoxRowBytes;
  static constexpr int kBarriers = S::kPipelineBytes + S::kGroups * kBoxBytes;
  static constexpr int kScales = kBarriers + 2 * S::kStages * 8;
  static constexpr int kSharedBytes = kScales + S::kGroups * S::kTokens * 4;
  static_assert(kSharedBytes <= 232448, "shared memory of an sm_90 CTA");
  static_assert(S::kSplitK == 1 && S::kProducer);
  static_assert(S::kPipelineBytes % 1024 == 0 && kBoxBytes % 1024 == 0, "where a swizzle starts");
};

// Rounds a warpgroup's sums into its box, in the order of the copy engine's swizzle.
template <class S>
__device__ __forceinline__ void fill_box(const float (&sums)[S::kTokens / 2], uint32_t box, float2 bias) {
  using T = typename S::T;
  const int warp = threadIdx.x % 128 / 32, matrix = threadIdx.x % 32 / 8, eighth = threadIdx.x % 8;
  constexpr int kRowBytes = WavesLayout<S>::kBoxRowBytes;
#pragma unroll
  for (int j = 0; j < S::kTokens / 8; j += 2) {
    const float* d = &sums[4 * j];
    if constexpr (S::kGated) {
      const int token = 8 * j + 8 * (matrix % 2) + eighth;
      const uint32_t address = box + token * kRowBytes + (warp ^ (eighth / 2)) * 16;
      store_two_matrices_transposed(address, pack_pair<T>(gated<S>(d[0], d[2]), gated<S>(d[1], d[3])),
                                    pack_pair<T>(gated<S>(d[4], d[6]), gated<S>(d[5], d[7])));
    } else {
      const int token = 8 * j + 8 * (matrix / 2) + eighth;
      const uint32_t address = box + token * kRowBytes + ((2 * warp + matrix % 2) ^ eighth) * 16;
      store_four_matrices_transposed(
          address, pack_pair<T>(d[0] + bias.x, d[1] + bias.x), pack_pair<T>(d[2] + bias.y, d[3] + bias.y),
          pack_pair<T>(d[4] + bias.x, d[5] + bias.x), pack_pair<T>(d[6] + bias.y, d[7] + bias.y));
    }
  }
}

// Where a tile of heads goes: a thread holds position and slot of one token while the sums are made.
template <class S>
struct HeldPlaces {
  RotatedRows<S, true> rows;
  int first_token, position, slot;

  template <class Args>
  __device__ __forceinline__ void load(const Args& args, int first_row, int from_token, int group) {
    rows.load_head(args.rope, first_row, group);
    first_token = from_token;
    const int token = first_token + threadIdx.x % 128;
    const bool exists = token < args.num_tokens;
    position = exists ? args.rope.positions[token] : -1;
    const int64_t slots = args.rope.num_pages * args.rope.page_size;
    slot = rows.checked_slot(exists ? args.rope.slots[token] : -1, slots);
  }

  template <class Args>
  __device__ __forceinline__ void write(const float (&sums)[S::kTokens / 2], unsigned char* staging,
                                        const Args& args, float2 bias, int group) {
#pragma unroll
    for (int turn = 0; turn < rows.kTurns; ++turn) {
      const int lane = threadIdx.x % 32 / 4 + 8 * turn;
      rows.position[turn] = __shfl_sync(~0u, position, lane);
      rows.slot[turn] = __shfl_sync(~0u, slot, lane);
    }
    rows.write_from(sums, staging, args, group, bias, first_token);
  }
};

// Grid: (kXMulticast CTAs of each cluster, 1, kMulticast); clusters of (kXMulticast, 1, kMulticast).
template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    gemm_fp8_waves_kernel(const __grid_constant__ CUtensorMap x_map,
                          const __grid_constant__ CUtensorMap weight_map,
                          const __grid_constant__ CUtensorMap out_map, const GemmFp8WavesArgs<S> args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = WavesLayout<S>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t stages = shared_address(shared);
  const uint32_t full = stages + L::kBarriers;
  const uint32_t empty = full + 8 * S::kStages;
  const int warpgroup = warpgroup_of_thread();
  const Sharing<S> sharing = {S::kXMulticast > 1 ? static_cast<int>(blockIdx.x) % S::kXMulticast : 0, 0,
                              S::kMulticast > 1 ? static_cast<int>(blockIdx.z) : 0};
  const int first_tile = blockIdx.x / S::kXMulticast;
  const int num_clusters = gridDim.x / S::kXMulticast;
  const auto row_of = [&](int tile) {
    return (tile / args.token_groups * S::kXMulticast + sharing.x) * S::kRows;
  };
  const auto token_of = [&](int tile) {
    return (tile % args.token_groups * S::kMulticast + sharing.z) * S::kTokens;
  };

  if (threadIdx.x == 0) {
    prefetch_map(&x_map);
    prefetch_map(&weight_map);
    if constexpr (!S::kRotated) prefetch_map(&out_map);
    for (int stage = 0; stage < S::kStages; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, S::kSources * S::kGroups * 4);
    }
    publish_barriers();
  }
  __syncthreads();
  if constexpr (S::kSources > 1) cluster_barrier();
  allow_successors();

  if (warpgroup == S::kGroups) {
    give_registers<S::kProducerRegisters>();
    if (threadIdx.x == S::kGroups * 128) {
      // Tiles that share a weight read it at about the same time.
      const uint64_t read_once = evict_first_policy();
      const uint64_t keep = evict_last_policy();
      const auto fetch_weight = [&](int stage, int i, int row) {
        const uint32_t barrier = full + 8 * stage;
        barrier_arrive_expecting(barrier, S::kStageBytes);
        copy_weight<S>(stages + stage * S::kStageBytes, &weight_map, i * S::kBlockK, row, barrier, sharing,
                       read_once, args);
      };
      const auto fetch_x = [&](int stage, int i, int token) {
        copy_x<S>(stages + stage * S::kStageBytes + S::kWeightBytes, &x_map, i * S::kBlockK, token,
                  S::kTokens, full + 8 * stage, sharing, keep);
      };
      // A weight that nobody writes comes while the kernel before still runs.
      if (!args.static_weight) wait_for_predecessors();
      int begin = args.num_k_blocks < S::kStages ? args.num_k_blocks : S::kStages;
      Turn<S> turn;
#pragma unroll 1
      for (int i = 0; i < begin; ++i) {
        fetch_weight(i, i, row_of(first_tile));
        turn.advance();
      }
      wait_for_predecessors();
#pragma unroll 1
      for (int i = 0; i < begin; ++i) fetch_x(i, i, token_of(first_tile));
#pragma unroll 1
      for (int tile = first_tile; tile < args.num_tiles; tile += num_clusters) {
        const int row = row_of(tile), token = token_of(tile);
#pragma unroll 1
        for (int i = begin; i < args.num_k_blocks; ++i) {
          barrier_wait(empty + 8 * turn.stage, turn.parity ^ 1);
          fetch_weight(turn.stage, i, row);
          fetch_x(turn.stage, i, token);
          turn.advance();
        }
        begin = 0;
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
  } else {
    take_registers<S::kConsumerRegisters>();
    wait_for_predecessors();  // the activations are waited for in any case
    using T = typename S::T;
    const int thread = threadIdx.x % 128;
    constexpr int kHeldScales = (S::kTokens + 127) / 128;
    const int own_barrier = (S::kRotated ? 2 : 1) + warpgroup;
    float* token_scales = reinterpret_cast<float*>(shared + L::kScales) + warpgroup * S::kTokens;
    const uint32_t box = stages + S::kPipelineBytes + warpgroup * L::kBoxBytes;
    Stretches<S> stretches(stages, full, empty_of_lane<S>(empty, sharing), warpgroup);
#pragma unroll 1
    for (int tile = first_tile; tile < args.num_tiles; tile += num_clusters) {
      const int first_row = row_of(tile), first_token = token_of(tile);
      // They arrive while the tensor cores compute.
      float held_scales[kHeldScales];
#pragma unroll
      for (int turn = 0; turn < kHeldScales; ++turn) {
        const int token = first_token + 128 * turn + thread;
        held_scales[turn] = token < args.num_tokens ? args.x_scale[token] : 0.0f;
      }
      [[maybe_unused]] std::conditional_t<S::kRotated, HeldPlaces<S>, int> held;
      float2 row_scales, bias = make_float2(0.0f, 0.0f);
      if constexpr (S::kRotated) {
        held.load(args, first_row, first_token, warpgroup);
        row_scales = scales_of_places(args, held.rows);
        bias = held.rows.bias(args);
      } else {
        row_scales = scales_of_rows<S>(args, first_row, warpgroup);
      }
      if (!S::kGated && !S::kRotated && args.bias != nullptr) {
        const int row = first_row + warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4;
        if (row < args.out_features) bias.x = to_float(static_cast<const T*>(args.bias)[row]);
        if (row + 8 < args.out_features) bias.y = to_float(static_cast<const T*>(args.bias)[row + 8]);
      }
      float sums[S::kTokens / 2] = {};
      {
        stretches.add(sums, args.num_k_blocks);
#pragma unroll
        for (int turn = 0; turn < kHeldScales; ++turn) {
          const int i = 128 * turn + thread;
          if (i < S::kTokens) token_scales[i] = held_scales[turn];
        }
      }
      // The box before has left, and the tokens' scales are there.
      if (!S::kRotated && thread == 0) wait_until_boxes_are_read();
      named_barrier(own_barrier, 128);
      apply_scales<S>(sums, token_scales, row_scales);
      if constexpr (S::kRotated) {
        held.write(sums, shared + S::kPipelineBytes + warpgroup * L::kBoxBytes, args, bias, warpgroup);
      } else {
        fill_box<S>(sums, box, bias);
        publish_stores();
        named_barrier(own_barrier, 128);
        const int column = (S::kGated ? first_row / 2 : first_row) + warpgroup * S::kOutColumns;
        if (thread == 0 && column < args.out_features && first_token < args.num_tokens) {
          store_box(&out_map, {column, first_token}, box);
          commit_boxes();
        }
      }
    }
    if (!S::kRotated && thread == 0) wait_until_boxes_are_read();
  }
#endif
}

}  // namespace bbk
