// Rows quantised to e4m3 where they are computed: a block has a whole row in registers, so that its largest
// magnitude is known before the row is stored.
#include "common/elements.cuh"
#include "common/launch.cuh"
#include "layer/packed.cuh"
#include "layer/quantize.h"
#include "layer/rows.cuh"

namespace bbk {
namespace {

// As of the norm, whose sums are to be the same; other rows, if they are long, may have more.
constexpr int kThreads = 256;
constexpr int kMaxThreads = 512;
constexpr int kMaxVecs = 8;
constexpr int kAnyThreads = 256;
constexpr float kLargest = 448.0f;
constexpr float kLeast = 1e-30f;

// The next kernel is launched only now: its blocks, and those of the one behind it, would take the places of
// some of this kernel's, and leave it to fewer processors.
__device__ __forceinline__ void wait_then_let_next_start() {
  wait_for_predecessors();
  allow_successors();
}

template <typename T>
__device__ __forceinline__ int magnitude(T value) {
  return __float_as_int(fabsf(to_float(value)));
}

// From the largest magnitude of a thread's elements: what the row is multiplied with; writes its scale.
__device__ __forceinline__ float multiplier(int most, const QuantizeParams& params, int64_t token) {
  most = block_max(most);
  const float amax = __int_as_float(max(most, __float_as_int(kLeast)));
  if (threadIdx.x == 0) params.scale[token] = __fdiv_rn(amax, kLargest);
  return __fdiv_rn(kLargest, amax);
}

// Rows of whole, aligned vectors, at most kVecs a thread.
template <typename T, int kVecs, QuantizeSource kSource>
__global__ void __launch_bounds__(kMaxThreads) quantize_kernel(QuantizeParams params) {
  wait_then_let_next_start();
  constexpr int kSize = Vec<T>::kSize;
  const int64_t token = blockIdx.x;
  const int num_vecs = static_cast<int>(params.dim / kSize);
  const auto* x =
      reinterpret_cast<const Vec<T>*>(static_cast<const T*>(params.x) + token * params.x_row_stride);

  // Asked for together with the row where registers allow, so that only one latency is waited for.
  constexpr bool kWeightsAhead = kSource == QuantizeSource::kNorm && kVecs <= 2;
  const auto* weight = static_cast<const Vec<T>*>(params.weight);
  Vec<T> row[kVecs], weights[kWeightsAhead ? kVecs : 1];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int index = threadIdx.x + i * blockDim.x;
    if (index < num_vecs) {
      row[i] = x[index];
      if constexpr (kWeightsAhead) weights[i] = weight[index];
    }
  }
  if constexpr (kSource == QuantizeSource::kSwiglu) {
    Vec<T> ups[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int index = threadIdx.x + i * blockDim.x;
      if (index < num_vecs) ups[i] = x[num_vecs + index];
    }
#pragma unroll
    for (int i = 0; i < kVecs; ++i) row[i] = activated(row[i], ups[i]);
  }
  if constexpr (kSource == QuantizeSource::kNorm) {
    if (params.residual != nullptr) {
      auto* residual =
          reinterpret_cast<Vec<T>*>(static_cast<T*>(params.residual) + token * params.residual_row_stride);
      Vec<T> added[kVecs];
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int index = threadIdx.x + i * blockDim.x;
        if (index < num_vecs) added[i] = residual[index];
      }
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        row[i] = rounded_sum(row[i], added[i]);
        const int index = threadIdx.x + i * blockDim.x;
        if (index < num_vecs) residual[index] = row[i];
      }
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      if (threadIdx.x + i * blockDim.x < num_vecs) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          const float value = to_float(row[i].values[j]);
          sum += value * value;
        }
      }
    }
    const float inverse = inverse_rms(block_sum(sum), params.dim, params.eps);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int index = threadIdx.x + i * blockDim.x;
      if (index < num_vecs) row[i] = scaled(row[i], inverse, kWeightsAhead ? weights[i] : weight[index]);
    }
  }

  Largest<T> largest;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (threadIdx.x + i * blockDim.x < num_vecs) largest.look_at(row[i]);
  }
  const float by = multiplier(largest.of_all(), params, token);
  auto* out = params.out + token * params.dim;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int index = threadIdx.x + i * blockDim.x;
    if (index < num_vecs) store_e4m3(out, index, row[i], by);
  }
}

