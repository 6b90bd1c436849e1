// The product of q, k and v that rotates and stores them itself: kernel.cuh with heads for rows.
#include "gemm/launch.cuh"
#include "gemm/launch_rope.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "linear_rope_kv_write";

// tokens of a CTA, warpgroups, pipeline stages, multicast
#define BBK_ROTATED_SHAPES(V) \
  V(16, 1, 20, 1)             \
  V(64, 1, 13, 1)             \
  V(128, 1, 9, 1)             \
  V(128, 2, 6, 1)             \
  V(192, 2, 5, 1)             \
  V(128, 3, 5, 2)

// Calls use(shape) with the compiled shape of this tile.
template <typename T, GemmUse kUse, typename Use>
void dispatch_shape(const GemmTile& tile, Use&& use) {
#define BBK_SHAPE(TOKENS, GROUPS, STAGES, MULTICAST)                                        \
  if (tile.tokens == TOKENS * MULTICAST && tile.rows == GROUPS * 64 && tile.split_k == 1 && \
      tile.multicast == MULTICAST) {                                                        \
    return use(GemmShape<T, TOKENS, GROUPS, STAGES, 1, MULTICAST, kUse>());                 \
  }
  BBK_ROTATED_SHAPES(BBK_SHAPE)
#undef BBK_SHAPE
  refuse_tile(kOp, tile, "");
}

}  // namespace

void linear_rope_kv_write(const GemmParams& params, const RopeKvWriteParams& rope, const GemmTile& tile,
                          bool static_weight, bool programmatic, const Launch& launch) {
  check_gemm(kOp, params, tile);
  check_rotated(kOp, params.num_tokens, params.out_features, params.dtype, rope);
  dispatch_gemm_dtype(kOp, params.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto use = [&](auto shape) {
      check_vectors<T>(kOp, rope);
      if (params.num_tokens == 0 || params.out_features == 0) return;  // an empty grid is a launch error
      const DeviceGuard guard(launch.device, kOp);
      check_sm90a(kOp, launch.device);
      RotatedGemmArgs args;
      args.rope = rope;
      launch_gemm<decltype(shape)>(kOp, params, args, static_weight, programmatic, launch);
    };
    // Caches in the dtype of the product have kernels that know no others.
    if (rope.k_scale == nullptr) return dispatch_shape<T, GemmUse::kRopeKvWrite>(tile, use);
    dispatch_shape<T, GemmUse::kRopeKvWriteAny>(tile, use);
  });
}

}  // namespace bbk
