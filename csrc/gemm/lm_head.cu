// Top token and its softmax probability from logits that come in chunks of the vocabulary. A warp reduces one
// row over one piece of the vocabulary, then a warp per row merges its pieces.
//
// A NaN counts as the highest logit, as torch's argmax has it; the row's probabilities are then NaN.
#include <climits>

#include "common/elements.cuh"
#include "common/launch.cuh"
#include "gemm/lm_head.h"
#include "gemm/lm_head_math.cuh"

namespace bbk {
namespace {

constexpr char kReduceOp[] = "lm_head_reduce";
constexpr char kFinishOp[] = "lm_head_finish";
constexpr int kWarps = 4;
constexpr int kBatch = 4;  // vectors a lane asks for before it uses the first

// A lane's share of a piece, batch after batch: kBatch vectors, a warp's width apart.
template <typename T, bool kAligned>
struct PieceReader {
  static constexpr int kSize = Vec<T>::kSize;
  static constexpr int kBatchTokens = 32 * kBatch * kSize;
  static constexpr int kBatches = kLmHeadPieceTokens / kBatchTokens;
  using Batch = float[kBatch][kSize];

  const T* logits;  // of the row, from the piece's first token on
  int num_tokens;   // of the piece that are there
  int suppress;     // place in the piece, or a negative number

  __device__ __forceinline__ int place(int batch, int vec) const {
    return batch * kBatchTokens + (vec * 32 + static_cast<int>(threadIdx.x % 32)) * kSize;
  }

  // What is not there, and the suppressed token, is minus infinity.
  __device__ __forceinline__ void load(int batch, Batch& values) const {
    if (kAligned && (batch + 1) * kBatchTokens <= num_tokens) {
      Vec<T> vecs[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) vecs[i] = *reinterpret_cast<const Vec<T>*>(logits + place(batch, i));
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) values[i][j] = to_float(vecs[i].values[j]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          const int at = place(batch, i) + j;
          values[i][j] = at < num_tokens ? to_float(logits[at]) : -INFINITY;
        }
      }
    }
    if (suppress >= batch * kBatchTokens && suppress < (batch + 1) * kBatchTokens) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          if (place(batch, i) + j == suppress) values[i][j] = -INFINITY;
        }
      }
    }
  }
};

// By halves: one after the other, small weights would vanish beside the sum of many.
template <int kSize>
__device__ __forceinline__ float sum_of(const float (&values)[kSize]) {
  float sums[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) sums[i] = values[i];
#pragma unroll
  for (int width = kSize / 2; width > 0; width /= 2) {
#pragma unroll
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  }
  return sums[0];
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kWarps * 32) lm_head_reduce_kernel(LmHeadReduceParams params) {
  using Reader = PieceReader<T, kAligned>;
  const int64_t pieces = (params.num_tokens + kLmHeadPieceTokens - 1) / kLmHeadPieceTokens;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (index >= params.num_rows * pieces) return;
  const int64_t row = index / pieces;
  const int64_t start = index % pieces * kLmHeadPieceTokens;
  const int64_t first_token = params.first_token + start;
  const int64_t left = params.num_tokens - start;
  const int64_t suppress = params.suppress_token - first_token;
  Reader reader;
  reader.logits = static_cast<const T*>(params.logits) + row * params.row_stride + start;
  reader.num_tokens = static_cast<int>(left < kLmHeadPieceTokens ? left : kLmHeadPieceTokens);
  reader.suppress = params.suppress_token >= 0 && suppress >= 0 && suppress < kLmHeadPieceTokens
                        ? static_cast<int>(suppress)
                        : INT_MIN / 2;

  typename Reader::Batch values;
  float highest = -INFINITY;
  double sum = 0.0;  // a few operations a batch, which keep the error at that of one rounding
  int best_batch = 0;
  for (int batch = 0; batch < Reader::kBatches; ++batch) {
    if (batch * Reader::kBatchTokens >= reader.num_tokens) break;
    reader.load(batch, values);
    float batch_highest = values[0][0];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int j = 0; j < Reader::kSize; ++j) batch_highest = max_or_nan(batch_highest, values[i][j]);
    }
    if (is_higher(batch_highest, highest)) best_batch = batch;
    const float before = highest;
    highest = max_or_nan(highest, batch_highest);
    const float reference = reference_of(highest);
    float vec_sums[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int j = 0; j < Reader::kSize; ++j) values[i][j] = weight_of(values[i][j], reference);
      vec_sums[i] = sum_of(values[i]);
    }
    sum = sum * weight_of(before, reference) + sum_of(vec_sums);
  }

  float piece_highest = highest;
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    piece_highest = max_or_nan(piece_highest, __shfl_xor_sync(~0u, piece_highest, mask));
  }
  sum *= weight_of(highest, reference_of(piece_highest));
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) sum += __shfl_xor_sync(~0u, sum, mask);

  // Only here the place within a batch is looked for: in the loop it would cost as much as the sum.
  int best_place = INT_MAX;
  if (!is_higher(piece_highest, highest)) {
    reader.load(best_batch, values);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int j = 0; j < Reader::kSize; ++j) {
        if (!is_higher(piece_highest, values[i][j]))
          best_place = min(best_place, reader.place(best_batch, i) + j);
      }
    }
  }
  best_place = __reduce_min_sync(~0u, best_place);

  if (threadIdx.x % 32 == 0) {
    LmHeadPartial partial{piece_highest, static_cast<float>(sum),
                          static_cast<int32_t>(first_token + best_place), -INFINITY};
    if (params.probe_tokens != nullptr) {
      const int64_t probe = params.probe_tokens[row] - first_token;
      if (probe >= 0 && probe < reader.num_tokens && probe != reader.suppress) {
        partial.probe = to_float(reader.logits[probe]);
      }
    }
    params.partials[row * params.num_pieces + first_token / kLmHeadPieceTokens] = partial;
  }
}

