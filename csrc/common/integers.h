// Little arithmetic on integers, on the GPU and on the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace bbk {

#define BBK_HD __host__ __device__ inline

template <typename Integer>
__host__ __device__ constexpr Integer ceil_div(Integer value, Integer divisor) {
  return (value + divisor - 1) / divisor;
}

template <typename T>
__host__ __device__ constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
__host__ __device__ constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

BBK_HD int lowest_bit(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

}  // namespace bbk
