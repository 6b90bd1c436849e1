// Products in e4m3 with the weights of gates and ups and the activation behind them, on sm_90: what is
// compiled for a step's few tokens. kernel_fp8.cuh holds the kernel.
#include "gemm/launch_fp8.cuh"

namespace bbk {

#define BBK_FP8_GATED_SHAPES(V) \
  V(16, 3, 8, 1, 1, 1)          \
  V(32, 3, 7, 1, 1, 1)          \
  V(64, 3, 6, 1, 1, 1)          \
  V(128, 3, 5, 1, 1, 1)         \
  V(128, 3, 5, 1, 2, 1)

void gemm_fp8_gated(const GemmFp8Params& params, const GemmFp8Tile& tile, bool static_weight,
                    bool programmatic, const Launch& launch) {
  dispatch_gemm_dtype(kLinearFp8, params.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr auto kUse = GemmUse::kRoundedSwiglu;
    BBK_FP8_GATED_SHAPES(BBK_FP8_SHAPE)
    refuse_fp8_tile(tile, ", gated");
  });
}

}  // namespace bbk
