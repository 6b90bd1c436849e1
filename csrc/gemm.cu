// Matrix products of a step's few tokens with the transformer's weights, on sm_90: the host side.
// gemm_kernel.cuh holds the kernel.
#include "gemm.h"
#include "gemm_kernel.cuh"
#include "tensor_map.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "linear";

template <class S>
void launch_gemm(const GemmParams& p, bool static_weight, bool programmatic, cudaStream_t stream) {
  const int64_t weight_rows = S::kGated ? 2 * p.out_features : p.out_features;
  constexpr auto kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  const int box_tokens = copied_rows(ceil_div<int64_t>(p.num_tokens, S::kShares));
  const CUtensorMap x_map = tensor_map<2>(kOp, "x", p.x, p.dtype, {p.in_features, p.num_tokens},
                                          {p.x_row_stride}, {S::kBlockK, box_tokens}, kPromotion);
  CUtensorMap weight_map;
  if constexpr (S::kGated) {
    // Eight gates, eight ups, the next eight gates, ...: a thread's two rows are a gate and its up.
    weight_map =
        tensor_map<4>(kOp, "weight", p.weight, p.dtype, {p.in_features, 8, 2, p.out_features / 8},
                      {p.weight_row_stride, p.up_distance * p.weight_row_stride, 8 * p.weight_row_stride},
                      {S::kBlockK, 8, 2, S::kRows / 16}, kPromotion);
  } else {
    weight_map = tensor_map<2>(kOp, "weight", p.weight, p.dtype, {p.in_features, p.out_features},
                               {p.weight_row_stride}, {S::kBlockK, S::kRows / S::kShares}, kPromotion);
  }
  GemmArgs args;
  args.out = p.out;
  args.bias = p.bias;
  args.out_row_stride = p.out_row_stride;
  args.num_tokens = static_cast<int>(p.num_tokens);
  args.box_tokens = box_tokens;
  args.out_features = static_cast<int>(p.out_features);
  args.num_k_blocks = static_cast<int>(ceil_div<int64_t>(p.in_features, S::kBlockK));
  args.static_weight = static_weight;

  check_cuda(
      cudaFuncSetAttribute(gemm_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes),
      kOp);
  cudaLaunchConfig_t config = {};
  const auto tiles = ceil_div<int64_t>(weight_rows, S::kRows);
  config.gridDim = dim3(static_cast<unsigned>(tiles), S::kSplits, S::kShares);
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = S::kSharedBytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = 1;
  attributes[0].val.clusterDim.y = S::kSplits;
  attributes[0].val.clusterDim.z = S::kShares;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs = programmatic ? 2 : 1;
  check_cuda(cudaLaunchKernelEx(&config, gemm_kernel<S>, x_map, weight_map, args), kOp);
}

// tokens of a CTA, warpgroups, pipeline stages, splits, shares, gated
#define BBK_GEMM_SHAPES(V)  \
  V(16, 1, 20, 1, 1, false) \
  V(64, 1, 13, 1, 1, false) \
  V(64, 1, 13, 2, 1, false) \
  V(128, 1, 9, 1, 1, false) \
  V(128, 1, 9, 2, 1, false) \
  V(128, 2, 6, 1, 1, false) \
  V(192, 1, 6, 2, 1, false) \
  V(192, 2, 5, 1, 1, false) \
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
#define BBK_SHAPE(TOKENS, GROUPS, STAGES, SPLITS, SHARES, GATED)                             \
  if (tile.tokens == TOKENS * SHARES && tile.rows == GROUPS * 64 && tile.splits == SPLITS && \
      tile.shares == SHARES && gated == GATED) {                                             \
    return use(GemmShape<T, TOKENS, GROUPS, STAGES, SPLITS, SHARES, GATED>());               \
  }
  BBK_GEMM_SHAPES(BBK_SHAPE)
#undef BBK_SHAPE
  refuse(kOp, "tile: expected a compiled one, got tokens " + std::to_string(tile.tokens) + ", rows " +
                  std::to_string(tile.rows) + ", splits " + std::to_string(tile.splits) + ", shares " +
                  std::to_string(tile.shares) + (gated ? ", gated" : ""));
}

template <typename Use>
void dispatch_tile(const GemmTile& tile, bool gated, DType dtype, Use&& use) {
  switch (dtype) {
    case DType::kFloat16:
      return dispatch_shape<__half>(tile, gated, use);
    case DType::kBFloat16:
      return dispatch_shape<__nv_bfloat16>(tile, gated, use);
    default:
      refuse(kOp, "dtype: expected code 1 or 2, got " + std::to_string(static_cast<int>(dtype)));
  }
}

}  // namespace

bool gemm_is_available(int device) {
  const DeviceGuard guard(device, kOp);
  int major = 0, minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kOp);
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), kOp);
  if (major != 9 || minor != 0) return false;
  // Code that the driver compiled from the PTX of sm_80 runs too, but is empty.
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, gemm_kernel<GemmShape<__half, 256, 3, 4, 1, 1, true>>), kOp);
  return attributes.ptxVersion >= 90;
}

void gemm(const GemmParams& params, const GemmTile& tile, bool static_weight, bool programmatic,
          const Launch& launch) {
  check_at_least(kOp, "num_tokens", params.num_tokens, 0);
  check_at_least(kOp, "in_features", params.in_features, 1);
  check_at_least(kOp, "out_features", params.out_features, 0);
  if (params.num_tokens > tile.tokens) {
    refuse(kOp, "num_tokens: expected at most the tile's " + std::to_string(tile.tokens) + ", got " +
                    std::to_string(params.num_tokens));
  }
  if (params.in_features % 8 != 0) {
    refuse(kOp, "in_features: expected a multiple of 8, got " + std::to_string(params.in_features));
  }
  if (params.out_features % 8 != 0) {
    refuse(kOp, "out_features: expected a multiple of 8, got " + std::to_string(params.out_features));
  }
  if (params.gated && params.bias != nullptr) refuse(kOp, "bias: expected none with gated, got one");
  if (params.gated && params.up_distance < params.out_features) {
    refuse(kOp, "up_distance: expected at least out_features, " + std::to_string(params.out_features) +
                    ", got " + std::to_string(params.up_distance));
  }
  check_aligned(kOp, "x", params.x, params.x_row_stride);
  check_aligned(kOp, "weight", params.weight, params.weight_row_stride);
  check_aligned(kOp, "out", params.out, params.out_row_stride);
  dispatch_tile(tile, params.gated, params.dtype, [&](auto shape) {
    using S = decltype(shape);
    // Every split must have something to add up.
    if (params.in_features <= (S::kSplits - 1) * S::kBlockK) {
      refuse(kOp, "in_features: expected more than " + std::to_string((S::kSplits - 1) * S::kBlockK) +
                      " with " + std::to_string(S::kSplits) + " splits, got " +
                      std::to_string(params.in_features));
    }
    if (params.num_tokens == 0 || params.out_features == 0) return;  // an empty grid is a launch error
    const DeviceGuard guard(launch.device, kOp);
    if (!gemm_is_available(launch.device)) {
      throw std::runtime_error(
          "blockbatch_kernels.linear: expected a GPU of sm_90 and an extension built for 90a");
    }
    launch_gemm<S>(params, static_weight, programmatic, launch.stream);
  });
}

}  // namespace bbk
