// Matrix products in e4m3, on sm_90: checks and launch.
#pragma once

#include "gemm/kernel_fp8.cuh"
#include "gemm/launch.cuh"

namespace bbk {

constexpr char kLinearFp8[] = "linear_fp8";

[[noreturn]] inline void refuse_fp8_tile(const GemmFp8Tile& tile, const char* kind,
                                         const char* op = kLinearFp8) {
  refuse(op, "tile: expected a compiled one, got tokens " + std::to_string(tile.tokens) + ", rows " +
                 std::to_string(tile.rows) + ", split_k " + std::to_string(tile.split_k) + ", multicast " +
                 std::to_string(tile.multicast) + ", x_multicast " + std::to_string(tile.x_multicast) + kind);
}

// What all kernels of e4m3 need of x and of the weight.
inline void check_gemm_fp8(const char* op, const GemmFp8Params& params, const GemmFp8Tile& tile) {
  check_at_least(op, "num_tokens", params.num_tokens, 0);
  check_at_least(op, "in_features", params.in_features, 1);
  check_at_least(op, "out_features", params.out_features, 0);
  if (!tile.waves && params.num_tokens > tile.tokens) {
    refuse(op, "num_tokens: expected at most the tile's " + std::to_string(tile.tokens) + ", got " +
                   std::to_string(params.num_tokens));
  }
  if (params.in_features % 16 != 0) {
    refuse(op, "in_features: expected a multiple of 16, got " + std::to_string(params.in_features));
  }
  if (params.out_features % 8 != 0) {
    refuse(op, "out_features: expected a multiple of 8, got " + std::to_string(params.out_features));
  }
  if (params.x_row_stride % 16 != 0 || params.weight_row_stride % 16 != 0) {
    refuse(op, "x and weight: expected row strides of a multiple of 16, got " +
                   std::to_string(params.x_row_stride) + " and " + std::to_string(params.weight_row_stride));
  }
  check_aligned(op, "x", params.x, 0);
  check_aligned(op, "weight", params.weight, 0);
}

// Two elements count as one of 16 bits. Of `box_tokens` of x a CTA fetches a part for those that share x.
template <class S>
CUtensorMap fp8_x_map(const GemmFp8Params& p, int box_tokens) {
  return tensor_map<2>(kLinearFp8, "x", p.x, DType::kBFloat16, {p.in_features / 2, p.num_tokens},
                       {p.x_row_stride / 2}, {S::kBlockK, box_tokens / S::kXMulticast},
                       CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
}

// `head_dim`: of the heads of q, k and v, where they are rotated.
template <class S>
CUtensorMap fp8_weight_map(const GemmFp8Params& p, [[maybe_unused]] int64_t head_dim = 0) {
  constexpr auto kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  constexpr int kRowsEach = S::kRows / S::kMulticast;
  const int64_t pairs = p.in_features / 2, row = p.weight_row_stride / 2;
  if constexpr (S::kGated) {
    // Eight gates, eight ups, the next eight gates, ...
    return tensor_map<4>(kLinearFp8, "weight", p.weight, DType::kBFloat16, {pairs, 8, 2, p.out_features / 8},
                         {row, p.out_features * row, 8 * row}, {S::kBlockK, 8, 2, kRowsEach / 16},
                         kPromotion);
  } else if constexpr (S::kRotated) {
    // Eight places of a head's first half, the eight that they rotate into, the next eight, ...
    return tensor_map<5>(kLinearFp8, "weight", p.weight, DType::kBFloat16,
                         {pairs, 8, 2, head_dim / 16, p.out_features / head_dim},
                         {row, head_dim / 2 * row, 8 * row, head_dim * row},
                         {S::kBlockK, 8, 2, S::kHeadBoxRows / 16, 1}, kPromotion);
  } else {
    return tensor_map<2>(kLinearFp8, "weight", p.weight, DType::kBFloat16, {pairs, p.out_features}, {row},
                         {S::kBlockK, kRowsEach}, kPromotion);
  }
}

template <class S>
GemmFp8Args fp8_args(const GemmFp8Params& p, int box_tokens, bool static_weight) {
  GemmFp8Args args{};
  args.out = p.out;
  args.bias = p.bias;
  args.out_row_stride = p.out_row_stride;
  args.num_tokens = static_cast<int>(p.num_tokens);
  args.box_tokens = box_tokens;
  args.out_features = static_cast<int>(p.out_features);
  args.num_k_blocks = static_cast<int>(ceil_div<int64_t>(p.in_features, kSwizzledRowBytes));
  args.static_weight = static_weight;
  args.x_scale = p.x_scale;
  args.weight_scale = p.weight_scale;
  args.up_distance = static_cast<int>(p.out_features);
  return args;
}

// Tiles of all rows of the weight, so many that those that share x are complete.
template <class S>
int64_t fp8_row_tiles(const GemmFp8Params& p) {
  const int64_t rows = S::kGated ? 2 * p.out_features : p.out_features;
  return ceil_div<int64_t>(rows, S::kRows * S::kXMulticast) * S::kXMulticast;
}

// For few tokens, on the current device, which is the launch's. `rope`: where heads are rotated.
template <class S>
void launch_gemm_fp8(const GemmFp8Params& p, bool static_weight, bool programmatic, const Launch& launch,
                     [[maybe_unused]] const RopeKvWriteParams& rope = {}) {
  // Every split must have something to add up.
  if (p.in_features <= (S::kSplitK - 1) * kSwizzledRowBytes) {
    refuse(kLinearFp8, "in_features: expected more than " +
                           std::to_string((S::kSplitK - 1) * kSwizzledRowBytes) + " with " +
                           std::to_string(S::kSplitK) + " split_k, got " + std::to_string(p.in_features));
  }
  const int64_t each = ceil_div<int64_t>(p.num_tokens, S::kMulticast * S::kXMulticast);
  const int box_tokens = S::kXMulticast * copied_rows(each);
  const dim3 grid(static_cast<unsigned>(fp8_row_tiles<S>(p)), S::kSplitK, S::kMulticast);
  const dim3 cluster(S::kXMulticast, S::kSplitK, S::kMulticast);
  constexpr int kSharedBytes = S::kSharedBytes + 4 * S::kTokens;
  Fp8Args<S> args{fp8_args<S>(p, box_tokens, static_weight)};
  if constexpr (S::kRotated) args.rope = rope;
  launch_kernel<gemm_fp8_kernel<S>>(kLinearFp8, launch,
                                    {grid, S::kThreads, kSharedBytes, programmatic, cluster},
                                    fp8_x_map<S>(p, box_tokens), fp8_weight_map<S>(p, rope.head_dim), args);
}

// The tiles by what they compute; called by gemm_fp8, with sizes that are checked and not empty.
void gemm_fp8_gated(const GemmFp8Params& params, const GemmFp8Tile& tile, bool static_weight,
                    bool programmatic, const Launch& launch);
void gemm_fp8_waves(const GemmFp8Params& params, const GemmFp8Tile& tile, bool static_weight,
                    bool programmatic, const Launch& launch);

// tokens of a CTA, warpgroups, pipeline stages, split_k, multicast, x_multicast
#define BBK_FP8_SHAPE(TOKENS, GROUPS, STAGES, SPLIT_K, MULTICAST, X_MULTICAST)                           \
  if (tile.tokens == TOKENS * MULTICAST && tile.rows == GROUPS * 64 && tile.split_k == SPLIT_K &&        \
      tile.multicast == MULTICAST && tile.x_multicast == X_MULTICAST) {                                  \
    return launch_gemm_fp8<GemmShape<T, TOKENS, GROUPS, STAGES, SPLIT_K, MULTICAST, kUse, X_MULTICAST>>( \
        params, static_weight, programmatic, launch);                                                    \
  }

}  // namespace bbk
