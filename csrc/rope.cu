// Rotary embedding of q and k and the write of k and v into the paged cache, in one launch over the parts of
// one QKV product. A thread holds the same place of both halves of a head, the two that rotate into each
// other, in 16-byte vectors where everything is aligned.
#include "common.cuh"
#include "launch.cuh"
#include "rope.h"

namespace bbk {
namespace {

constexpr char kOp[] = "rope_kv_write";
constexpr int kThreads = 256;

// kWidth elements that move at once.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Run {
  T values[kWidth];
};

template <int kWidth>
__device__ __forceinline__ void load_angles(float (&angles)[kWidth], const float* from) {
  if constexpr (kWidth % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      angles[i] = four.x, angles[i + 1] = four.y, angles[i + 2] = four.z, angles[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) angles[i] = from[i];
  }
}

// The heads of q, k and v are counted through; a thread takes one place of one head.
//
// kUnits: places of half a head, 0: known at run time.
template <typename T, int kWidth, int kUnits>
__global__ void __launch_bounds__(kThreads) rope_kv_write_kernel(RopeKvWriteParams params) {
  wait_and_let_next_start();
  const int half = params.head_dim / 2;
  const int units = kUnits > 0 ? kUnits : half / kWidth;
  const int64_t token = blockIdx.x;
  const int64_t index = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  int head = static_cast<int>(index / units);
  const int place = static_cast<int>(index % units) * kWidth;
  if (head >= params.num_heads + 2 * params.num_kv_heads) return;
  const bool is_q = head < params.num_heads;
  const bool is_v = head >= params.num_heads + params.num_kv_heads;
  if (!is_q) head -= params.num_heads + (is_v ? params.num_kv_heads : 0);

  const int64_t position = params.positions[token];
  const int64_t slot = params.slots[token];
  using Part = Run<T, kWidth>;
  const HeadsView& view = is_q ? params.q : is_v ? params.v : params.k;
  T* source = static_cast<T*>(view.data) + token * view.token_stride + head * view.head_stride + place;
  Part first = *reinterpret_cast<const Part*>(source);
  Part second = *reinterpret_cast<const Part*>(source + half);

  if (!is_v) {
    float cos[kWidth], sin[kWidth];
    if (position >= 0 && position < params.num_positions) {
      load_angles(cos, params.cos + position * params.cos_row_stride + place);
      load_angles(sin, params.sin + position * params.sin_row_stride + place);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) cos[i] = sin[i] = __int_as_float(0x7fffffff);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float a = to_float(first.values[i]);
      const float b = to_float(second.values[i]);
      first.values[i] = from_float<T>(a * cos[i] - b * sin[i]);
      second.values[i] = from_float<T>(b * cos[i] + a * sin[i]);
    }
  }

  T* target = source;
  if (!is_q) {
    if (slot < 0 || slot >= params.num_pages * params.page_size) return;  // there are fewer than 2^31
    const uint32_t page_size = static_cast<uint32_t>(params.page_size);
    const uint32_t page = static_cast<uint32_t>(slot) / page_size;
    const uint32_t offset = static_cast<uint32_t>(slot) % page_size;
    const CacheView& cache = is_v ? params.v_cache : params.k_cache;
    target = static_cast<T*>(cache.data) + page * cache.page_stride + offset * cache.token_stride +
             head * cache.head_stride + place;
  }
  *reinterpret_cast<Part*>(target) = first;
  *reinterpret_cast<Part*>(target + half) = second;
}

template <typename T, int kWidth, int kUnits>
void launch_units(const RopeKvWriteParams& params, bool programmatic, const Launch& launch) {
  const int64_t heads = params.num_heads + 2 * params.num_kv_heads;
  const int64_t threads = heads * (params.head_dim / 2 / kWidth);
  const dim3 grid(static_cast<unsigned>(params.num_tokens),
                  static_cast<unsigned>(ceil_div<int64_t>(threads, kThreads)));
  launch_kernel<rope_kv_write_kernel<T, kWidth, kUnits>>(grid, kThreads, launch, programmatic, kOp, params);
}

template <typename T>
bool is_vectorized(const RopeKvWriteParams& params) {
  constexpr int kSize = Vec<T>::kSize;
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  for (const HeadsView& view : {params.q, params.k, params.v}) {
    if (!aligned(view.data) || view.token_stride % kSize != 0 || view.head_stride % kSize != 0) return false;
  }
  for (const CacheView& view : {params.k_cache, params.v_cache}) {
    if (!aligned(view.data) || view.page_stride % kSize != 0 || view.token_stride % kSize != 0 ||
        view.head_stride % kSize != 0) {
      return false;
    }
  }
  return params.head_dim / 2 % kSize == 0 && aligned(params.cos) && aligned(params.sin) &&
         params.cos_row_stride % 4 == 0 && params.sin_row_stride % 4 == 0;
}

template <typename T>
void launch_rope_kv_write(const RopeKvWriteParams& params, bool programmatic, const Launch& launch) {
  constexpr int kSize = Vec<T>::kSize;
  if (!is_vectorized<T>(params)) return launch_units<T, 1, 0>(params, programmatic, launch);
  switch (params.head_dim) {
    case 64:
      return launch_units<T, kSize, 32 / kSize>(params, programmatic, launch);
    case 128:
      return launch_units<T, kSize, 64 / kSize>(params, programmatic, launch);
    default:
      return launch_units<T, kSize, 0>(params, programmatic, launch);
  }
}

void check(const RopeKvWriteParams& params) {
  check_at_least(kOp, "num_tokens", params.num_tokens, 0);
  check_at_least(kOp, "num_heads", params.num_heads, 0);
  check_at_least(kOp, "num_kv_heads", params.num_kv_heads, 0);
  check_at_least(kOp, "page_size", params.page_size, 1);
  check_at_least(kOp, "num_pages", params.num_pages, 0);
  if (params.head_dim < 2 || params.head_dim % 2 != 0) {
    throw std::invalid_argument(std::string("blockbatch_kernels.") + kOp +
                                ": head_dim: expected an even size, got " + std::to_string(params.head_dim));
  }
  if (params.num_pages > INT32_MAX / params.page_size) {
    throw std::invalid_argument(
        std::string("blockbatch_kernels.") + kOp + ": k_cache: expected fewer than 2^31 slots, got " +
        std::to_string(params.num_pages) + " pages of " + std::to_string(params.page_size));
  }
}

}  // namespace

void rope_kv_write(const RopeKvWriteParams& params, bool programmatic, const Launch& launch) {
  check(params);
  dispatch_dtype(params.dtype, kOp, [&](auto zero) {
    if (params.num_tokens == 0 || params.num_heads + params.num_kv_heads == 0) return;
    const DeviceGuard guard(launch.device, kOp);
    launch_rope_kv_write<decltype(zero)>(params, programmatic, launch);
  });
}

}  // namespace bbk
