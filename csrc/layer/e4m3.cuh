// A row in e4m3 by a block that has it in registers: its largest magnitude, its scale, its bytes.
#pragma once

#include <cuda_fp8.h>

#include "common/elements.cuh"
#include "layer/rows.cuh"

namespace bbk {

constexpr float kLargestE4m3 = 448.0f;
constexpr float kLeastAmax = 1e-30f;

// As integers, magnitudes are ordered in the same way, with NaN above all.
template <typename T>
__device__ __forceinline__ int magnitude(T value) {
  return __float_as_int(fabsf(to_float(value)));
}

// From the largest magnitude of a thread's elements: what the row is multiplied with; writes its scale.
__device__ __forceinline__ float multiplier(int most, float* scale) {
  most = block_max(most);
  const float amax = __int_as_float(max(most, __float_as_int(kLeastAmax)));
  if (threadIdx.x == 0) *scale = __fdiv_rn(amax, kLargestE4m3);
  return __fdiv_rn(kLargestE4m3, amax);
}

// Without a contraction of what made `value` with this product: it was rounded before.
__device__ __forceinline__ uint32_t pack_pair_e4m3(float first, float second, float by) {
  const float2 pair = make_float2(__fmul_rn(first, by), __fmul_rn(second, by));
  return __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
}

// Vector `index` of a row of bytes.
template <typename T>
__device__ __forceinline__ void store_e4m3(const Vec<T>& vec, float by, uint8_t* row, int index) {
  constexpr int kSize = Vec<T>::kSize;
  uint32_t words[kSize / 4];
#pragma unroll
  for (int j = 0; j < kSize; j += 4) {
    const T* four = &vec.values[j];
    words[j / 4] = pack_pair_e4m3(to_float(four[0]), to_float(four[1]), by) |
                   pack_pair_e4m3(to_float(four[2]), to_float(four[3]), by) << 16;
  }
  if constexpr (kSize == 8) {
    reinterpret_cast<uint2*>(row)[index] = make_uint2(words[0], words[1]);
  } else {
    reinterpret_cast<uint32_t*>(row)[index] = words[0];
  }
}

}  // namespace bbk
