// Products in e4m3 with the transformer's weights, on sm_90: what is compiled for a step's few tokens.
// kernel_fp8.cuh holds the kernel.
#include "gemm/launch_fp8.cuh"

namespace bbk {
namespace {

// Two sums for each element of the tile are in registers, so that 128 tokens are the most.
#define BBK_FP8_SHAPES(V) \
  V(16, 1, 20, 1, 1, 1)   \
  V(16, 1, 20, 2, 1, 1)   \
  V(16, 2, 11, 1, 1, 1)   \
  V(16, 3, 8, 1, 1, 1)    \
  V(32, 1, 17, 1, 1, 1)   \
  V(32, 1, 17, 2, 1, 1)   \
  V(32, 2, 10, 1, 1, 1)   \
  V(32, 3, 7, 1, 1, 1)    \
  V(64, 1, 13, 1, 1, 1)   \
  V(64, 1, 13, 2, 1, 1)   \
  V(64, 2, 9, 1, 1, 1)    \
  V(64, 3, 6, 1, 1, 1)    \
  V(128, 1, 9, 1, 1, 1)   \
  V(128, 1, 9, 2, 1, 1)   \
  V(128, 2, 6, 1, 1, 1)   \
  V(128, 2, 6, 2, 1, 1)   \
  V(128, 3, 5, 1, 1, 1)   \
  V(128, 1, 9, 1, 2, 1)   \
  V(128, 2, 6, 1, 2, 1)   \
  V(128, 3, 5, 1, 2, 1)

}  // namespace

void gemm_fp8(const GemmFp8Params& params, const GemmFp8Tile& tile, bool static_weight, bool programmatic,
              const Launch& launch) {
  check_gemm_fp8(kLinearFp8, params, tile);
  check_aligned(kLinearFp8, "out", params.out, params.out_row_stride);
  if (params.gated && params.bias != nullptr) refuse(kLinearFp8, "bias: expected none with gated, got one");
  if (params.num_tokens == 0 || params.out_features == 0) return;  // an empty grid is a launch error
  const DeviceGuard guard(launch.device, kLinearFp8);
  check_sm90a(kLinearFp8, launch.device);
  if (tile.waves) return gemm_fp8_waves(params, tile, static_weight, programmatic, launch);
  if (params.gated) return gemm_fp8_gated(params, tile, static_weight, programmatic, launch);
  dispatch_gemm_dtype(kLinearFp8, params.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr auto kUse = GemmUse::kLinear;
    BBK_FP8_SHAPES(BBK_FP8_SHAPE)
    refuse_fp8_tile(tile, "");
  });
}

}  // namespace bbk