// Rows of any length and alignment, element by element; each pass reads the row again.
template <typename T, QuantizeSource kSource>
__global__ void __launch_bounds__(kAnyThreads) quantize_any_kernel(QuantizeParams params) {
  wait_then_let_next_start();
  const int64_t token = blockIdx.x;
  const T* x = static_cast<const T*>(params.x) + token * params.x_row_stride;
  const T* weight = static_cast<const T*>(params.weight);
  float inverse = 1.0f;
  if constexpr (kSource == QuantizeSource::kNorm) {
    float sum = 0.0f;
    T* residual = nullptr;
    if (params.residual != nullptr) {
      residual = static_cast<T*>(params.residual) + token * params.residual_row_stride;
    }
    for (int64_t i = threadIdx.x; i < params.dim; i += kAnyThreads) {
      T element = x[i];
      if (residual != nullptr) residual[i] = element = rounded_sum(element, residual[i]);
      sum += to_float(element) * to_float(element);
    }
    inverse = inverse_rms(block_sum(sum), params.dim, params.eps);
    if (residual != nullptr) x = residual;
  }
  const auto element = [&](int64_t i) {
    if constexpr (kSource == QuantizeSource::kNorm) return scaled(to_float(x[i]), inverse, weight[i]);
    if constexpr (kSource == QuantizeSource::kSwiglu) {
      return from_float<T>(silu_mul<T>(to_float(x[i]), to_float(x[params.dim + i])));
    }
    return x[i];
  };
  int most = 0;
  for (int64_t i = threadIdx.x; i < params.dim; i += kAnyThreads) most = max(most, magnitude(element(i)));
  const float by = multiplier(most, params, token);
  for (int64_t i = threadIdx.x; i < params.dim; i += kAnyThreads) {
    params.out[token * params.dim + i] =
        static_cast<uint8_t>(pack_pair_e4m3(to_float(element(i)), 0.0f, by) & 0xff);
  }
}

template <typename T>
bool is_vectorized(const QuantizeParams& params) {
  const auto aligned = [](const void* pointer, int64_t row_stride) {
    return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vec<T>) == 0 && row_stride % Vec<T>::kSize == 0;
  };
  return params.dim % Vec<T>::kSize == 0 && params.dim <= kMaxThreads * kMaxVecs * Vec<T>::kSize &&
         aligned(params.x, params.x_row_stride) && aligned(params.weight, 0) &&
         aligned(params.residual, params.residual == nullptr ? 0 : params.residual_row_stride) &&
         reinterpret_cast<uintptr_t>(params.out) % Vec<T>::kSize == 0;
}

template <typename T, QuantizeSource kSource>
void launch_quantize(const char* op, const QuantizeParams& params, bool programmatic, const Launch& launch) {
  const dim3 grid(static_cast<unsigned>(params.num_tokens));
  if (!is_vectorized<T>(params)) {
    launch_kernel<quantize_any_kernel<T, kSource>>(op, launch, {grid, kAnyThreads, 0, programmatic}, params);
    return;
  }
  const int num_vecs = static_cast<int>(params.dim / Vec<T>::kSize);
  const bool is_long =
      kSource == QuantizeSource::kSwiglu || (kSource == QuantizeSource::kRows && num_vecs > 1024);
  int vecs = 1;
  while (vecs < kMaxVecs && num_vecs > vecs * (is_long ? kMaxThreads : kThreads)) vecs *= 2;
  const LaunchConfig config = {grid, ceil_div(ceil_div(num_vecs, vecs), 32) * 32, 0, programmatic};
  switch (vecs) {
    case 1:
      return launch_kernel<quantize_kernel<T, 1, kSource>>(op, launch, config, params);
    case 2:
      return launch_kernel<quantize_kernel<T, 2, kSource>>(op, launch, config, params);
    case 4:
      return launch_kernel<quantize_kernel<T, 4, kSource>>(op, launch, config, params);
    default:
      return launch_kernel<quantize_kernel<T, 8, kSource>>(op, launch, config, params);
  }
}

}  // namespace

void quantize(const char* op, QuantizeSource source, const QuantizeParams& params, bool programmatic,
              const Launch& launch) {
  check_at_least(op, "num_tokens", params.num_tokens, 0);
  check_at_least(op, "dim", params.dim, 1);
  dispatch_dtype(params.dtype, op, [&](auto zero) {
    using T = decltype(zero);
    if (params.num_tokens == 0) return;  // an empty grid is a launch error
    const DeviceGuard guard(launch.device, op);
    switch (source) {
      case QuantizeSource::kRows:
        return launch_quantize<T, QuantizeSource::kRows>(op, params, programmatic, launch);
      case QuantizeSource::kNorm:
        return launch_quantize<T, QuantizeSource::kNorm>(op, params, programmatic, launch);
      case QuantizeSource::kSwiglu:
        return launch_quantize<T, QuantizeSource::kSwiglu>(op, params, programmatic, launch);
    }
  });
}

}  // namespace bbk
