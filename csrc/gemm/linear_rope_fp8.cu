// The product of q, k and v in e4m3 that rotates and stores them itself, on sm_90: kernel_fp8.cuh and
// kernel_fp8_waves.cuh with heads for rows.
#include "gemm/launch_fp8_waves.cuh"
#include "gemm/launch_rope.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "linear_rope_kv_write_fp8";

// For few tokens: tokens of a CTA, warpgroups, pipeline stages, split_k, multicast
#define BBK_ROTATED_FP8_SHAPES(V) \
  V(16, 1, 20, 1, 1)              \
  V(16, 2, 11, 1, 1)              \
  V(32, 1, 17, 1, 1)              \
  V(32, 2, 10, 1, 1)              \
  V(64, 1, 13, 1, 1)              \
  V(64, 2, 9, 1, 1)               \
  V(128, 1, 9, 1, 1)              \
  V(128, 2, 6, 1, 1)              \
  V(128, 2, 6, 2, 1)              \
  V(128, 2, 6, 1, 2)

// For any number of tokens: tokens of a CTA, warpgroups, pipeline stages, multicast, x_multicast
#define BBK_ROTATED_FP8_WAVES(V) \
  V(128, 2, 5, 2, 1)             \
  V(128, 3, 4, 2, 1)             \
  V(128, 3, 4, 1, 2)

constexpr auto kUse = GemmUse::kRopeKvWriteAny;

bool is_tile(const GemmFp8Tile& tile, int tokens, int rows, int split_k, int multicast, int x_multicast,
             bool waves) {
  return tile.tokens == tokens && tile.rows == rows && tile.split_k == split_k &&
         tile.multicast == multicast && tile.x_multicast == x_multicast && tile.waves == waves;
}

}  // namespace

void linear_rope_kv_write_fp8(const GemmFp8Params& params, const RopeKvWriteParams& rope,
                              const GemmFp8Tile& tile, bool static_weight, bool programmatic,
                              const Launch& launch) {
  check_gemm_fp8(kOp, params, tile);
  check_rotated(kOp, params.num_tokens, params.out_features, params.dtype, rope);
  dispatch_gemm_dtype(kOp, params.dtype, [&](auto zero) {
    using T = decltype(zero);
    check_vectors<T>(kOp, rope);
    if (params.num_tokens == 0 || params.out_features == 0) return;  // an empty grid is a launch error
    const DeviceGuard guard(launch.device, kOp);
    check_sm90a(kOp, launch.device);
#define BBK_SHAPE(TOKENS, GROUPS, STAGES, SPLIT_K, MULTICAST)                               \
  if (is_tile(tile, TOKENS * MULTICAST, GROUPS * 64, SPLIT_K, MULTICAST, 1, false)) {       \
    return launch_gemm_fp8<GemmShape<T, TOKENS, GROUPS, STAGES, SPLIT_K, MULTICAST, kUse>>( \
        params, static_weight, programmatic, launch, rope);                                 \
  }
#define BBK_WAVES(TOKENS, GROUPS, STAGES, MULTICAST, X_MULTICAST)                               \
  if (is_tile(tile, TOKENS * MULTICAST, GROUPS * 64, 1, MULTICAST, X_MULTICAST, true)) {        \
    return launch_waves<GemmShape<T, TOKENS, GROUPS, STAGES, 1, MULTICAST, kUse, X_MULTICAST>>( \
        params, static_weight, programmatic, launch, rope);                                     \
  }
    BBK_ROTATED_FP8_SHAPES(BBK_SHAPE)
    BBK_ROTATED_FP8_WAVES(BBK_WAVES)
#undef BBK_SHAPE
#undef BBK_WAVES
    refuse_fp8_tile(tile, tile.waves ? ", waves, rotated" : ", rotated", kOp);
  });
}

}  // namespace bbk
