// A token for each row of logits, which come in chunks of the vocabulary: a CTA reduces one row over one
// piece and draws the noise of its tokens, then a warp per row merges its pieces. With top_p or top_k a CTA
// looks through all logits of a row before, for the lowest that stays.
#include <climits>

#include "common/elements.cuh"
#include "common/launch.cuh"
#include "gemm/lm_head.h"
#include "gemm/lm_head_sample.h"
#include "gemm/sample_math.cuh"

namespace bbk {
namespace {

constexpr char kReduceOp[] = "lm_head_sample_reduce";
constexpr char kFilterOp[] = "lm_head_sample_filter";
constexpr char kFinishOp[] = "lm_head_sample_finish";
constexpr int kThreads = 256;
constexpr int kEach = kLmHeadPieceTokens / kThreads;  // tokens of a thread
constexpr int kFilterThreads = 1024;
constexpr int kFinishWarps = 4;

template <typename T, Confidence kConfidence>
__global__ void __launch_bounds__(kThreads) sample_reduce_kernel(SampleReduceParams params) {
  __shared__ CtaReduction<kThreads> cta;
  const int64_t row = blockIdx.x;
  const int64_t start = static_cast<int64_t>(blockIdx.y) * kLmHeadPieceTokens;
  const int first_token = static_cast<int>(params.first_token + start);
  const int64_t left = params.num_tokens - start;
  const int num_tokens = static_cast<int>(left < kLmHeadPieceTokens ? left : kLmHeadPieceTokens);
  const T* logits = static_cast<const T*>(params.logits) + row * params.row_stride + start;
  const SampleRules& rules = params.rules;
  const int64_t request = params.request[row];
  const int position = params.positions[row];

  float values[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int place = i * kThreads + threadIdx.x;
    const bool counts = place < num_tokens && first_token + place != params.suppress_token;
    values[i] = counts ? to_float(logits[place]) : -INFINITY;
  }
  for (int index = 0; index < rules.num_changed; ++index) {
    const int place = rules.changed_token[index] - first_token;
    if (place < 0 || place >= num_tokens) continue;
    const int64_t at = request * rules.num_changed + index;
    const float bias = rules.logit_bias[at];
    const bool banned = bias == -INFINITY || position < rules.banned_before[at];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const bool is_it = place == i * kThreads + static_cast<int>(threadIdx.x);
      values[i] = is_it ? (banned ? -INFINITY : values[i] + bias) : values[i];
    }
  }

  Highest top{-INFINITY, INT_MAX};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int place = i * kThreads + threadIdx.x;
    top = higher(top, {values[i], place < num_tokens ? place : INT_MAX});
  }
  top = cta.highest(top);
  const float base = reference_of(top.value);
  double sum = 0.0, terms = 0.0;
  float second = -INFINITY;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const float weight = weight_of(values[i], base);
    sum += weight;
    if (kConfidence == Confidence::kEntropy && weight > 0.0f) terms += weight * (values[i] - base);
    if (kConfidence == Confidence::kMargin && i * kThreads + static_cast<int>(threadIdx.x) != top.place) {
      second = fmaxf(second, values[i]);
    }
  }
  sum = cta.sum(sum);
  if (kConfidence == Confidence::kEntropy) second = static_cast<float>(cta.sum(terms));
  if (kConfidence == Confidence::kMargin) second = cta.highest({second, 0}).value;

  const float temperature = rules.temperature[request];
  const bool random = temperature > 0.0f;
  const float scale = random ? 1.0f / temperature : 1.0f;
  const NoiseKey key = noise_key(rules.seed[request], position, rules.forward[request]);
  // What is so far below the piece's highest cannot be drawn: no noise makes up for it.
  const float hopeless = top.value * scale - kNoiseRange;
  const float least = params.least != nullptr ? params.least[row] : -INFINITY;
  Highest drawn{-INFINITY, INT_MAX};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int place = i * kThreads + threadIdx.x;
    float score = random ? values[i] * scale : values[i];
    if (random && !(score < hopeless)) score += gumbel(key, static_cast<uint32_t>(first_token + place));
    if (values[i] < least) score = -INFINITY;
    drawn = higher(drawn, {score, place < num_tokens ? place : INT_MAX});
  }
  drawn = cta.highest(drawn);

  SamplePartial& partial = params.partials[row * params.num_pieces + params.first_piece + blockIdx.y];
  if (threadIdx.x == 0) {
    partial.score = drawn.value;
    partial.token = first_token + drawn.place;
    partial.highest = top.value;
    partial.sum = static_cast<float>(sum);
    partial.second = second;
    partial.unused = 0;
    if (params.probe_tokens == nullptr) partial.probe = -INFINITY;
  }
  const int probe = params.probe_tokens != nullptr ? params.probe_tokens[row] - first_token : -1;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int place = i * kThreads + threadIdx.x;
    if (place == drawn.place) partial.logit = values[i];
    if (place == probe) partial.probe = values[i];
  }
}

