// Entry point of varlen_attention: checks, the choice of the kernel, and the sum over pieces of keys.
#include <cmath>

#include "attention/work_tiles.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "varlen_attention";
constexpr int kCombineThreads = 256;
constexpr int kMaxHeadDim = 256;

// Joins the partial results of every query whose row reaches into several pieces, in the order of the pieces.
// One CTA a token; a thread takes kVec neighbouring elements of a head.
template <typename T, int kVec>
__global__ void __launch_bounds__(kCombineThreads)
    combine_pieces_kernel(const __grid_constant__ AttentionParams params) {
  wait_for_predecessors();
  allow_successors();
  const int token = blockIdx.x;
  const int row = params.token_row[token];
  if (row < 0 || single_piece(params, token)) return;
  const int length = params.seqlens_k[row];
  int num_pieces = 0;
  while (num_pieces < params.counts[1] && params.pieces[2 * num_pieces] < length) ++num_pieces;

  const int64_t piece_stride = static_cast<int64_t>(params.num_tokens) * params.num_heads;
  for (int i = threadIdx.x * kVec; i < params.num_heads * params.head_dim; i += kCombineThreads * kVec) {
    const int64_t place = static_cast<int64_t>(token) * params.num_heads + i / params.head_dim;
    const float* lse = params.partial_lse + place;
    float most = -INFINITY;
    for (int piece = 0; piece < num_pieces; ++piece) most = fmaxf(most, lse[piece * piece_stride]);
    float total = 0.0f;
    float sum[kVec] = {};
#pragma unroll 4
    for (int piece = 0; piece < num_pieces; ++piece) {
      const float weight = exp2f(lse[piece * piece_stride] - most);
      const float* partial =
          params.partial_out + (piece * piece_stride + place) * params.head_dim + i % params.head_dim;
      float values[kVec];
      if constexpr (kVec == 4) {
        *reinterpret_cast<float4*>(values) = *reinterpret_cast<const float4*>(partial);
      } else {
        values[0] = *partial;
      }
      total += weight;
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum[j] = fmaf(weight, values[j], sum[j]);
    }
    T* out = static_cast<T*>(params.out) + place * params.head_dim + i % params.head_dim;
#pragma unroll
    for (int j = 0; j < kVec; ++j) out[j] = from_float<T>(sum[j] / total);
  }
}

void combine_pieces(const AttentionParams& params, const Launch& launch) {
  dispatch_dtype(params.dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    const LaunchConfig config{dim3(static_cast<unsigned>(params.num_tokens)), kCombineThreads, 0,
                              params.programmatic};
    if (params.head_dim % 4 == 0) {
      launch_kernel<combine_pieces_kernel<T, 4>>(kOp, launch, config, params);
    } else {
      launch_kernel<combine_pieces_kernel<T, 1>>(kOp, launch, config, params);
    }
  });
}

void check_attention(const AttentionParams& params) {
  check_at_least(kOp, "num_tokens", params.num_tokens, 0);
  check_at_least(kOp, "num_kv_heads", params.num_kv_heads, 1);
  check_at_least(kOp, "num_heads", params.num_heads, params.num_kv_heads);
  check_at_least(kOp, "head_dim", params.head_dim, 1);
  check_at_least(kOp, "page_size", params.page_size, 1);
  check_at_least(kOp, "tile_tokens", params.tile_tokens, 1);
  check_at_least(kOp, "max_pieces", params.max_pieces, 1);
  if ((params.k_scale == nullptr) != (params.v_scale == nullptr)) {
    refuse(kOp, "k_scale and v_scale: expected both or none, got one");
  }
  if (params.head_dim > kMaxHeadDim) {
    refuse(kOp, "head_dim: expected at most " + std::to_string(kMaxHeadDim) + ", got " +
                    std::to_string(params.head_dim));
  }
  // The running maximum is kept before the scale, whose sign therefore matters.
  if (!(params.softmax_scale > 0.0f) || !std::isfinite(params.softmax_scale)) {
    refuse(kOp, "softmax_scale: expected a positive number, got " + std::to_string(params.softmax_scale));
  }
}

}  // namespace

void varlen_attention(const AttentionParams& params, const Launch& launch) {
  check_attention(params);
  if (params.num_tokens == 0) return;
  const DeviceGuard guard(launch.device, kOp);
  if (attention_sm90_serves(params, launch)) {
    if (params.max_units > 0) return attention_stream_k(params, launch);
    attention_sm90(params, launch);
  } else if (params.k_scale == nullptr && attention_mma_serves(params)) {
    attention_mma(params, launch);
  } else {
    attention_plain(params, launch);
  }
  if (params.max_pieces > 1) combine_pieces(params, launch);
}

}  // namespace bbk
