// The gated activation of the transformer's MLP: out = silu(gate) * up, with gate and up side by side in one
// row as the joint gate/up product leaves them. Bound by memory traffic: every element is read or written
// once, in 16-byte vectors where addresses and sizes allow it.
#include "common/elements.cuh"
#include "common/launch.cuh"
#include "layer/activation.h"
#include "layer/rows.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "swiglu";
constexpr int kThreads = 256;
constexpr int kVecs = 2;  // of gate and of up that a thread has in flight
constexpr int64_t kMaxGridY = 65535;

// Rows of whole, aligned vectors. blockIdx.x is the token; blockIdx.y and the threads walk along its row,
// kVecs vectors of gate and of up at a time, all asked for before the first is used.
template <typename T>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(SwigluParams params) {
  const int64_t token = blockIdx.x;
  const int64_t num_vecs = params.intermediate_size / Vec<T>::kSize;
  const auto* gate = reinterpret_cast<const Vec<T>*>(static_cast<const T*>(params.gate_up) +
                                                     token * params.gate_up_row_stride);
  const auto* up = gate + num_vecs;
  auto* out = reinterpret_cast<Vec<T>*>(static_cast<T*>(params.out) + token * params.out_row_stride);

  const int64_t step = gridDim.y * int64_t{kThreads * kVecs};
  for (int64_t start = blockIdx.y * int64_t{kThreads * kVecs} + threadIdx.x; start < num_vecs;
       start += step) {
    Vec<T> gates[kVecs], ups[kVecs];
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int64_t i = start + v * kThreads;
      if (i < num_vecs) gates[v] = gate[i], ups[v] = up[i];
    }
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int64_t i = start + v * kThreads;
      Vec<T> products;
#pragma unroll
      for (int j = 0; j < Vec<T>::kSize; ++j) {
        products.values[j] =
            from_float<T>(silu_mul<T>(to_float(gates[v].values[j]), to_float(ups[v].values[j])));
      }
      if (i < num_vecs) out[i] = products;
    }
  }
}

// Rows of any length and alignment: an odd row stride shifts every row, an odd intermediate_size shifts `up`
// against `gate`.
template <typename T>
__global__ void __launch_bounds__(kThreads) swiglu_any_kernel(SwigluParams params) {
  const int64_t token = blockIdx.x;
  const T* gate = static_cast<const T*>(params.gate_up) + token * params.gate_up_row_stride;
  const T* up = gate + params.intermediate_size;
  T* out = static_cast<T*>(params.out) + token * params.out_row_stride;
  const int64_t step = gridDim.y * int64_t{kThreads};
  for (int64_t i = blockIdx.y * int64_t{kThreads} + threadIdx.x; i < params.intermediate_size; i += step) {
    out[i] = from_float<T>(silu_mul<T>(to_float(gate[i]), to_float(up[i])));
  }
}

template <typename T>
bool is_vectorized(const SwigluParams& params) {
  const auto aligned = [](const void* pointer, int64_t row_stride) {
    return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vec<T>) == 0 && row_stride % Vec<T>::kSize == 0;
  };
  return params.intermediate_size % Vec<T>::kSize == 0 &&
         aligned(params.gate_up, params.gate_up_row_stride) && aligned(params.out, params.out_row_stride);
}

// A block takes block_elements of a row at a time.
dim3 grid_of(const SwigluParams& params, int64_t block_elements) {
  const int64_t blocks = ceil_div(params.intermediate_size, block_elements);
  return dim3(static_cast<unsigned>(params.num_tokens),
              static_cast<unsigned>(blocks < kMaxGridY ? blocks : kMaxGridY));
}

template <typename T>
void launch_swiglu(const SwigluParams& params, const Launch& launch) {
  if (is_vectorized<T>(params)) {
    const dim3 grid = grid_of(params, kThreads * kVecs * Vec<T>::kSize);
    return launch_kernel<swiglu_kernel<T>>(kOp, launch, {grid, kThreads}, params);
  }
  launch_kernel<swiglu_any_kernel<T>>(kOp, launch, {grid_of(params, kThreads), kThreads}, params);
}

}  // namespace

void swiglu(const SwigluParams& params, const Launch& launch) {
  check_at_least(kOp, "num_tokens", params.num_tokens, 0);
  check_at_least(kOp, "intermediate_size", params.intermediate_size, 0);
  dispatch_dtype(params.dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    if (params.num_tokens == 0 || params.intermediate_size == 0) return;  // an empty grid is a launch error
    const DeviceGuard guard(launch.device, kOp);
    launch_swiglu<T>(params, launch);
  });
}

}  // namespace bbk
