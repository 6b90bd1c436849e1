// Products in e4m3 with the transformer's weights, on sm_90: what is compiled for any number of tokens, with
// and without an activation behind them. kernel_fp8_waves.cuh holds the kernel.
#include "gemm/kernel_fp8_waves.cuh"
#include "gemm/launch_fp8.cuh"

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
// ... overlap
#define BBK_FP8_WAVES_OVERLAPPING(V) \
  V(128, 2, 6, 1, 2, 1)              \
  V(128, 2, 6, 2, 1, 1)              \
  V(128, 3, 4, 1, 2, 1)              \
  V(128, 3, 4, 2, 1, 1)              \
  V(160, 2, 5, 1, 2, 1)              \
  V(160, 2, 5, 2, 1, 1)              \
  V(192, 2, 4, 1, 2, 1)              \
  V(192, 2, 4, 2, 1, 1)

// Stages that fit beside the boxes of an activation's results, which are half as wide.
constexpr int gated_stages(int tokens, int groups) {
  const int room = 232448 - groups * tokens * (64 + 4);
  return room / ((groups * 64 + tokens) * kSwizzledRowBytes + 16);
}

// Clusters that the current device, which is `device`, runs at once.
template <auto kKernel>
int resident_clusters(int device, const LaunchConfig& config) {
  static PerDevice known;
  return known.get(device, [&] {
    allow_shared_bytes<kKernel>(kLinearFp8, device, config.shared_bytes);
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = config.cluster.x;
    attribute.val.clusterDim.y = config.cluster.y;
    attribute.val.clusterDim.z = config.cluster.z;
    cudaLaunchConfig_t all = {};
    all.gridDim = config.cluster;
    all.blockDim = dim3(static_cast<unsigned>(config.threads));
    all.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes);
    all.attrs = &attribute;
    all.numAttrs = 1;
    int count = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&count, kKernel, &all), kLinearFp8);
    return count > 0 ? count : 1;
  });
}

// On the current device, which is the launch's.
template <class S>
void launch_waves(const GemmFp8Params& p, bool static_weight, bool programmatic, const Launch& launch) {
  constexpr auto kKernel = gemm_fp8_waves_kernel<S>;
  GemmFp8WavesArgs args{fp8_args<S>(p, S::kTokens, static_weight), 0, 0};
  args.token_groups = static_cast<int>(ceil_div<int64_t>(p.num_tokens, S::kTokens * S::kMulticast));
  args.num_tiles = static_cast<int>(fp8_row_tiles<S>(p) / S::kXMulticast * args.token_groups);
  LaunchConfig config = {dim3(), S::kThreads, WavesLayout<S>::kSharedBytes, programmatic,
                         dim3(S::kXMulticast, 1, S::kMulticast)};
  const int clusters = std::min(args.num_tiles, resident_clusters<kKernel>(launch.device, config));
  config.grid = dim3(static_cast<unsigned>(clusters * S::kXMulticast), 1, S::kMulticast);
  const CUtensorMap out_map =
      tensor_map<2>(kLinearFp8, "out", p.out, p.dtype, {p.out_features, p.num_tokens}, {p.out_row_stride},
                    {S::kOutColumns, S::kTokens}, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                    S::kGated ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B);
  launch_kernel<kKernel>(kLinearFp8, launch, config, fp8_x_map<S>(p, S::kTokens), fp8_weight_map<S>(p),
                         out_map, args);
}

}  // namespace

void gemm_fp8_waves(const GemmFp8Params& params, const GemmFp8Tile& tile, bool static_weight,
                    bool programmatic, const Launch& launch) {
#define BBK_SHAPE_OF(TOKENS, GROUPS, STAGES, MULTICAST, X_MULTICAST, OVERLAP)                          \
  if (tile.tokens == TOKENS * MULTICAST && tile.rows == GROUPS * 64 && tile.split_k == 1 &&            \
      tile.multicast == MULTICAST && tile.x_multicast == X_MULTICAST && tile.overlap == OVERLAP) {     \
    constexpr auto kOverlap = static_cast<Overlap>(OVERLAP);                                           \
    return params.gated                                                                                \
               ? launch_waves<GemmShape<T, TOKENS, GROUPS, gated_stages(TOKENS, GROUPS), 1, MULTICAST, \
                                        GemmUse::kRoundedSwiglu, X_MULTICAST, kOverlap>>(              \
                     params, static_weight, programmatic, launch)                                      \
               : launch_waves<GemmShape<T, TOKENS, GROUPS, STAGES, 1, MULTICAST, GemmUse::kLinear,     \
                                        X_MULTICAST, kOverlap>>(params, static_weight, programmatic,   \
                                                                launch);                               \
  }
#define BBK_SHAPE(TOKENS, GROUPS, STAGES, MULTICAST, X_MULTICAST) \
  BBK_SHAPE_OF(TOKENS, GROUPS, STAGES, MULTICAST, X_MULTICAST, 0)
  dispatch_gemm_dtype(kLinearFp8, params.dtype, [&](auto zero) {
    using T = decltype(zero);
    BBK_FP8_WAVES(BBK_SHAPE)
    BBK_FP8_WAVES_OVERLAPPING(BBK_SHAPE_OF)
    refuse_fp8_tile(tile, ", waves");
  });
#undef BBK_SHAPE
#undef BBK_SHAPE_OF
}

}  // namespace bbk
