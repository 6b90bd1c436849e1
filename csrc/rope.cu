// Rotary embedding of q and k and the write of k and v into the paged cache, in one launch over the parts of
// one QKV product. A thread holds the same place of both halves of a head, the two that rotate into each
// other, in 16-byte vectors where everything is aligned.
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

// The heads of q, k and v are counted through. A token's threads are numbered by (group, unit): unit is the
// place within half a head, and the thread has the heads group, group + num_groups, ... With as many heads in
// q as in k and v, and three a thread, these are one of each.
//
// kUnits: units of half a head, 0: known at run time.
template <typename T, int kWidth, int kUnits, int kHeads>
__global__ void __launch_bounds__(kThreads) rope_kv_write_kernel(RopeKvWriteParams params) {
  prefetch_to_l2(params.prefetch);
  wait_for_predecessors();
  const int half = params.head_dim / 2;
  const int units = kUnits > 0 ? kUnits : half / kWidth;
  const int all_heads = params.num_heads + 2 * params.num_kv_heads;
  const int num_groups = (all_heads + kHeads - 1) / kHeads;
  const int64_t token = blockIdx.x;
  const int64_t index = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (index >= static_cast<int64_t>(num_groups) * units) return;
  const int group = static_cast<int>(index / units);
  const int place = static_cast<int>(index % units) * kWidth;
  using Part = Run<T, kWidth>;

  const int64_t position = params.positions[token];
  const int64_t slot = params.slots[token];
  Part first[kHeads], second[kHeads];
  T* source[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    int head = group + i * num_groups;
    const HeadsView* view = &params.q;
    if (head >= params.num_heads) {
      head -= params.num_heads;
      view = &params.k;
      if (head >= params.num_kv_heads) {
        head -= params.num_kv_heads;
        view = &params.v;
      }
    }
    source[i] = static_cast<T*>(view->data) + token * view->token_stride + head * view->head_stride + place;
    if (group + i * num_groups < all_heads) {
      first[i] = *reinterpret_cast<const Part*>(source[i]);
      second[i] = *reinterpret_cast<const Part*>(source[i] + half);
    }
  }

  float cos[kWidth], sin[kWidth];
  if (position >= 0 && position < params.num_positions) {
    load_angles(cos, params.cos + position * params.cos_row_stride + place);
    load_angles(sin, params.sin + position * params.sin_row_stride + place);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) cos[i] = sin[i] = __int_as_float(0x7fffffff);
  }
  const uint32_t page_size = static_cast<uint32_t>(params.page_size);
  const bool stored = slot >= 0 && slot < params.num_pages * params.page_size;  // which is below 2^31
  const uint32_t page = stored ? static_cast<uint32_t>(slot) / page_size : 0;
  const uint32_t offset = stored ? static_cast<uint32_t>(slot) % page_size : 0;

#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    int head = group + i * num_groups;
    if (head >= all_heads) return;
    const bool is_q = head < params.num_heads;
    const bool is_v = head >= params.num_heads + params.num_kv_heads;
    if (!is_v) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float a = to_float(first[i].values[j]);
        const float b = to_float(second[i].values[j]);
        first[i].values[j] = from_float<T>(a * cos[j] - b * sin[j]);
        second[i].values[j] = from_float<T>(b * cos[j] + a * sin[j]);
      }
    }
    T* target = source[i];
    if (!is_q) {
      if (!stored) continue;
      head -= params.num_heads + (is_v ? params.num_kv_heads : 0);
      const CacheView& cache = is_v ? params.v_cache : params.k_cache;
      target = static_cast<T*>(cache.data) + page * cache.page_stride + offset * cache.token_stride +
               head * cache.head_stride + place;
    }
    *reinterpret_cast<Part*>(target) = first[i];
    *reinterpret_cast<Part*>(target + half) = second[i];
  }
}

template <typename T, int kWidth, int kUnits, int kHeads>
void launch_units(const RopeKvWriteParams& params, bool programmatic, const Launch& launch) {
  const int64_t groups = ceil_div(params.num_heads + 2 * params.num_kv_heads, kHeads);
  const int64_t threads = groups * (params.head_dim / 2 / kWidth);
  const dim3 grid(static_cast<unsigned>(params.num_tokens),
                  static_cast<unsigned>(ceil_div<int64_t>(threads, kThreads)));
  launch_kernel<rope_kv_write_kernel<T, kWidth, kUnits, kHeads>>(grid, kThreads, launch, programmatic, kOp,
                                                                 params);
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

template <typename T, int kHeads>
void launch_heads(const RopeKvWriteParams& params, bool programmatic, const Launch& launch) {
  constexpr int kSize = Vec<T>::kSize;
  if (!is_vectorized<T>(params)) return launch_units<T, 1, 0, 1>(params, programmatic, launch);
  switch (params.head_dim) {
    case 64:
      return launch_units<T, kSize, 32 / kSize, kHeads>(params, programmatic, launch);
    case 128:
      return launch_units<T, kSize, 64 / kSize, kHeads>(params, programmatic, launch);
    default:
      return launch_units<T, kSize, 0, kHeads>(params, programmatic, launch);
  }
}

void check(const RopeKvWriteParams& params, int heads_per_thread) {
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
  if (heads_per_thread < 1 || heads_per_thread > 3) {
    throw std::invalid_argument(std::string("blockbatch_kernels.") + kOp +
                                ": heads_per_thread: expected 1, 2 or 3, got " +
                                std::to_string(heads_per_thread));
  }
}

}  // namespace

void rope_kv_write(const RopeKvWriteParams& params, int heads_per_thread, bool programmatic,
                   const Launch& launch) {
  check(params, heads_per_thread);
  dispatch_dtype(params.dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    if (params.num_tokens == 0 || params.num_heads + params.num_kv_heads == 0) return;
    const DeviceGuard guard(launch.device, kOp);
    switch (heads_per_thread) {
      case 1:
        return launch_heads<T, 1>(params, programmatic, launch);
      case 2:
        return launch_heads<T, 2>(params, programmatic, launch);
      default:
        return launch_heads<T, 3>(params, programmatic, launch);
    }
  });
}

}  // namespace bbk
