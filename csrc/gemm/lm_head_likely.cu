// As lm_head.cu: top token and confidence from logits that come in chunks of the vocabulary, and beside them
// every token whose probability, with no token left out, is above kLeastLikely. A warp reduces one row over
// one piece of the vocabulary and keeps its four highest logits, among which all likely tokens of the piece
// are; then a warp per row merges its pieces.
#include <climits>

#include "common/elements.cuh"
#include "common/launch.cuh"
#include "gemm/lm_head.h"
#include "gemm/lm_head_math.cuh"

namespace bbk {
namespace {

constexpr char kReduceOp[] = "lm_head_likely_reduce";
constexpr char kFinishOp[] = "lm_head_likely_finish";
constexpr int kWarps = 4;
constexpr float kLeastLikely = 0.2f;

// The highest logits that a lane has seen, falling; of equal ones the first seen stands first.
struct Highest {
  float logits[kNumLikelyTokens];
  int32_t tokens[kNumLikelyTokens];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kNumLikelyTokens; ++i) {
      logits[i] = -INFINITY;
      tokens[i] = INT_MAX;
    }
  }

  __device__ __forceinline__ void add(float logit, int32_t token) {
    if (!is_higher(logit, logits[kNumLikelyTokens - 1])) return;
    logits[kNumLikelyTokens - 1] = logit;
    tokens[kNumLikelyTokens - 1] = token;
#pragma unroll
    for (int i = kNumLikelyTokens - 1; i > 0; --i) {
      if (!is_higher(logits[i], logits[i - 1])) break;
      const float higher = logits[i];
      const int32_t its_token = tokens[i];
      logits[i] = logits[i - 1];
      tokens[i] = tokens[i - 1];
      logits[i - 1] = higher;
      tokens[i - 1] = its_token;
    }
  }

  // Takes the highest logit of all lanes away, of equal ones the lowest token; the same for every lane.
  __device__ __forceinline__ void pop(float* logit, int32_t* token) {
    float best = logits[0];
    int32_t its_token = tokens[0];
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
      const float other = __shfl_xor_sync(~0u, best, mask);
      const int32_t other_token = __shfl_xor_sync(~0u, its_token, mask);
      if (is_higher(other, best) || (!is_higher(best, other) && other_token < its_token)) {
        best = other;
        its_token = other_token;
      }
    }
    *logit = best;
    *token = its_token;
    if (tokens[0] != its_token) return;
#pragma unroll
    for (int i = 0; i + 1 < kNumLikelyTokens; ++i) {
      logits[i] = logits[i + 1];
      tokens[i] = tokens[i + 1];
    }
    logits[kNumLikelyTokens - 1] = -INFINITY;
    tokens[kNumLikelyTokens - 1] = INT_MAX;
  }
};

// Calls use(logit, place) for the lane's share of a piece, by rising place.
template <typename T, bool kAligned, typename Use>
__device__ __forceinline__ void for_each_logit(const T* logits, int num_tokens, Use use) {
  constexpr int kSize = kAligned ? Vec<T>::kSize : 1;
  for (int first = static_cast<int>(threadIdx.x % 32) * kSize; first < num_tokens; first += 32 * kSize) {
    if (kAligned && first + kSize <= num_tokens) {
      const Vec<T> values = *reinterpret_cast<const Vec<T>*>(logits + first);
#pragma unroll
      for (int i = 0; i < kSize; ++i) use(to_float(values.values[i]), first + i);
    } else {
      for (int i = first; i < num_tokens && i < first + kSize; ++i) use(to_float(logits[i]), i);
    }
  }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kWarps * 32) likely_reduce_kernel(LmHeadLikelyReduceParams params) {
  const int64_t pieces = (params.num_tokens + kLmHeadPieceTokens - 1) / kLmHeadPieceTokens;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (index >= params.num_rows * pieces) return;
  const int64_t row = index / pieces;
  const int64_t start = index % pieces * kLmHeadPieceTokens;
  const int64_t first_token = params.first_token + start, left = params.num_tokens - start;
  const T* logits = static_cast<const T*>(params.logits) + row * params.row_stride + start;
  const int num_tokens = static_cast<int>(left < kLmHeadPieceTokens ? left : kLmHeadPieceTokens);
  const int64_t suppress = params.suppress_token - first_token;
  const bool suppresses = params.suppress_token >= 0 && suppress >= 0 && suppress < num_tokens;

  Highest highest;
  highest.clear();
  float top = -INFINITY;
  int32_t top_place = INT_MAX;
  for_each_logit<T, kAligned>(logits, num_tokens, [&](float logit, int place) {
    highest.add(logit, static_cast<int32_t>(first_token + place));
    if (suppresses && place == suppress) logit = -INFINITY;
    // The first of equal ones, and a place also where all are minus infinity.
    if (is_higher(logit, top) || top_place == INT_MAX) {
      top = logit;
      top_place = place;
    }
  });
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    const float other = __shfl_xor_sync(~0u, top, mask);
    const int32_t other_place = __shfl_xor_sync(~0u, top_place, mask);
    if (is_higher(other, top) || (!is_higher(top, other) && other_place < top_place)) {
      top = other;
      top_place = other_place;
    }
  }

  const float reference = reference_of(top);
  double sum = 0.0;  // keeps the error at that of one rounding
  for_each_logit<T, kAligned>(logits, num_tokens, [&](float logit, int place) {
    if (!(suppresses && place == suppress)) sum += weight_of(logit, reference);
  });
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) sum += __shfl_xor_sync(~0u, sum, mask);

  LmHeadLikelyPartial partial;
  partial.highest = top;
  partial.sum = static_cast<float>(sum);
  partial.token = static_cast<int32_t>(first_token + top_place);
  partial.suppressed = suppresses ? to_float(logits[suppress]) : -INFINITY;
