// The product of q, k and v that rotates and stores them itself: kernel.cuh with heads for rows.
#include "gemm/launch.cuh"

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
template <typename T, typename Use>
void dispatch_shape(const GemmTile& tile, Use&& use) {
#define BBK_SHAPE(TOKENS, GROUPS, STAGES, MULTICAST)                                         \
  if (tile.tokens == TOKENS * MULTICAST && tile.rows == GROUPS * 64 && tile.split_k == 1 &&  \
      tile.multicast == MULTICAST) {                                                         \
    return use(GemmShape<T, TOKENS, GROUPS, STAGES, 1, MULTICAST, GemmUse::kRopeKvWrite>()); \
  }
  BBK_ROTATED_SHAPES(BBK_SHAPE)
#undef BBK_SHAPE
  refuse_tile(kOp, tile, "");
}

void check(const GemmParams& params, const RopeKvWriteParams& rope) {
  check_rope(kOp, rope);
  if (rope.head_dim % 64 != 0) {
    refuse(kOp, "head_dim: expected a multiple of 64, got " + std::to_string(rope.head_dim));
  }
  const int64_t rows = (rope.num_heads + 2LL * rope.num_kv_heads) * rope.head_dim;
  if (params.out_features != rows) {
    refuse(kOp,
           "out_features: expected " + std::to_string(rows) + ", got " + std::to_string(params.out_features));
  }
  if (params.num_tokens != rope.num_tokens || params.dtype != rope.dtype) {
    refuse(kOp, "rope: expected the tokens and dtype of the product");
  }
}

}  // namespace

void linear_rope_kv_write(const GemmParams& params, const RopeKvWriteParams& rope, const GemmTile& tile,
                          bool static_weight, bool programmatic, const Launch& launch) {
  check_gemm(kOp, params, tile);
  check(params, rope);
  dispatch_gemm_dtype(kOp, params.dtype, [&](auto zero) {
    using T = decltype(zero);
    dispatch_shape<T>(tile, [&](auto shape) {
      if (!writes_vectors<T>(rope)) {
        refuse(kOp, "q, k_cache, v_cache, cos, sin: expected addresses and strides of whole 16 bytes");
      }
      if (params.num_tokens == 0 || params.out_features == 0) return;  // an empty grid is a launch error
      const DeviceGuard guard(launch.device, kOp);
      check_sm90a(kOp, launch.device);
      RotatedGemmArgs args;
      args.rope = rope;
      launch_gemm<decltype(shape)>(kOp, params, args, static_weight, programmatic, launch);
    });
  });
}

}  // namespace bbk
