// Numbers of 8 bits: e4m3 to the dtypes that products take, and back.
#pragma once

#include <cuda_fp8.h>

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

// To the nearest, ties to even, at most 448; infinity becomes NaN, so that it is noticed later.
__device__ __forceinline__ E4m3 to_e4m3(float value) {
  const E4m3 limited{__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3)};
  return isinf(value) ? E4m3{0x7f} : limited;
}

}  // namespace bbk