#pragma unroll
  for (int i = 0; i < kNumLikelyTokens; ++i)
    highest.pop(&partial.likely_logits[i], &partial.likely_tokens[i]);
  if (threadIdx.x % 32 == 0) {
    params.partials[row * params.num_pieces + first_token / kLmHeadPieceTokens] = partial;
  }
}

__global__ void __launch_bounds__(kWarps * 32) likely_finish_kernel(LmHeadLikelyFinishParams params) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= params.num_rows) return;
  const LmHeadLikelyPartial* partials = params.partials + row * params.num_pieces;
  LmHeadTotal total{-INFINITY, 0.0, INT_MAX};
  Highest highest;
  highest.clear();
  float suppressed = -INFINITY;
  for (int64_t piece = threadIdx.x % 32; piece < params.num_pieces; piece += 32) {
    const LmHeadLikelyPartial& partial = partials[piece];
    merge(total, partial.highest, partial.sum, partial.token);
    suppressed = max_or_nan(suppressed, partial.suppressed);
#pragma unroll
    for (int i = 0; i < kNumLikelyTokens; ++i)
      highest.add(partial.likely_logits[i], partial.likely_tokens[i]);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    const float other = __shfl_xor_sync(~0u, total.highest, mask);
    const double sum = __shfl_xor_sync(~0u, total.sum, mask);
    const int32_t token = __shfl_xor_sync(~0u, total.token, mask);
    merge(total, other, sum, token);
    suppressed = max_or_nan(suppressed, __shfl_xor_sync(~0u, suppressed, mask));
  }
  // Of all tokens, the suppressed one too.
  const float base = reference_of(max_or_nan(total.highest, suppressed));
  const double whole = total.sum * expf(total.highest - base) + expf(suppressed - base);
  for (int i = 0; i < kNumLikelyTokens; ++i) {
    float logit;
    int32_t token;
    highest.pop(&logit, &token);
    const float probability = static_cast<float>(expf(logit - base) / whole);
    const bool is_likely = probability > kLeastLikely;
    if (threadIdx.x % 32 != 0) continue;
    params.likely_token[row * kNumLikelyTokens + i] = is_likely ? token : -1;
    params.likely_probability[row * kNumLikelyTokens + i] = is_likely ? probability : 0.0f;
  }
  if (threadIdx.x % 32 != 0) return;
  // Nothing but minus infinity has no softmax.
  const double sum = total.highest == -INFINITY ? __int_as_float(0x7fffffff) : total.sum;
  params.top_token[row] = total.token;
  params.confidence[row] = static_cast<float>(1.0 / sum);
}

}  // namespace

void lm_head_likely_reduce(const LmHeadLikelyReduceParams& params, const Launch& launch) {
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
      launch_kernel<likely_reduce_kernel<T, true>>(kReduceOp, launch, {grid, kWarps * 32}, params);
    } else {
      launch_kernel<likely_reduce_kernel<T, false>>(kReduceOp, launch, {grid, kWarps * 32}, params);
    }
  });
}

void lm_head_likely_finish(const LmHeadLikelyFinishParams& params, const Launch& launch) {
  check_at_least(kFinishOp, "num_rows", params.num_rows, 0);
  check_at_least(kFinishOp, "num_pieces", params.num_pieces, 1);
  if (params.num_rows == 0) return;
  const DeviceGuard guard(launch.device, kFinishOp);
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(params.num_rows, kWarps)));
  launch_kernel<likely_finish_kernel>(kFinishOp, launch, {grid, kWarps * 32}, params);
}

}  // namespace bbk
