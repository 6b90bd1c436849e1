// How logits are compared and weighed. A NaN counts as the highest logit, as torch's argmax has it; the row's
// probabilities are then NaN.
#pragma once

#include <cmath>
#include <cstdint>

namespace bbk {

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ bool is_higher(float a, float b) { return a > b || (isnan(a) && !isnan(b)); }

// exp(logit - highest) for a logit that is not above `highest`. The difference is taken before it is scaled:
// it is exact for the logits that matter.
__device__ __forceinline__ float weight_of(float logit, float highest) {
  constexpr float kLog2e = 1.4426950408889634f;
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"((logit - highest) * kLog2e));
  return result;
}

// What the weights refer to: any number will do while only minus infinity, of weight 0, has been seen.
__device__ __forceinline__ float reference_of(float highest) { return highest == -INFINITY ? 0.0f : highest; }

// A row's reduction so far.
struct LmHeadTotal {
  float highest;
  double sum;
  int32_t token;
};

// Of equal logits the lowest token stays.
__device__ __forceinline__ void merge(LmHeadTotal& into, float highest, double sum, int32_t token) {
  const float merged = max_or_nan(into.highest, highest);
  const float reference = reference_of(merged);
  if (is_higher(highest, into.highest) || (!is_higher(into.highest, highest) && token < into.token)) {
    into.token = token;
  }
  into.sum = into.sum * weight_of(into.highest, reference) + sum * weight_of(highest, reference);
  into.highest = merged;
}

}  // namespace bbk
