// Arithmetic on vectors of elements, for kernels of a few microseconds that wait for their own instructions:
// elements of 16 bits in pairs, an instruction for two. Every result has the bits that the arithmetic in fp32
// with a rounding behind it gives (common/elements.cuh, layer/rows.cuh): sums and products of two elements
// of 16 bits are rounded once either way.
#pragma once

#include <cuda_fp8.h>

#include <type_traits>

#include "common/elements.cuh"
#include "layer/rows.cuh"

namespace bbk {

template <typename T>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using Type = __half2;
};

__device__ __forceinline__ float2 to_floats(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ __forceinline__ float2 to_floats(__half2 pair) { return __half22float2(pair); }

// The elements of a vector two by two.
template <typename T>
__device__ __forceinline__ auto& pairs(Vec<T>& vec) {
  return reinterpret_cast<typename PairOf<T>::Type(&)[Vec<T>::kSize / 2]>(vec.values);
}
template <typename T>
__device__ __forceinline__ const auto& pairs(const Vec<T>& vec) {
  return reinterpret_cast<const typename PairOf<T>::Type(&)[Vec<T>::kSize / 2]>(vec.values);
}

template <typename T>
constexpr bool kPaired = sizeof(T) == 2;

// a + b, rounded.
template <typename T>
__device__ __forceinline__ Vec<T> rounded_sum(const Vec<T>& a, const Vec<T>& b) {
  Vec<T> sum;
  if constexpr (kPaired<T>) {
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize / 2; ++i) pairs(sum)[i] = __hadd2_rn(pairs(a)[i], pairs(b)[i]);
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) sum.values[i] = rounded_sum(a.values[i], b.values[i]);
  }
  return sum;
}

// The norm of a vector: rounded before it meets the weight, and behind it.
template <typename T>
__device__ __forceinline__ Vec<T> scaled(const Vec<T>& vec, float scale, const Vec<T>& weight) {
  Vec<T> result;
  if constexpr (kPaired<T>) {
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize / 2; ++i) {
      const float2 values = to_floats(pairs(vec)[i]);
      const uint32_t rounded = pack_pair<T>(values.x * scale, values.y * scale);
      pairs(result)[i] =
          __hmul2_rn(pairs(weight)[i], reinterpret_cast<const typename PairOf<T>::Type&>(rounded));
    }
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) {
      result.values[i] = scaled(to_float(vec.values[i]), scale, weight.values[i]);
    }
  }
  return result;
}

// silu(gates) * ups, rounded.
template <typename T>
__device__ __forceinline__ Vec<T> activated(const Vec<T>& gates, const Vec<T>& ups) {
  Vec<T> result;
  if constexpr (kPaired<T>) {
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize / 2; ++i) {
      const float2 gate = to_floats(pairs(gates)[i]), up = to_floats(pairs(ups)[i]);
      const uint32_t two = pack_pair<T>(silu_mul<T>(gate.x, up.x), silu_mul<T>(gate.y, up.y));
      pairs(result)[i] = reinterpret_cast<const typename PairOf<T>::Type&>(two);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) {
      result.values[i] = silu_mul<T>(to_float(gates.values[i]), to_float(ups.values[i]));
    }
  }
  return result;
}

// The largest magnitude of what it was shown. As integers, magnitudes are ordered in the same way, with NaN
// above all: two of 16 bits are compared at once.
template <typename T>
struct Largest {
  unsigned bits = 0;

  __device__ __forceinline__ void look_at(const Vec<T>& vec) {
    if constexpr (kPaired<T>) {
      const auto& words = reinterpret_cast<const uint4&>(vec);
      bits = __vmaxu2(bits, words.x & 0x7fff7fffu);
      bits = __vmaxu2(bits, words.y & 0x7fff7fffu);
      bits = __vmaxu2(bits, words.z & 0x7fff7fffu);
      bits = __vmaxu2(bits, words.w & 0x7fff7fffu);
    } else {
#pragma unroll
      for (int i = 0; i < Vec<T>::kSize; ++i) {
        bits = max(bits, __float_as_uint(vec.values[i]) & 0x7fffffffu);
      }
    }
  }

  // As the bits of an fp32 number.
  __device__ __forceinline__ int of_all() const {
    if constexpr (kPaired<T>) {
      const auto most = static_cast<unsigned short>(max(bits & 0xffffu, bits >> 16));
      return __float_as_int(to_float(reinterpret_cast<const T&>(most)));
    } else {
      return static_cast<int>(bits);
    }
  }
};

// Without a contraction of what made the values with this product: they were rounded before.
__device__ __forceinline__ uint32_t pack_pair_e4m3(float first, float second, float by) {
  const float2 pair = make_float2(__fmul_rn(first, by), __fmul_rn(second, by));
  return __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
}

// Stores vec * by in e4m3 as vector `index` of `out`.
template <typename T>
__device__ __forceinline__ void store_e4m3(uint8_t* out, int64_t index, const Vec<T>& vec, float by) {
  constexpr int kSize = Vec<T>::kSize;
  uint32_t words[kSize / 4];
#pragma unroll
  for (int j = 0; j < kSize; j += 4) {
    const T* four = &vec.values[j];
    words[j / 4] = pack_pair_e4m3(to_float(four[0]), to_float(four[1]), by) |
                   pack_pair_e4m3(to_float(four[2]), to_float(four[3]), by) << 16;
  }
  if constexpr (kSize == 8) {
    reinterpret_cast<uint2*>(out)[index] = make_uint2(words[0], words[1]);
  } else {
    reinterpret_cast<uint32_t*>(out)[index] = words[0];
  }
}

}  // namespace bbk
