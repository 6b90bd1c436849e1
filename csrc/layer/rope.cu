// Rotary embedding of q and k and the write of k and v into the paged cache, in one launch over the parts of
// one QKV product, in 16-byte vectors where everything is aligned.
#include "common/elements.cuh"
#include "common/launch.cuh"
#include "layer/rope.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "rope_kv_write";
constexpr int kThreads = 256;

// The heads of q, k and v are counted through; a thread takes one place of one head.
//
// kUnits: places of half a head, 0: known at run time.
template <typename T, int kWidth, int kUnits, bool kE4m3>
__global__ void __launch_bounds__(kThreads) rope_kv_write_kernel(RopeKvWriteParams params) {
  wait_and_let_next_start();
  const int half = params.head_dim / 2;
  const int units = kUnits > 0 ? kUnits : half / kWidth;
  const int64_t token = blockIdx.x;
  const int64_t index = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  const int counted = static_cast<int>(index / units);
  const int place = static_cast<int>(index % units) * kWidth;
  if (counted >= params.num_heads + 2 * params.num_kv_heads) return;
  const RopeHead head = rope_head(params, counted);

  const int64_t position = params.positions[token];
  const int64_t slot = params.slots[token];
  const HeadsView& view = head.is_q ? params.q : head.is_v ? params.v : params.k;
  const T* source =
      static_cast<const T*>(view.data) + token * view.token_stride + head.index * view.head_stride + place;
  using Part = Run<T, kWidth>;
  Part first = *reinterpret_cast<const Part*>(source);
  Part second = *reinterpret_cast<const Part*>(source + half);
  if (!head.is_v) rotate(first, second, load_angles<kWidth>(params, position, place));
  write_halves<kE4m3>(params, token, slot, head, place, first, second, cache_scale<kE4m3>(params, head));
}

// The same behind an RMSNorm over each head of q and k: kLanes threads of a warp take one head, and go over
// it in steps of kLanes * kWidth places, once for the sum of squares and once to scale and rotate.
template <typename T, int kWidth, int kLanes, bool kE4m3>
__global__ void __launch_bounds__(kThreads) normed_rope_kv_write_kernel(RopeKvWriteParams params) {
  wait_and_let_next_start();
  const int half = params.head_dim / 2;
  const int64_t token = blockIdx.x;
  const int counted = (static_cast<int>(blockIdx.y) * kThreads + static_cast<int>(threadIdx.x)) / kLanes;
  const int first_place = static_cast<int>(threadIdx.x) % kLanes * kWidth;
  const bool exists = counted < params.num_heads + 2 * params.num_kv_heads;
  // Threads without a head stay for the sums of their warp.
  const RopeHead head = rope_head(params, exists ? counted : 0);
  const HeadsView& view = head.is_q ? params.q : head.is_v ? params.v : params.k;
  const T* source =
      static_cast<const T*>(view.data) + token * view.token_stride + head.index * view.head_stride;
  using Part = Run<T, kWidth>;

  float sum = 0.0f;
  if (exists && !head.is_v) {
    for (int place = first_place; place < half; place += kLanes * kWidth) {
      const Part first = *reinterpret_cast<const Part*>(source + place);
      const Part second = *reinterpret_cast<const Part*>(source + half + place);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        const float a = to_float(first.values[i]), b = to_float(second.values[i]);
        sum += a * a + b * b;
      }
    }
  }
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask >>= 1) sum += __shfl_xor_sync(~0u, sum, mask);
  if (!exists) return;

  const float scale = __frsqrt_rn(sum / static_cast<float>(params.head_dim) + params.norm_eps);
  const T* weight = static_cast<const T*>(head.is_q ? params.q_norm : params.k_norm);
  const int64_t position = params.positions[token];
  const int64_t slot = params.slots[token];
  const float stored_by = cache_scale<kE4m3>(params, head);
  for (int place = first_place; place < half; place += kLanes * kWidth) {
    Part first = *reinterpret_cast<const Part*>(source + place);
    Part second = *reinterpret_cast<const Part*>(source + half + place);
    if (!head.is_v) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        first.values[i] = scaled(to_float(first.values[i]), scale, weight[place + i]);
        second.values[i] = scaled(to_float(second.values[i]), scale, weight[half + place + i]);
      }
      rotate(first, second, load_angles<kWidth>(params, position, place));
    }
    write_halves<kE4m3>(params, token, slot, head, place, first, second, stored_by);
  }
}

