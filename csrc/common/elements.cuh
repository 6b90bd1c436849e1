// Elements of tensors in kernels: conversion to and from fp32, vectors of 16 bytes, and dispatch over dtypes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "common/check.h"
#include "common/params.h"

namespace bbk {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// RMSNorm: x / rms(x) is rounded before it meets the weight, as the published models do.
template <typename T>
__device__ __forceinline__ T scaled(float value, float scale, T weight) {
  return from_float<T>(to_float(weight) * to_float(from_float<T>(value * scale)));
}

// Two neighbouring 16-bit elements, `first` at the lower address.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// A pointer to shared memory as instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// As many elements as one 16-byte memory transaction of a thread moves.
template <typename T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// Calls use(T()) with the C++ type T of `dtype`.
template <typename Use>
void dispatch_dtype(DType dtype, const char* op, Use&& use) {
  switch (dtype) {
    case DType::kFloat32:
      return use(float());
    case DType::kFloat16:
      return use(__half());
    case DType::kBFloat16:
      return use(__nv_bfloat16());
  }
  refuse(op, "dtype: expected code 0, 1 or 2, got " + std::to_string(static_cast<int>(dtype)));
}

}  // namespace bbk
