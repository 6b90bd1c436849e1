// Launches the kernel of e4m3 for any number of tokens, on sm_90.
#pragma once

#include "gemm/kernel_fp8_waves.cuh"
#include "gemm/launch_fp8.cuh"

namespace bbk {

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

// On the current device, which is the launch's. `rope`: where heads are rotated, and `out` is not written.
template <class S>
void launch_waves(const GemmFp8Params& p, bool static_weight, bool programmatic, const Launch& launch,
                  [[maybe_unused]] const RopeKvWriteParams& rope = {}) {
  constexpr auto kKernel = gemm_fp8_waves_kernel<S>;
  GemmFp8WavesArgs<S> args{};
  static_cast<GemmFp8Args&>(args) = fp8_args<S>(p, S::kTokens, static_weight);
  args.token_groups = static_cast<int>(ceil_div<int64_t>(p.num_tokens, S::kTokens * S::kMulticast));
  args.num_tiles = static_cast<int>(fp8_row_tiles<S>(p) / S::kXMulticast * args.token_groups);
  LaunchConfig config = {dim3(), S::kThreads, WavesLayout<S>::kSharedBytes, programmatic,
                         dim3(S::kXMulticast, 1, S::kMulticast)};
  const int clusters = std::min(args.num_tiles, resident_clusters<kKernel>(launch.device, config));
  config.grid = dim3(static_cast<unsigned>(clusters * S::kXMulticast), 1, S::kMulticast);
  CUtensorMap out_map{};
  if constexpr (S::kRotated) {
    args.rope = rope;
  } else {
    out_map = tensor_map<2>(kLinearFp8, "out", p.out, p.dtype, {p.out_features, p.num_tokens},
                            {p.out_row_stride}, {S::kOutColumns, S::kTokens}, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                            S::kGated ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B);
  }
  launch_kernel<kKernel>(kLinearFp8, launch, config, fp8_x_map<S>(p, S::kTokens),
                         fp8_weight_map<S>(p, rope.head_dim), out_map, args);
}

}  // namespace bbk
