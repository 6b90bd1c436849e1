// Rotary embedding of one place of a head and where it goes, for the kernel that rotates alone and for the
// product that does it behind its sums. A thread holds the same place of both halves of a head, the two that
// rotate into each other.
#pragma once

#include "common/e4m3.cuh"
#include "common/elements.cuh"
#include "layer/rope.h"

namespace bbk {

// kWidth elements that move at once.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Run {
  T values[kWidth];
};

// The angles of a token at kWidth places; NaN at a position that has none.
template <int kWidth>
struct Angles {
  float cos[kWidth];
  float sin[kWidth];
};

template <int kWidth>
__device__ __forceinline__ void load_row(float (&values)[kWidth], const float* from) {
  if constexpr (kWidth % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(from + i));
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = __ldg(from + i);
  }
}

template <int kWidth>
__device__ __forceinline__ Angles<kWidth> load_angles(const RopeKvWriteParams& params, int64_t position,
                                                      int place) {
  Angles<kWidth> angles;
  if (position >= 0 && position < params.num_positions) {
    load_row(angles.cos, params.cos + position * params.cos_row_stride + place);
    load_row(angles.sin, params.sin + position * params.sin_row_stride + place);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) angles.cos[i] = angles.sin[i] = __int_as_float(0x7fffffff);
  }
  return angles;
}

// A head of q, k or v; those of all three are counted through.
struct RopeHead {
  int index;  // among the heads of its kind
  bool is_q;
  bool is_v;
};

__device__ __forceinline__ RopeHead rope_head(const RopeKvWriteParams& params, int head) {
  const bool is_q = head < params.num_heads;
  const bool is_v = head >= params.num_heads + params.num_kv_heads;
  if (!is_q) head -= params.num_heads + (is_v ? params.num_kv_heads : 0);
  return RopeHead{head, is_q, is_v};
}

// Rotates what a thread holds of q and k.
template <typename T, int kWidth>
__device__ __forceinline__ void rotate(Run<T, kWidth>& first, Run<T, kWidth>& second,
                                       const Angles<kWidth>& angles) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float a = to_float(first.values[i]), b = to_float(second.values[i]);
    const float cos = angles.cos[i], sin = angles.sin[i];
    // Rounded as torch rounds them: what the compiler contracts would depend on the kernel around it.
    first.values[i] = from_float<T>(__fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin)));
    second.values[i] = from_float<T>(__fadd_rn(__fmul_rn(b, cos), __fmul_rn(a, sin)));
  }
}

// kWidth elements as a cache in e4m3 holds them.
template <typename T, int kWidth>
__device__ __forceinline__ Run<E4m3, kWidth> in_e4m3(const Run<T, kWidth>& run, float scale) {
  Run<E4m3, kWidth> stored;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) stored.values[i] = to_e4m3(__fdiv_rn(to_float(run.values[i]), scale));
  return stored;
}

// What a cache in e4m3 divides a head of k or v by; of q, and with other caches, nothing is read.
template <bool kE4m3>
__device__ __forceinline__ float cache_scale(const RopeKvWriteParams& params, const RopeHead& head) {
  if (!kE4m3 || head.is_q) return 1.0f;
  return (head.is_v ? params.v_scale : params.k_scale)[head.index];
}

// Writes both halves from `place` on to q or into the cache, which kE4m3 says the elements of.
template <bool kE4m3, typename T, int kWidth>
__device__ __forceinline__ void write_halves(const RopeKvWriteParams& params, int64_t token, int64_t slot,
                                             const RopeHead& head, int place, const Run<T, kWidth>& first,
                                             const Run<T, kWidth>& second, float scale) {
  T* target;
  if (head.is_q) {
    target =
        static_cast<T*>(params.q.data) + token * params.q.token_stride + head.index * params.q.head_stride;
  } else {
    if (slot < 0 || slot >= params.num_pages * params.page_size) return;  // there are fewer than 2^31
    const uint32_t page_size = static_cast<uint32_t>(params.page_size);
    const uint32_t page = static_cast<uint32_t>(slot) / page_size;
    const uint32_t offset = static_cast<uint32_t>(slot) % page_size;
    const CacheView& cache = head.is_v ? params.v_cache : params.k_cache;
    if constexpr (kE4m3) {
      E4m3* stored = static_cast<E4m3*>(cache.data) + page * cache.page_stride + offset * cache.token_stride +
                     head.index * cache.head_stride + place;
      *reinterpret_cast<Run<E4m3, kWidth>*>(stored) = in_e4m3(first, scale);
      *reinterpret_cast<Run<E4m3, kWidth>*>(stored + params.head_dim / 2) = in_e4m3(second, scale);
      return;
    }
    target = static_cast<T*>(cache.data) + page * cache.page_stride + offset * cache.token_stride +
             head.index * cache.head_stride;
  }
  *reinterpret_cast<Run<T, kWidth>*>(target + place) = first;
  *reinterpret_cast<Run<T, kWidth>*>(target + place + params.head_dim / 2) = second;
}

// Whether all addresses and strides of what is written, and of the angles, are whole vectors of 16 bytes; of
// caches in e4m3 as many elements.
template <typename T>
bool writes_vectors(const RopeKvWriteParams& params) {
  constexpr int kSize = Vec<T>::kSize;
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  if (!aligned(params.q.data) || params.q.token_stride % kSize != 0 || params.q.head_stride % kSize != 0) {
    return false;
  }
  const uintptr_t cache_vector = params.k_scale == nullptr ? 16 : kSize;
  for (const CacheView& view : {params.k_cache, params.v_cache}) {
    if (reinterpret_cast<uintptr_t>(view.data) % cache_vector != 0 || view.page_stride % kSize != 0 ||
        view.token_stride % kSize != 0 || view.head_stride % kSize != 0) {
      return false;
    }
  }
  return params.head_dim / 2 % kSize == 0 && aligned(params.cos) && aligned(params.sin) &&
         params.cos_row_stride % 4 == 0 && params.sin_row_stride % 4 == 0;
}

}  // namespace bbk
