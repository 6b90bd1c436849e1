// The gated activation of the transformer's MLP: out = silu(gate) * up, with gate and up side by side in one
// row as the joint gate/up product leaves them. Bound by memory traffic: every element is read or written
// once, in 16-byte vectors where a row's address allows it.
#include "activation.h"
#include "launch.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "swiglu";
constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;

// For gate -> -inf the quotient goes to -0 without overflow in between.
template <typename T>
__device__ __forceinline__ float silu_mul(float gate, float up) {
  // The approximate instructions err far below the rounding to 16 bits; exact ones would take longer than the
  // memory traffic. They flush: the results for gates below -87 are -0.
  constexpr float kLog2e = 1.4426950408889634f;
  float exponential, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(exponential) : "f"(-kLog2e * gate));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + exponential));
  return gate * inverse * up;
}

template <>
__device__ __forceinline__ float silu_mul<float>(float gate, float up) {
  return gate / (1.0f + expf(-gate)) * up;
}

// blockIdx.x is the token; blockIdx.y and the threads walk along its row, kVecs vectors at a time. Alignment
// is asked once per row and pointer: an odd row stride shifts every row, an odd intermediate_size shifts `up`
// against `gate`.
template <typename T, int kVecs>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(SwigluParams params) {
  prefetch_to_l2(params.prefetch);
  wait_for_predecessors();
  constexpr int kSize = Vec<T>::kSize;
  const int64_t token = blockIdx.x;
  const int64_t size = params.intermediate_size;
  const T* gate = static_cast<const T*>(params.gate_up) + token * params.gate_up_row_stride;
  const T* up = gate + size;
  T* out = static_cast<T*>(params.out) + token * params.out_row_stride;
  const bool gate_aligned = is_vec_aligned(gate);
  const bool up_aligned = is_vec_aligned(up);
  const bool out_aligned = is_vec_aligned(out);

  constexpr int kBlockElements = kThreads * kVecs * kSize;
  for (int64_t block = blockIdx.y * int64_t{kBlockElements}; block < size;
       block += gridDim.y * int64_t{kBlockElements}) {
    Vec<T> gates[kVecs], ups[kVecs];
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int64_t i = block + (v * kThreads + threadIdx.x) * kSize;
      if (i + kSize <= size) {
        gates[v] = load_vec(gate + i, gate_aligned);
        ups[v] = load_vec(up + i, up_aligned);
      }
    }
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const int64_t i = block + (v * kThreads + threadIdx.x) * kSize;
      if (i + kSize <= size) {
        Vec<T> products;
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          products.values[j] =
              from_float<T>(silu_mul<T>(to_float(gates[v].values[j]), to_float(ups[v].values[j])));
        }
        store_vec(out + i, products, out_aligned);
      } else {
        for (int64_t j = i; j < size; ++j) {
          out[j] = from_float<T>(silu_mul<T>(to_float(gate[j]), to_float(up[j])));
        }
      }
    }
  }
}

template <typename T, int kVecs>
void launch_swiglu(const SwigluParams& params, bool programmatic, const Launch& launch) {
  const int64_t blocks = ceil_div<int64_t>(params.intermediate_size, kThreads * kVecs * Vec<T>::kSize);
  const dim3 grid(static_cast<unsigned>(params.num_tokens),
                  static_cast<unsigned>(blocks < kMaxGridY ? blocks : kMaxGridY));
  launch_kernel<swiglu_kernel<T, kVecs>>(grid, kThreads, launch, programmatic, kOp, params);
}

}  // namespace

void swiglu(const SwigluParams& params, int vecs_per_thread, bool programmatic, const Launch& launch) {
  check_at_least(kOp, "num_tokens", params.num_tokens, 0);
  check_at_least(kOp, "intermediate_size", params.intermediate_size, 0);
  dispatch_dtype(params.dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    if (params.num_tokens == 0 || params.intermediate_size == 0) return;  // an empty grid is a launch error
    const DeviceGuard guard(launch.device, kOp);
    switch (vecs_per_thread) {
      case 1:
        return launch_swiglu<T, 1>(params, programmatic, launch);
      case 2:
        return launch_swiglu<T, 2>(params, programmatic, launch);
      default:
        return launch_swiglu<T, 3>(params, programmatic, launch);
    }
  });
}

}  // namespace bbk
