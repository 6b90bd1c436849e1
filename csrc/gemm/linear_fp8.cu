// Products in e4m3 of a step's few tokens with the transformer's weights, on sm_90: what is compiled.
// kernel_fp8.cuh holds the kernel.
#include "gemm/kernel_fp8.cuh"
#include "gemm/launch.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "linear_fp8";

// tokens of a CTA, warpgroups, pipeline stages, split_k, multicast; two sums for each element of the tile are
// in registers, so that 128 tokens are the most.
#define BBK_FP8_SHAPES(V) \
  V(16, 1, 20, 1, 1)      \
  V(16, 1, 20, 2, 1)      \
  V(16, 2, 11, 1, 1)      \
  V(16, 3, 8, 1, 1)       \
  V(32, 1, 17, 1, 1)      \
  V(32, 1, 17, 2, 1)      \
  V(32, 2, 10, 1, 1)      \
  V(32, 3, 7, 1, 1)       \
  V(64, 1, 13, 1, 1)      \
  V(64, 1, 13, 2, 1)      \
  V(64, 2, 9, 1, 1)       \
  V(64, 3, 6, 1, 1)       \
  V(128, 1, 9, 1, 1)      \
  V(128, 1, 9, 2, 1)      \
  V(128, 2, 6, 1, 1)      \
  V(128, 2, 6, 2, 1)      \
  V(128, 3, 5, 1, 1)      \
  V(128, 1, 9, 1, 2)      \
  V(128, 2, 6, 1, 2)      \
  V(128, 3, 5, 1, 2)

// Calls use(shape) with the compiled shape of this tile.
template <typename T, typename Use>
void dispatch_shape(const GemmTile& tile, Use&& use) {
#define BBK_SHAPE(TOKENS, GROUPS, STAGES, SPLIT_K, MULTICAST)                                     \
  if (tile.tokens == TOKENS * MULTICAST && tile.rows == GROUPS * 64 && tile.split_k == SPLIT_K && \
      tile.multicast == MULTICAST) {                                                              \
    return use(GemmShape<T, TOKENS, GROUPS, STAGES, SPLIT_K, MULTICAST, GemmUse::kLinear>());     \
  }
  BBK_FP8_SHAPES(BBK_SHAPE)
#undef BBK_SHAPE
  refuse_tile(kOp, tile, "");
}

void check(const GemmFp8Params& params, const GemmTile& tile) {
  check_at_least(kOp, "num_tokens", params.num_tokens, 0);
  check_at_least(kOp, "in_features", params.in_features, 1);
  check_at_least(kOp, "out_features", params.out_features, 0);
  if (params.num_tokens > tile.tokens) {
    refuse(kOp, "num_tokens: expected at most the tile's " + std::to_string(tile.tokens) + ", got " +
                    std::to_string(params.num_tokens));
  }
  if (params.in_features % 16 != 0) {
    refuse(kOp, "in_features: expected a multiple of 16, got " + std::to_string(params.in_features));
  }
  if (params.out_features % 8 != 0) {
    refuse(kOp, "out_features: expected a multiple of 8, got " + std::to_string(params.out_features));
  }
  if (params.x_row_stride % 16 != 0 || params.weight_row_stride % 16 != 0) {
    refuse(kOp, "x and weight: expected row strides of a multiple of 16, got " +
                    std::to_string(params.x_row_stride) + " and " + std::to_string(params.weight_row_stride));
  }
  check_aligned(kOp, "x", params.x, 0);
  check_aligned(kOp, "weight", params.weight, 0);
  check_aligned(kOp, "out", params.out, params.out_row_stride);
}

// Launches on the current device, which is the launch's.
template <class S>
void launch_gemm_fp8(const GemmFp8Params& p, bool static_weight, bool programmatic, const Launch& launch) {
  constexpr auto kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  const int box_tokens = copied_rows(ceil_div<int64_t>(p.num_tokens, S::kMulticast));
  // Two elements count as one of 16 bits.
  const int64_t pairs = p.in_features / 2;
  const CUtensorMap x_map = tensor_map<2>(kOp, "x", p.x, DType::kBFloat16, {pairs, p.num_tokens},
                                          {p.x_row_stride / 2}, {S::kBlockK, box_tokens}, kPromotion);
  const CUtensorMap weight_map =
      tensor_map<2>(kOp, "weight", p.weight, DType::kBFloat16, {pairs, p.out_features},
                    {p.weight_row_stride / 2}, {S::kBlockK, S::kRows / S::kMulticast}, kPromotion);
  GemmFp8Args args{};
  args.out = p.out;
  args.bias = p.bias;
  args.out_row_stride = p.out_row_stride;
  args.num_tokens = static_cast<int>(p.num_tokens);
  args.box_tokens = box_tokens;
  args.out_features = static_cast<int>(p.out_features);
  args.num_k_blocks = static_cast<int>(ceil_div<int64_t>(pairs, S::kBlockK));
  args.static_weight = static_weight;
  args.x_scale = p.x_scale;
  args.weight_scale = p.weight_scale;
  const auto tiles = static_cast<unsigned>(ceil_div<int64_t>(p.out_features, S::kRows));
  const dim3 grid(tiles, S::kSplitK, S::kMulticast), cluster(1, S::kSplitK, S::kMulticast);
  constexpr int kSharedBytes = S::kSharedBytes + 4 * S::kTokens;
  launch_kernel<gemm_fp8_kernel<S>>(kOp, launch, {grid, S::kThreads, kSharedBytes, programmatic, cluster},
                                    x_map, weight_map, args);
}

}  // namespace

void gemm_fp8(const GemmFp8Params& params, const GemmTile& tile, bool static_weight, bool programmatic,
              const Launch& launch) {
  check(params, tile);
  dispatch_gemm_dtype(kOp, params.dtype, [&](auto zero) {
    dispatch_shape<decltype(zero)>(tile, [&](auto shape) {
      using S = decltype(shape);
      constexpr int kBlock = kSwizzledRowBytes;
      // Every split must have something to add up.
      if (params.in_features <= (S::kSplitK - 1) * kBlock) {
        refuse(kOp, "in_features: expected more than " + std::to_string((S::kSplitK - 1) * kBlock) +
                        " with " + std::to_string(S::kSplitK) + " split_k, got " +
                        std::to_string(params.in_features));
      }
      if (params.num_tokens == 0 || params.out_features == 0) return;  // an empty grid is a launch error
      const DeviceGuard guard(launch.device, kOp);
      check_sm90a(kOp, launch.device);
      launch_gemm_fp8<S>(params, static_weight, programmatic, launch);
    });
  });
}

}  // namespace bbk
