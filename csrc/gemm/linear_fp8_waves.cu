// Products in e4m3 with the transformer's weights, on sm_90: what is compiled for any number of tokens, with
// and without an activation behind them. kernel_fp8_waves.cuh holds the kernel.
#include "gemm/launch_fp8_waves.cuh"

namespace bbk {
namespace {

// tokens of a CTA, warpgroups, pipeline stages, multicast, x_multicast
#define BBK_FP8_WAVES(V) \
  V(128, 2, 6, 1, 2)     \
  V(128, 2, 6, 2, 1)     \
  V(128, 3, 4, 1, 2)     \
  V(128, 3, 4, 2, 1)     \
  V(128, 3, 4, 2, 2)     \
  V(160, 2, 5, 1, 2)     \
  V(160, 2, 5, 2, 1)     \
  V(160, 2, 5, 2, 2)     \
  V(192, 2, 4, 1, 2)     \
  V(192, 2, 4, 2, 1)

// Stages that fit beside the boxes of an activation's results, which are half as wide.
constexpr int gated_stages(int tokens, int groups) {
  const int room = 232448 - groups * tokens * (64 + 4);
  return room / ((groups * 64 + tokens) * kSwizzledRowBytes + 16);
}

}  // namespace

void gemm_fp8_waves(const GemmFp8Params& params, const GemmFp8Tile& tile, bool static_weight,
                    bool programmatic, const Launch& launch) {
#define BBK_SHAPE(TOKENS, GROUPS, STAGES, MULTICAST, X_MULTICAST)                                        \
  if (tile.tokens == TOKENS * MULTICAST && tile.rows == GROUPS * 64 && tile.split_k == 1 &&              \
      tile.multicast == MULTICAST && tile.x_multicast == X_MULTICAST) {                                  \
    return params.gated                                                                                  \
               ? launch_waves<GemmShape<T, TOKENS, GROUPS, gated_stages(TOKENS, GROUPS), 1, MULTICAST,   \
                                        GemmUse::kRoundedSwiglu, X_MULTICAST>>(params, static_weight,    \
                                                                               programmatic, launch)     \
               : launch_waves<                                                                           \
                     GemmShape<T, TOKENS, GROUPS, STAGES, 1, MULTICAST, GemmUse::kLinear, X_MULTICAST>>( \
                     params, static_weight, programmatic, launch);                                       \
  }
  dispatch_gemm_dtype(kLinearFp8, params.dtype, [&](auto zero) {
    using T = decltype(zero);
    BBK_FP8_WAVES(BBK_SHAPE)
    refuse_fp8_tile(tile, ", waves");
  });
#undef BBK_SHAPE
}

}  // namespace bbk
