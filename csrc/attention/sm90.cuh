// What the attention kernels on sm_90a share: the ring of stages that the copy engine fills, and the products
// of a warpgroup's 64 rows with a stage.
#pragma once

#include "attention/tile.cuh"
#include "common/sm90.cuh"
#include "common/wgmma.cuh"

namespace bbk {

// kE4m3: the cache holds e4m3; tiles of it arrive in a place of their own, to be converted into the ring.
template <int kHeadDim, int kWarpgroups, int kKeys, bool kE4m3 = false>
struct Shape {
  static constexpr int kStageKeys = kKeys;
  static constexpr int kRows = 64 * kWarpgroups;
  // With one warpgroup of products, two independent halves share a CTA, so that one's softmax runs under the
  // other's products. As two CTAs they could not be kept from meeting on one SM while others idle.
  static constexpr int kHalves = kWarpgroups == 1 ? 2 : 1;
  static constexpr int kHalfThreads = 128 * (kWarpgroups + 1);
  static constexpr int kThreads = kHalves * kHalfThreads;
  static constexpr int kSlices = kHeadDim / 64;
  static constexpr int kSliceBytes = kKeys * kSwizzledRowBytes;  // 64 elements of all keys of a stage
  static constexpr int kTileBytes = kSlices * kSliceBytes;       // K or V of a stage
  static constexpr int kStageBytes = 2 * kTileBytes;
  // More bytes on their way make all SMs wait longer for their first; 64 keys of two warpgroups are
  // what whole rows take, whose products wait for nothing else: 128 and 192 KiB.
  static constexpr int kBytesOnTheirWay =
      (kWarpgroups == 2 && kKeys == 64 && !kE4m3 ? 192 : 128) * 1024 / kHalves;
  static constexpr int kStages = kBytesOnTheirWay / kStageBytes;
  static constexpr int kRawBytes = kE4m3 ? 6 * kKeys * kHeadDim : 0;  // K and V of three tiles
  static constexpr int kSharedBytes = kHalves * (kStages * (kStageBytes + 32) + kRawBytes);
  // Who says that a tile has arrived: the thread that knows how many bytes, or all that convert.
  static constexpr int kArrivals = kE4m3 ? 128 : 1;
};

// What the products compute in. A cache in e4m3 becomes halves, whatever the queries are, which are rounded
// to halves: exact but below 2^-14, and infinite above 65504. Halves have three bits more than bf16.
template <typename T, bool kE4m3>
using Computed = std::conditional_t<kE4m3, __half, T>;

struct Sm90Params {
  CUtensorMap k_map;  // dimensions: head_dim, key in its page, kv head, page
  CUtensorMap v_map;
  AttentionParams attention;
  int box_keys;  // keys that one copy moves
};

// Describes the caches to the copy engine, which those in e4m3 do not pass through.
Sm90Params sm90_params(const AttentionParams& params);

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A ring of tiles of keys or values in shared memory, and a place in it. A tile is `full` once its bytes have
// arrived and `empty` once every warp of products is through with it.
template <class S>
struct Ring {
  uint32_t tiles;
  uint32_t barriers;
  int place = 0;
  int phase = 0;

  __device__ __forceinline__ uint32_t tile() const { return tiles + place * S::kTileBytes; }
  __device__ __forceinline__ uint32_t full() const { return barriers + 16 * place; }
  __device__ __forceinline__ uint32_t empty() const { return full() + 8; }
  __device__ __forceinline__ void advance() {
    if (++place == S::kStages) {
      place = 0;
      phase ^= 1;
    }
  }
};

// Values behind the last key get the weight 0, but NaN there would survive it.
template <class S>
__device__ __forceinline__ void clear_values(unsigned char* values, int num_keys) {
  for (int chunk = num_keys * 8 + threadIdx.x % 128; chunk < S::kStageKeys * 8; chunk += 128) {
#pragma unroll
    for (int slice = 0; slice < S::kSlices; ++slice) {
      *reinterpret_cast<uint4*>(values + slice * S::kSliceBytes + 16 * chunk) = make_uint4(0, 0, 0, 0);
    }
  }
  publish_stores();
  if (threadIdx.x < 128) {
    named_barrier(1, 128);
  } else if (threadIdx.x < 256) {
    named_barrier(2, 128);
  } else {
    named_barrier(3, 128);
  }
}

// Descriptors count in 16 bytes.
template <class S, typename T, int kHeadDim, typename Given>
__device__ __forceinline__ void start_scores(float (&score)[S::kStageKeys / 8][4],
                                             const QueryRows<T, kHeadDim, Given>& rows, uint32_t keys) {
  using Product = Wgmma<T, S::kStageKeys>;
  const uint64_t matrix = matrix_descriptor(keys);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kHeadDim / Product::kK; ++k) {
    Product::run(flat(score), rows.values[k], matrix + (k / 4 * S::kSliceBytes + k % 4 * 32) / 16, k > 0);
  }
  wgmma_commit();
}

template <class S, typename T, int kHeadDim, typename Given>
__device__ __forceinline__ void start_weighing(RowState<T, kHeadDim, Given>& state,
                                               const uint32_t (&weights)[S::kStageKeys / 16][4],
                                               uint32_t values) {
  using Product = Wgmma<T, kHeadDim, /*kTransposedB=*/true>;
  const uint64_t matrix = matrix_descriptor(values, S::kSliceBytes);
  keep_in_registers(flat(state.out));
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < S::kStageKeys / Product::kK; ++k) {
    Product::run(flat(state.out), weights[k], matrix + k * kSwizzledRowBytes, true);
  }
  wgmma_commit();
}

template <class S>
__device__ __forceinline__ void release(Ring<S>& ring) {
  if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty());
  ring.advance();
}

#endif

}  // namespace bbk