// The place of a number among all of fp32, and back.
__device__ __forceinline__ int64_t place_of(float value) {
  const int32_t bits = __float_as_int(value);
  return bits >= 0 ? bits : bits ^ 0x7FFFFFFF;
}

__device__ __forceinline__ float number_at(int64_t place) {
  const int32_t bits = static_cast<int32_t>(place);
  return __int_as_float(bits >= 0 ? bits : bits ^ 0x7FFFFFFF);
}

__global__ void __launch_bounds__(kFilterThreads) sample_filter_kernel(SampleFilterParams params) {
  __shared__ CtaReduction<kFilterThreads> cta;
  const int64_t row = blockIdx.x;
  const float* logits = params.logits + row * params.row_stride;
  const int64_t request = params.request[row];
  const float temperature = params.rules.temperature[request];
  const float top_p = params.rules.top_p != nullptr ? params.rules.top_p[request] : 1.0f;
  const int top_k = params.rules.top_k != nullptr ? params.rules.top_k[request] : 0;
  const int vocab_size = static_cast<int>(params.vocab_size);
  const int most = top_k > 0 && top_k < vocab_size ? top_k : vocab_size;
  if (!(temperature > 0.0f) || (top_p >= 1.0f && most == vocab_size)) {
    if (threadIdx.x == 0) params.least[row] = -INFINITY;
    return;
  }
  const float scale = 1.0f / temperature;
  Highest top{-INFINITY, 0};
  for (int i = threadIdx.x; i < vocab_size; i += kFilterThreads) top.value = fmaxf(top.value, logits[i]);
  top = cta.highest(top);
  const float base = reference_of(top.value);
  double whole = 0.0;
  for (int i = threadIdx.x; i < vocab_size; i += kFilterThreads) {
    whole += weight_of(logits[i] * scale, base * scale);
  }
  whole = cta.sum(whole);
  const double most_mass = top_p < 1.0f ? top_p * whole : INFINITY;
  // Above `high` there are few enough, above `low` there are not.
  int64_t low = place_of(-INFINITY) - 1, high = place_of(top.value);
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const float border = number_at(middle);
    double mass = 0.0;
    int count = 0;
    for (int i = threadIdx.x; i < vocab_size; i += kFilterThreads) {
      if (logits[i] > border) {
        mass += weight_of(logits[i] * scale, base * scale);
        ++count;
      }
    }
    mass = cta.sum(mass);
    count = cta.count(count);
    if (mass < most_mass && count < most) {
      high = middle;
    } else {
      low = middle;
    }
  }
  if (threadIdx.x == 0) params.least[row] = number_at(high);
}

__global__ void __launch_bounds__(kFinishWarps * 32) sample_finish_kernel(SampleFinishParams params) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kFinishWarps + threadIdx.x / 32;
  if (row >= params.num_rows) return;
  const SamplePartial* partials = params.partials + row * params.num_pieces;
  const int pieces = static_cast<int>(params.num_pieces), lane = threadIdx.x % 32;
  // Pieces hold rising tokens: of equal scores the first piece has the lowest token.
  Highest drawn{-INFINITY, INT_MAX}, top{-INFINITY, INT_MAX};
  for (int piece = lane; piece < pieces; piece += 32) {
    drawn = higher(drawn, {partials[piece].score, piece});
    top = higher(top, {partials[piece].highest, piece});
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    drawn = higher(drawn, {__shfl_xor_sync(~0u, drawn.value, mask), __shfl_xor_sync(~0u, drawn.place, mask)});
    top = higher(top, {__shfl_xor_sync(~0u, top.value, mask), __shfl_xor_sync(~0u, top.place, mask)});
  }
  double sum = 0.0, terms = 0.0;
  float second = -INFINITY;
  for (int piece = lane; piece < pieces; piece += 32) {
    const SamplePartial& partial = partials[piece];
    const float distance = partial.highest - top.value;
    const float scale = expf(distance);
    sum += static_cast<double>(scale) * partial.sum;
    if (params.measure == Confidence::kEntropy && scale > 0.0f) {
      terms += scale * (partial.second + static_cast<double>(partial.sum) * distance);
    }
    if (params.measure == Confidence::kMargin) {
      second = fmaxf(second, partial.second);
      if (piece != top.place) second = fmaxf(second, partial.highest);
    }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    sum += __shfl_xor_sync(~0u, sum, mask);
    terms += __shfl_xor_sync(~0u, terms, mask);
    second = fmaxf(second, __shfl_xor_sync(~0u, second, mask));
  }
  if (lane != 0) return;
  // Nothing but minus infinity has no softmax.
  const float none = __int_as_float(0x7fffffff);
  if (top.value == -INFINITY) sum = none;
  const SamplePartial& chosen = partials[drawn.place];
  double sure;
  if (params.measure == Confidence::kProbability) {
    sure = expf(chosen.logit - top.value) / sum;
  } else if (params.measure == Confidence::kEntropy) {
    sure = exp(terms / sum) / sum;
  } else {
    sure = (1.0 - expf(second - top.value)) / sum;
  }
  params.token[row] = chosen.token;
  params.confidence[row] = static_cast<float>(sure > 1.0 ? 1.0 : sure);
  if (params.probe_probability != nullptr) {
    const int64_t probe = params.probe_tokens[row];
    const bool known = probe >= 0 && probe < params.vocab_size;
    const float logit = known ? partials[probe / kLmHeadPieceTokens].probe : none;
    params.probe_probability[row] = static_cast<float>(expf(logit - top.value) / sum);
  }
}

