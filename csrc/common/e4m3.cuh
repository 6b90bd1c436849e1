// Numbers of 8 bits: e4m3 to the dtypes that products take, and back.
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "common/elements.cuh"

namespace bbk {

// An element of a cache in e4m3.
struct E4m3 {
  uint8_t bits;
};

__device__ __forceinline__ float to_float(E4m3 value) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(value.bits, __NV_E4M3)));
}

// Two neighbours in 16 bits each, without rounding.
template <typename T>
__device__ __forceinline__ uint32_t pair_of_e4m3(uint32_t two);
template <>
__device__ __forceinline__ uint32_t pair_of_e4m3<__half>(uint32_t two) {
  const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3);
  return static_cast<uint32_t>(raw.x) | static_cast<uint32_t>(raw.y) << 16;
}
template <>
__device__ __forceinline__ uint32_t pair_of_e4m3<__nv_bfloat16>(uint32_t two) {
  const __half2 halves(__nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3));
  const float2 exact = __half22float2(halves);
  return pack_pair<__nv_bfloat16>(exact.x, exact.y);
}

// Bytes kFirst and kFirst + 1 of a word without NaN, as bf16. Conversions by way of fp32 run at a quarter of
// the speed. Moved to the places of bf16's exponent and mantissa, which may make it subnormal, a number is
// 2^120 times too small.
template <int kFirst>
__device__ __forceinline__ uint32_t finite_pair_of_e4m3(uint32_t four) {
  const uint32_t spread = __byte_perm(four, 0, kFirst == 0 ? 0x1404 : 0x3424);
  const uint32_t moved = (spread & 0x80008000u) | (spread >> 4 & 0x07f007f0u);
  uint32_t pair;
  asm("mul.rn.bf16x2 %0, %1, %2;\n" : "=r"(pair) : "r"(moved), "r"(0x7b807b80u));
  return pair;
}

// Sixteen neighbours in 16 bits each, two in a word, without rounding.
template <typename T>
__device__ __forceinline__ void widen_e4m3(const uint4& x, uint32_t (&wide)[8]) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    uint32_t nan = 0;  // the byte 0x7f of either sign carries into its highest bit
#pragma unroll
    for (const uint32_t word : words) nan |= (word & 0x7f7f7f7fu) + 0x01010101u;
    if ((nan & 0x80808080u) == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        wide[2 * i] = finite_pair_of_e4m3<0>(words[i]);
        wide[2 * i + 1] = finite_pair_of_e4m3<2>(words[i]);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    wide[2 * i] = pair_of_e4m3<T>(words[i] & 0xffff);
    wide[2 * i + 1] = pair_of_e4m3<T>(words[i] >> 16);
  }
}

// To the nearest, ties to even, at most 448; infinity becomes NaN, so that it is noticed later.
__device__ __forceinline__ E4m3 to_e4m3(float value) {
  const E4m3 limited{__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3)};
  return isinf(value) ? E4m3{0x7f} : limited;
}

}  // namespace bbk
