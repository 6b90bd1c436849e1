// What kernels share that work on a row of a tensor by one block: sums and largest values over the block, and
// the arithmetic of the norm and of the gated activation.
#pragma once

#include "common/elements.cuh"

namespace bbk {

// The reduction over the block, the same bits in every thread. blockDim.x is a multiple of 32. A kernel
// reduces once in each way: another way has memory of its own.
template <typename V, typename Combine>
__device__ __forceinline__ V block_reduce(V value, V neutral, Combine&& combine) {
  __shared__ V warp_values[32];
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) value = combine(value, __shfl_xor_sync(~0u, value, mask));
  const int lane = threadIdx.x % 32;
  if (lane == 0) warp_values[threadIdx.x / 32] = value;
  __syncthreads();
  value = lane < blockDim.x / 32 ? warp_values[lane] : neutral;
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) value = combine(value, __shfl_xor_sync(~0u, value, mask));
  return value;
}

__device__ __forceinline__ float block_sum(float value) {
  return block_reduce(value, 0.0f, [](float a, float b) { return a + b; });
}

// The largest value over the block, by the instruction that reduces the integers of a warp.
__device__ __forceinline__ int block_max(int value) {
  __shared__ int warp_values[32];
  value = __reduce_max_sync(~0u, value);
  const int lane = threadIdx.x % 32;
  if (lane == 0) warp_values[threadIdx.x / 32] = value;
  __syncthreads();
  return __reduce_max_sync(~0u, lane < blockDim.x / 32 ? warp_values[lane] : 0);
}

__device__ __forceinline__ float inverse_rms(float sum_of_squares, int64_t dim, float eps) {
  return __frsqrt_rn(sum_of_squares / static_cast<float>(dim) + eps);
}

template <typename T>
__device__ __forceinline__ T rounded_sum(T a, T b) {
  return from_float<T>(to_float(a) + to_float(b));
}

// For gate -> -inf the quotient goes to -0 without overflow in between.
template <typename T>
__device__ __forceinline__ float silu_mul(float gate, float up) {
  // The approximate instructions err far below the rounding to 16 bits; exact ones would take longer than the
  // memory traffic. They flush: the results for gates below -87 are -0.
  constexpr float kLog2e = 1.4426950408889634f;
  float exponential, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(exponential) : "f"(-kLog2e * gate));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + exponential));
  return gate * inverse * up;
}

template <>
__device__ __forceinline__ float silu_mul<float>(float gate, float up) {
  return gate / (1.0f + expf(-gate)) * up;
}

}  // namespace bbk
