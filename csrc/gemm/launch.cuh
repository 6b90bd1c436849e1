// Matrix products of a step's few tokens with the transformer's weights, on sm_90: checks and launch.
#pragma once

#include "common/capability.h"
#include "common/tensor_map.cuh"
#include "gemm/gemm.h"
#include "gemm/kernel.cuh"

namespace bbk {

inline void check_gemm(const char* op, const GemmParams& params, const GemmTile& tile) {
  check_at_least(op, "num_tokens", params.num_tokens, 0);
  check_at_least(op, "in_features", params.in_features, 1);
  check_at_least(op, "out_features", params.out_features, 0);
  if (params.num_tokens > tile.tokens) {
    refuse(op, "num_tokens: expected at most the tile's " + std::to_string(tile.tokens) + ", got " +
                   std::to_string(params.num_tokens));
  }
  if (params.in_features % 8 != 0) {
    refuse(op, "in_features: expected a multiple of 8, got " + std::to_string(params.in_features));
  }
  if (params.out_features % 8 != 0) {
    refuse(op, "out_features: expected a multiple of 8, got " + std::to_string(params.out_features));
  }
  check_aligned(op, "x", params.x, params.x_row_stride);
  check_aligned(op, "weight", params.weight, params.weight_row_stride);
}

[[noreturn]] inline void refuse_tile(const char* op, const GemmTile& tile, const char* kind) {
  refuse(op, "tile: expected a compiled one, got tokens " + std::to_string(tile.tokens) + ", rows " +
                 std::to_string(tile.rows) + ", split_k " + std::to_string(tile.split_k) + ", multicast " +
                 std::to_string(tile.multicast) + kind);
}

// Calls use(element) with an element of the dtype that the products are compiled for.
template <typename Use>
void dispatch_gemm_dtype(const char* op, DType dtype, Use&& use) {
  switch (dtype) {
    case DType::kFloat16:
      return use(__half());
    case DType::kBFloat16:
      return use(__nv_bfloat16());
    default:
      refuse(op, "dtype: expected code 1 or 2, got " + std::to_string(static_cast<int>(dtype)));
  }
}

// How the copy engine finds the rows of a tile.
template <class S>
CUtensorMap weight_map(const char* op, const GemmParams& p, const typename S::Args& args) {
  constexpr auto kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  const int64_t row = p.weight_row_stride;
  if constexpr (S::kGated) {
    // Eight gates, eight ups, the next eight gates, ...
    return tensor_map<4>(op, "weight", p.weight, p.dtype, {p.in_features, 8, 2, p.out_features / 8},
                         {row, p.up_distance * row, 8 * row}, {S::kBlockK, 8, 2, S::kRows / 16}, kPromotion);
  } else if constexpr (S::kRotated) {
    // Eight places of a head's first half, the eight that they rotate into, the next eight, ...
    const int64_t dim = args.rope.head_dim;
    return tensor_map<5>(
        op, "weight", p.weight, p.dtype, {p.in_features, 8, 2, dim / 16, p.out_features / dim},
        {row, dim / 2 * row, 8 * row, dim * row}, {S::kBlockK, 8, 2, S::kHeadBoxRows / 16, 1}, kPromotion);
  } else {
    return tensor_map<2>(op, "weight", p.weight, p.dtype, {p.in_features, p.out_features}, {row},
                         {S::kBlockK, S::kRows / S::kMulticast}, kPromotion);
  }
}

// Launches on the current device, which is the launch's; of `args` all is set here but what kRopeKvWrite
// adds.
template <class S>
void launch_gemm(const char* op, const GemmParams& p, typename S::Args args, bool static_weight,
                 bool programmatic, const Launch& launch) {
  const int64_t weight_rows = S::kGated ? 2 * p.out_features : p.out_features;
  const int box_tokens = copied_rows(ceil_div<int64_t>(p.num_tokens, S::kMulticast));
  const CUtensorMap x_map =
      tensor_map<2>(op, "x", p.x, p.dtype, {p.in_features, p.num_tokens}, {p.x_row_stride},
                    {S::kBlockK, box_tokens}, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
  args.out = p.out;
  args.bias = p.bias;
  args.out_row_stride = p.out_row_stride;
  args.num_tokens = static_cast<int>(p.num_tokens);
  args.box_tokens = box_tokens;
  args.out_features = static_cast<int>(p.out_features);
  args.num_k_blocks = static_cast<int>(ceil_div<int64_t>(p.in_features, S::kBlockK));
  args.static_weight = static_weight;

  const auto tiles = static_cast<unsigned>(ceil_div<int64_t>(weight_rows, S::kRows));
  const dim3 grid(tiles, S::kSplitK, S::kMulticast), cluster(1, S::kSplitK, S::kMulticast);
  launch_kernel<gemm_kernel<S>>(op, launch, {grid, S::kThreads, S::kSharedBytes, programmatic, cluster},
                                x_map, weight_map<S>(op, p, args), args);
}

}  // namespace bbk
