// RMSNorm with the residual add in front of it. For the few hundred tokens of a decoding step the inputs lie
// in L2 and latency decides: one block a row, the row in registers between its only load and its only store.
#include "common/elements.cuh"
#include "common/launch.cuh"
#include "layer/norm.h"
#include "layer/rows.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "rms_norm";
constexpr int kThreads = 256;  // for 4096 elements of 16 bits 10% faster than 512, 25% than 128
constexpr int kMaxThreads = 512;
constexpr int kMaxVecs = 8;  // a thread: 512 x 8 x 16 bytes hold 16384 fp32 elements
constexpr int kAnyThreads = 256;

// Rows of whole, aligned vectors, at most kVecs a thread.
template <typename T, int kVecs>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_kernel(RmsNormParams params) {
  wait_and_let_next_start();
  const int64_t token = blockIdx.x;
  const int num_vecs = static_cast<int>(params.dim / Vec<T>::kSize);
  const auto* x =
      reinterpret_cast<const Vec<T>*>(static_cast<const T*>(params.x) + token * params.x_row_stride);
  const auto* weight = static_cast<const Vec<T>*>(params.weight);
  auto* residual =
      reinterpret_cast<Vec<T>*>(static_cast<T*>(params.residual) + token * params.residual_row_stride);
  auto* out = reinterpret_cast<Vec<T>*>(static_cast<T*>(params.out) + token * params.out_row_stride);

  // Asked for together with the row where registers allow, so that only one latency is waited for.
  constexpr bool kWeightsAhead = kVecs <= 2;
  Vec<T> row[kVecs], weights[kWeightsAhead ? kVecs : 1];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int index = threadIdx.x + i * blockDim.x;
    if (index < num_vecs) {
      row[i] = x[index];
      if (kWeightsAhead) weights[i] = weight[index];
    }
  }
  if (params.residual != nullptr) {
    Vec<T> added[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int index = threadIdx.x + i * blockDim.x;
      if (index < num_vecs) added[i] = residual[index];
    }
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
#pragma unroll
      for (int j = 0; j < Vec<T>::kSize; ++j) {
        row[i].values[j] = rounded_sum(row[i].values[j], added[i].values[j]);
      }
      const int index = threadIdx.x + i * blockDim.x;
      if (index < num_vecs) residual[index] = row[i];
    }
  }

  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (threadIdx.x + i * blockDim.x < num_vecs) {
#pragma unroll
      for (int j = 0; j < Vec<T>::kSize; ++j) {
        const float value = to_float(row[i].values[j]);
        sum += value * value;
      }
    }
  }
  const float scale = inverse_rms(block_sum(sum), params.dim, params.eps);

#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int index = threadIdx.x + i * blockDim.x;
    if (index < num_vecs) {
      const Vec<T> scales = kWeightsAhead ? weights[i] : weight[index];
      Vec<T> normed;
#pragma unroll
      for (int j = 0; j < Vec<T>::kSize; ++j) {
        normed.values[j] = scaled(to_float(row[i].values[j]), scale, scales.values[j]);
      }
      out[index] = normed;
    }
  }
}

// Rows of any length and alignment, element by element; the second pass reads the row again.
template <typename T>
__global__ void __launch_bounds__(kAnyThreads) rms_norm_any_kernel(RmsNormParams params) {
  wait_and_let_next_start();
  const int64_t token = blockIdx.x;
  const T* x = static_cast<const T*>(params.x) + token * params.x_row_stride;
  const T* weight = static_cast<const T*>(params.weight);
  T* out = static_cast<T*>(params.out) + token * params.out_row_stride;
  T* residual = nullptr;
  if (params.residual != nullptr) {
    residual = static_cast<T*>(params.residual) + token * params.residual_row_stride;
  }

  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < params.dim; i += kAnyThreads) {
    T element = x[i];
    if (residual != nullptr) residual[i] = element = rounded_sum(element, residual[i]);
    sum += to_float(element) * to_float(element);
  }
  const float scale = inverse_rms(block_sum(sum), params.dim, params.eps);
  for (int64_t i = threadIdx.x; i < params.dim; i += kAnyThreads) {
    out[i] = scaled(to_float(residual != nullptr ? residual[i] : x[i]), scale, weight[i]);
  }
}

template <typename T>
bool is_vectorized(const RmsNormParams& params) {
  const auto aligned = [](const void* pointer, int64_t row_stride) {
    return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vec<T>) == 0 && row_stride % Vec<T>::kSize == 0;
  };
  return params.dim % Vec<T>::kSize == 0 && params.dim <= kMaxThreads * kMaxVecs * Vec<T>::kSize &&
         aligned(params.x, params.x_row_stride) && aligned(params.weight, 0) &&
         aligned(params.residual, params.residual == nullptr ? 0 : params.residual_row_stride) &&
         aligned(params.out, params.out_row_stride);
}

template <typename T>
void launch_rms_norm(const RmsNormParams& params, bool programmatic, const Launch& launch) {
  const dim3 grid(static_cast<unsigned>(params.num_tokens));
  if (!is_vectorized<T>(params)) {
    launch_kernel<rms_norm_any_kernel<T>>(kOp, launch, {grid, kAnyThreads, 0, programmatic}, params);
    return;
  }
  const int num_vecs = static_cast<int>(params.dim / Vec<T>::kSize);
  int vecs = 1;
  while (vecs < kMaxVecs && num_vecs > vecs * kThreads) vecs *= 2;
  const int threads = ceil_div(ceil_div(num_vecs, vecs), 32) * 32;
  switch (vecs) {
    case 1:
      return launch_kernel<rms_norm_kernel<T, 1>>(kOp, launch, {grid, threads, 0, programmatic}, params);
    case 2:
      return launch_kernel<rms_norm_kernel<T, 2>>(kOp, launch, {grid, threads, 0, programmatic}, params);
    case 4:
      return launch_kernel<rms_norm_kernel<T, 4>>(kOp, launch, {grid, threads, 0, programmatic}, params);
    default:
      return launch_kernel<rms_norm_kernel<T, 8>>(kOp, launch, {grid, threads, 0, programmatic}, params);
  }
}

}  // namespace

void rms_norm(const RmsNormParams& params, bool programmatic, const Launch& launch) {
  check_at_least(kOp, "num_tokens", params.num_tokens, 0);
  check_at_least(kOp, "dim", params.dim, 0);
  dispatch_dtype(params.dtype, kOp, [&](auto zero) {
    if (params.num_tokens == 0 || params.dim == 0) return;  // an empty grid is a launch error
    const DeviceGuard guard(launch.device, kOp);
    launch_rms_norm<decltype(zero)>(params, programmatic, launch);
  });
}

}  // namespace bbk