template <typename T, bool kE4m3, int kWidth, int kLanes>
void launch_lanes(const RopeKvWriteParams& params, bool programmatic, const Launch& launch) {
  const int64_t threads = (params.num_heads + 2LL * params.num_kv_heads) * kLanes;
  const dim3 grid(static_cast<unsigned>(params.num_tokens),
                  static_cast<unsigned>(ceil_div<int64_t>(threads, kThreads)));
  launch_kernel<normed_rope_kv_write_kernel<T, kWidth, kLanes, kE4m3>>(
      kOp, launch, {grid, kThreads, 0, programmatic}, params);
}

template <typename T, bool kE4m3, int kWidth, int kUnits>
void launch_units(const RopeKvWriteParams& params, bool programmatic, const Launch& launch) {
  const int64_t heads = params.num_heads + 2 * params.num_kv_heads;
  const int64_t threads = heads * (params.head_dim / 2 / kWidth);
  const dim3 grid(static_cast<unsigned>(params.num_tokens),
                  static_cast<unsigned>(ceil_div<int64_t>(threads, kThreads)));
  launch_kernel<rope_kv_write_kernel<T, kWidth, kUnits, kE4m3>>(kOp, launch,
                                                                {grid, kThreads, 0, programmatic}, params);
}

template <typename T>
bool is_vectorized(const RopeKvWriteParams& params) {
  constexpr int kSize = Vec<T>::kSize;
  for (const HeadsView& view : {params.k, params.v}) {
    if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0 || view.token_stride % kSize != 0 ||
        view.head_stride % kSize != 0) {
      return false;
    }
  }
  return writes_vectors<T>(params);
}

template <typename T, bool kE4m3>
void launch_rope_kv_write(const RopeKvWriteParams& params, bool programmatic, const Launch& launch) {
  constexpr int kSize = Vec<T>::kSize;
  if (params.q_norm != nullptr) {
    if (!is_vectorized<T>(params)) return launch_lanes<T, kE4m3, 1, 32>(params, programmatic, launch);
    // Every lane of a head of 128 elements has a vector of each half.
    if (params.head_dim / 2 <= 8 * kSize)
      return launch_lanes<T, kE4m3, kSize, 8>(params, programmatic, launch);
    return launch_lanes<T, kE4m3, kSize, 16>(params, programmatic, launch);
  }
  if (!is_vectorized<T>(params)) return launch_units<T, kE4m3, 1, 0>(params, programmatic, launch);
  switch (params.head_dim) {
    case 64:
      return launch_units<T, kE4m3, kSize, 32 / kSize>(params, programmatic, launch);
    case 128:
      return launch_units<T, kE4m3, kSize, 64 / kSize>(params, programmatic, launch);
    default:
      return launch_units<T, kE4m3, kSize, 0>(params, programmatic, launch);
  }
}

}  // namespace

void check_rope(const char* op, const RopeKvWriteParams& params) {
  check_at_least(op, "num_tokens", params.num_tokens, 0);
  check_at_least(op, "num_heads", params.num_heads, 0);
  check_at_least(op, "num_kv_heads", params.num_kv_heads, 0);
  check_at_least(op, "page_size", params.page_size, 1);
  check_at_least(op, "num_pages", params.num_pages, 0);
  if ((params.q_norm == nullptr) != (params.k_norm == nullptr)) {
    refuse(op, "q_norm and k_norm: expected both or none, got one");
  }
  if ((params.k_scale == nullptr) != (params.v_scale == nullptr)) {
    refuse(op, "k_scale and v_scale: expected both or none, got one");
  }
  if (params.head_dim < 2 || params.head_dim % 2 != 0) {
    refuse(op, "head_dim: expected an even size, got " + std::to_string(params.head_dim));
  }
  if (params.num_pages > INT32_MAX / params.page_size) {
    refuse(op, "k_cache: expected fewer than 2^31 slots, got " + std::to_string(params.num_pages) +
                   " pages of " + std::to_string(params.page_size));
  }
}

void rope_kv_write(const RopeKvWriteParams& params, bool programmatic, const Launch& launch) {
  check_rope(kOp, params);
  dispatch_dtype(params.dtype, kOp, [&](auto zero) {
    if (params.num_tokens == 0 || params.num_heads + params.num_kv_heads == 0) return;
    const DeviceGuard guard(launch.device, kOp);
    if (params.k_scale != nullptr) {
      launch_rope_kv_write<decltype(zero), true>(params, programmatic, launch);
    } else {
      launch_rope_kv_write<decltype(zero), false>(params, programmatic, launch);
    }
  });
}

}  // namespace bbk
