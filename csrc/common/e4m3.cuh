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

// Four neighbours as halves, two in each of x and y, without rounding: two instructions, which bf16 lacks.
__device__ __forceinline__ uint2 halves_of_e4m3(uint32_t four) {
  uint2 halves;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n}\n"
      : "=r"(halves.x), "=r"(halves.y)
      : "r"(four));
  return halves;
}

// To the nearest, ties to even, at most 448; infinity becomes NaN, so that it is noticed later.
__device__ __forceinline__ E4m3 to_e4m3(float value) {
  const E4m3 limited{__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3)};
  return isinf(value) ? E4m3{0x7f} : limited;
}

}  // namespace bbk