__global__ void __launch_bounds__(kWarps * 32) lm_head_finish_kernel(LmHeadFinishParams params) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= params.num_rows) return;
  const LmHeadPartial* partials = params.partials + row * params.num_pieces;
  LmHeadTotal total{-INFINITY, 0.0, INT_MAX};
  for (int64_t piece = threadIdx.x % 32; piece < params.num_pieces; piece += 32) {
    merge(total, partials[piece].highest, partials[piece].sum, partials[piece].token);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    const float highest = __shfl_xor_sync(~0u, total.highest, mask);
    const double sum = __shfl_xor_sync(~0u, total.sum, mask);
    const int32_t token = __shfl_xor_sync(~0u, total.token, mask);
    merge(total, highest, sum, token);
  }
  if (threadIdx.x % 32 != 0) return;
  if (params.parts != nullptr) {
    float probe_logit = -INFINITY;
    if (params.probe_tokens != nullptr) {
      const int64_t probe = params.probe_tokens[row] - params.first_token;
      if (probe >= 0 && probe < params.vocab_size) probe_logit = partials[probe / params.piece_tokens].probe;
    }
    const float token = static_cast<float>(params.first_token + total.token);
    float* part = params.parts + 4 * row;
    part[0] = total.highest;
    part[1] = static_cast<float>(total.sum);
    part[2] = token;
    part[3] = probe_logit;
    return;
  }
  // Nothing but minus infinity has no softmax.
  const float none = __int_as_float(0x7fffffff);
  const double sum = total.highest == -INFINITY ? none : total.sum;
  params.top_token[row] = total.token;
  params.confidence[row] = static_cast<float>(1.0 / sum);
  if (params.probe_probability != nullptr) {
    const int64_t probe = params.probe_tokens[row];
    const bool known = probe >= 0 && probe < params.vocab_size;
    const float logit = known ? partials[probe / params.piece_tokens].probe : none;
    params.probe_probability[row] = static_cast<float>(expf(logit - total.highest) / sum);
  }
}

}  // namespace

void lm_head_reduce(const LmHeadReduceParams& params, const Launch& launch) {
  check_at_least(kReduceOp, "num_rows", params.num_rows, 0);
  check_at_least(kReduceOp, "num_tokens", params.num_tokens, 0);
  check_at_least(kReduceOp, "num_pieces", params.num_pieces,
                 ceil_div<int64_t>(params.first_token + params.num_tokens, kLmHeadPieceTokens));
  if (params.first_token < 0 || params.first_token % kLmHeadPieceTokens != 0) {
    refuse(kReduceOp, "first_token: expected a multiple of " + std::to_string(kLmHeadPieceTokens) + ", got " +
                          std::to_string(params.first_token));
  }
  dispatch_dtype(params.dtype, kReduceOp, [&](auto zero) {
    using T = decltype(zero);
    if (params.num_rows == 0 || params.num_tokens == 0) return;
    const DeviceGuard guard(launch.device, kReduceOp);
    const int64_t warps = params.num_rows * ceil_div<int64_t>(params.num_tokens, kLmHeadPieceTokens);
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(warps, kWarps)));
    const bool aligned = reinterpret_cast<uintptr_t>(params.logits) % sizeof(Vec<T>) == 0 &&
                         params.row_stride % Vec<T>::kSize == 0;
    if (aligned) {
      launch_kernel<lm_head_reduce_kernel<T, true>>(kReduceOp, launch, {grid, kWarps * 32}, params);
    } else {
      launch_kernel<lm_head_reduce_kernel<T, false>>(kReduceOp, launch, {grid, kWarps * 32}, params);
    }
  });
}

void lm_head_finish(const LmHeadFinishParams& params, const Launch& launch) {
  check_at_least(kFinishOp, "num_rows", params.num_rows, 0);
  check_at_least(kFinishOp, "num_pieces", params.num_pieces, 1);
  check_at_least(kFinishOp, "piece_tokens", params.piece_tokens, 1);
  if (params.num_rows == 0) return;
  const DeviceGuard guard(launch.device, kFinishOp);
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(params.num_rows, kWarps)));
  launch_kernel<lm_head_finish_kernel>(kFinishOp, launch, {grid, kWarps * 32}, params);
}

}  // namespace bbk