template <typename T>
void launch_reduce(const SampleReduceParams& params, const Launch& launch) {
  const int64_t pieces = ceil_div<int64_t>(params.num_tokens, kLmHeadPieceTokens);
  const dim3 grid(static_cast<unsigned>(params.num_rows), static_cast<unsigned>(pieces));
  const LaunchConfig config{grid, kThreads};
  switch (params.confidence) {
    case Confidence::kProbability:
      return launch_kernel<sample_reduce_kernel<T, Confidence::kProbability>>(kReduceOp, launch, config,
                                                                              params);
    case Confidence::kEntropy:
      return launch_kernel<sample_reduce_kernel<T, Confidence::kEntropy>>(kReduceOp, launch, config, params);
    case Confidence::kMargin:
      return launch_kernel<sample_reduce_kernel<T, Confidence::kMargin>>(kReduceOp, launch, config, params);
  }
}

void check_confidence(const char* op, Confidence confidence) {
  const int code = static_cast<int>(confidence);
  if (code < 0 || code > 2) refuse(op, "confidence: expected code 0, 1 or 2, got " + std::to_string(code));
}

}  // namespace

void lm_head_sample_reduce(const SampleReduceParams& params, const Launch& launch) {
  check_at_least(kReduceOp, "num_rows", params.num_rows, 0);
  check_at_least(kReduceOp, "num_tokens", params.num_tokens, 0);
  check_at_least(kReduceOp, "first_token", params.first_token, 0);
  check_at_least(kReduceOp, "first_piece", params.first_piece, 0);
  check_at_least(kReduceOp, "num_pieces", params.num_pieces,
                 params.first_piece + ceil_div<int64_t>(params.num_tokens, kLmHeadPieceTokens));
  check_confidence(kReduceOp, params.confidence);
  dispatch_dtype(params.dtype, kReduceOp, [&](auto zero) {
    if (params.num_rows == 0 || params.num_tokens == 0) return;
    const DeviceGuard guard(launch.device, kReduceOp);
    launch_reduce<decltype(zero)>(params, launch);
  });
}

void lm_head_sample_filter(const SampleFilterParams& params, const Launch& launch) {
  check_at_least(kFilterOp, "num_rows", params.num_rows, 0);
  check_at_least(kFilterOp, "vocab_size", params.vocab_size, 1);
  if (params.num_rows == 0) return;
  const DeviceGuard guard(launch.device, kFilterOp);
  const dim3 grid(static_cast<unsigned>(params.num_rows));
  launch_kernel<sample_filter_kernel>(kFilterOp, launch, {grid, kFilterThreads}, params);
}

void lm_head_sample_finish(const SampleFinishParams& params, const Launch& launch) {
  check_at_least(kFinishOp, "num_rows", params.num_rows, 0);
  check_at_least(kFinishOp, "num_pieces", params.num_pieces, 1);
  check_confidence(kFinishOp, params.measure);
  if (params.num_rows == 0) return;
  const DeviceGuard guard(launch.device, kFinishOp);
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(params.num_rows, kFinishWarps)));
  launch_kernel<sample_finish_kernel>(kFinishOp, launch, {grid, kFinishWarps * 32}, params);
}

}  // namespace bbk
