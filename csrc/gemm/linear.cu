// Matrix products of a step's few tokens with the transformer's weights, on sm_90: what is compiled.
// kernel.cuh holds the kernel.
#include "gemm/launch.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "linear";

// tokens of a CTA, warpgroups, pipeline stages, split_k, multicast, gated
#define BBK_GEMM_SHAPES(V)  \
  V(16, 1, 20, 1, 1, false) \
  V(64, 1, 13, 1, 1, false) \
  V(64, 1, 13, 2, 1, false) \
  V(128, 1, 9, 1, 1, false) \
  V(128, 1, 9, 2, 1, false) \
  V(128, 2, 6, 1, 1, false) \
  V(192, 1, 6, 2, 1, false) \
  V(192, 2, 5, 1, 1, false) \
  V(256, 1, 5, 2, 1, false) \
  V(128, 1, 9, 1, 2, false) \
  V(128, 3, 5, 1, 2, false) \
  V(16, 3, 8, 1, 1, true)   \
  V(64, 3, 7, 1, 1, true)   \
  V(128, 3, 5, 1, 1, true)  \
  V(192, 3, 4, 1, 1, true)  \
  V(256, 3, 4, 1, 1, true)  \
  V(192, 3, 4, 2, 1, true)  \
  V(256, 3, 4, 2, 1, true)

// Calls use(shape) with the compiled shape of this tile.
template <typename T, typename Use>
void dispatch_shape(const GemmTile& tile, bool gated, Use&& use) {
#define BBK_SHAPE(TOKENS, GROUPS, STAGES, SPLIT_K, MULTICAST, GATED)                              \
  if (tile.tokens == TOKENS * MULTICAST && tile.rows == GROUPS * 64 && tile.split_k == SPLIT_K && \
      tile.multicast == MULTICAST && gated == GATED) {                                            \
    constexpr GemmUse kUse = GATED ? GemmUse::kSwiglu : GemmUse::kLinear;                         \
    return use(GemmShape<T, TOKENS, GROUPS, STAGES, SPLIT_K, MULTICAST, kUse>());                 \
  }
  BBK_GEMM_SHAPES(BBK_SHAPE)
#undef BBK_SHAPE
  refuse_tile(kOp, tile, gated ? ", gated" : "");
}

}  // namespace

void gemm(const GemmParams& params, const GemmTile& tile, bool static_weight, bool programmatic,
          const Launch& launch) {
  check_gemm(kOp, params, tile);
  if (params.gated && params.bias != nullptr) refuse(kOp, "bias: expected none with gated, got one");
  if (params.gated && params.up_distance < params.out_features) {
    refuse(kOp, "up_distance: expected at least out_features, " + std::to_string(params.out_features) +
                    ", got " + std::to_string(params.up_distance));
  }
  check_aligned(kOp, "out", params.out, params.out_row_stride);
  dispatch_gemm_dtype(kOp, params.dtype, [&](auto zero) {
    dispatch_shape<decltype(zero)>(tile, params.gated, [&](auto shape) {
      using S = decltype(shape);
      // Every split must have something to add up.
      if (params.in_features <= (S::kSplitK - 1) * S::kBlockK) {
        refuse(kOp, "in_features: expected more than " + std::to_string((S::kSplitK - 1) * S::kBlockK) +
                        " with " + std::to_string(S::kSplitK) + " split_k, got " +
                        std::to_string(params.in_features));
      }
      if (params.num_tokens == 0 || params.out_features == 0) return;  // an empty grid is a launch error
      const DeviceGuard guard(launch.device, kOp);
      check_sm90a(kOp, launch.device);
      launch_gemm<S>(kOp, params, GemmArgs(), static_weight, programmatic, launch);
    });
  });
}

}  // namespace bbk
