// The noise of lm_head_sample, bit for bit that of the reference up to its two logarithms, and reductions of
// a CTA in a fixed order.
#pragma once

#include <cmath>
#include <cstdint>

#include "gemm/lm_head_math.cuh"

namespace bbk {

// A permutation in which every bit of `x` reaches every bit.
__device__ __forceinline__ uint32_t mixed(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

struct NoiseKey {
  uint32_t first, second;
};

__device__ __forceinline__ uint32_t half_of_key(uint32_t start, int64_t seed, int32_t position,
                                                int32_t forward) {
  const uint32_t words[4] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                             static_cast<uint32_t>(position), static_cast<uint32_t>(forward)};
  uint32_t key = start;
#pragma unroll
  for (int i = 0; i < 4; ++i) key = mixed((key ^ words[i]) + 0x9E3779B9u);
  return key;
}

__device__ __forceinline__ NoiseKey noise_key(int64_t seed, int32_t position, int32_t forward) {
  return {half_of_key(0x243F6A88u, seed, position, forward),
          half_of_key(0x85A308D3u, seed, position, forward)};
}

// Between the highest and the lowest noise that there is lies less than this.
constexpr float kNoiseRange = 26.0f;

// Accurate logarithms: where noise decides, it is large, and the fast ones err by more than rounding there.
__device__ __forceinline__ float gumbel(const NoiseKey& key, uint32_t token) {
  const uint32_t bits = mixed(mixed(token + key.first) ^ key.second);
  const float v = fminf((__uint2float_rn(bits) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
  const float small = v * (1.0f + v * (0.5f + v * (1.0f / 3.0f + v * 0.25f)));
  return -logf(v < 0x1p-6f ? small : -logf(1.0f - v));
}

// Of equal values the lowest place counts; NaN is the highest.
struct Highest {
  float value;
  int32_t place;
};

__device__ __forceinline__ Highest higher(const Highest& a, const Highest& b) {
  const bool second = is_higher(b.value, a.value);
  const bool tied = !second && !is_higher(a.value, b.value);
  return {second ? b.value : a.value, tied ? min(a.place, b.place) : second ? b.place : a.place};
}

// Reductions of all threads of a CTA of whole warps, whose result every thread gets.
template <int kThreads>
struct CtaReduction {
  static constexpr int kWarps = kThreads / 32;
  float values[kWarps];
  double sums[kWarps];
  int32_t integers[kWarps];

  __device__ __forceinline__ Highest highest(Highest mine) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
      mine = higher(mine, {__shfl_xor_sync(~0u, mine.value, mask), __shfl_xor_sync(~0u, mine.place, mask)});
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
      values[threadIdx.x / 32] = mine.value;
      integers[threadIdx.x / 32] = mine.place;
    }
    __syncthreads();
    Highest all{values[0], integers[0]};
    for (int warp = 1; warp < kWarps; ++warp) all = higher(all, {values[warp], integers[warp]});
    return all;
  }

  __device__ __forceinline__ double sum(double mine) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) mine += __shfl_xor_sync(~0u, mine, mask);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = mine;
    __syncthreads();
    double all = 0.0;
    for (int warp = 0; warp < kWarps; ++warp) all += sums[warp];
    return all;
  }

  __device__ __forceinline__ int32_t count(int32_t mine) {
    mine = __reduce_add_sync(~0u, mine);
    __syncthreads();
    if (threadIdx.x % 32 == 0) integers[threadIdx.x / 32] = mine;
    __syncthreads();
    int32_t all = 0;
    for (int warp = 0; warp < kWarps; ++warp) all += integers[warp];
    return all;
  }
};

}  // namespace bbk
