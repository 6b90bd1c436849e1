// The gated activation of the transformer's MLP: out = silu(gate) * up, with gate and up side by side in one
// row as the joint gate/up product leaves them. Bound by memory traffic: every element is read or written
// once, in 16-byte vectors where a row's address allows it.
#include "activation.h"
#include "common.cuh"

namespace bbk {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;

// fp32 throughout, rounded once at the end. For gate -> -inf the quotient goes to -0 without overflow in
// between.
__device__ __forceinline__ float silu_mul(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

// blockIdx.x is the token; blockIdx.y and the threads walk along its row, one vector at a time. Alignment is
// asked once per row and pointer: an odd row stride shifts every row, an odd intermediate_size shifts `up`
// against `gate`.
template <typename T>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(SwigluParams params) {
  constexpr int kVec = Vec<T>::kSize;
  const int64_t token = blockIdx.x;
  const int64_t size = params.intermediate_size;
  const T* gate = static_cast<const T*>(params.gate_up) + token * params.gate_up_row_stride;
  const T* up = gate + size;
  T* out = static_cast<T*>(params.out) + token * params.out_row_stride;
  const bool gate_aligned = is_vec_aligned(gate);
  const bool up_aligned = is_vec_aligned(up);
  const bool out_aligned = is_vec_aligned(out);

  const int64_t step = static_cast<int64_t>(gridDim.y) * kThreads * kVec;
  for (int64_t i = (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kVec; i < size; i += step) {
    if (i + kVec <= size) {
      const Vec<T> gate_vec = load_vec(gate + i, gate_aligned);
      const Vec<T> up_vec = load_vec(up + i, up_aligned);
      Vec<T> out_vec;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        out_vec.values[j] = from_float<T>(silu_mul(to_float(gate_vec.values[j]), to_float(up_vec.values[j])));
      }
      store_vec(out + i, out_vec, out_aligned);
    } else {
      for (int64_t j = i; j < size; ++j) out[j] = from_float<T>(silu_mul(to_float(gate[j]), to_float(up[j])));
    }
  }
}

}  // namespace

void swiglu(const SwigluParams& params, const Launch& launch) {
  constexpr char kOp[] = "swiglu";
  check_at_least(kOp, "num_tokens", params.num_tokens, 0);
  check_at_least(kOp, "intermediate_size", params.intermediate_size, 0);
  dispatch_dtype(params.dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    if (params.num_tokens == 0 || params.intermediate_size == 0) return;  // an empty grid is a launch error
    const DeviceGuard guard(launch.device, kOp);
    const int64_t chunks = ceil_div<int64_t>(params.intermediate_size, kThreads * Vec<T>::kSize);
    const dim3 grid(static_cast<unsigned>(params.num_tokens),
                    static_cast<unsigned>(chunks < kMaxGridY ? chunks : kMaxGridY));
    swiglu_kernel<T><<<grid, kThreads, 0, launch.stream>>>(params);
    check_launch(kOp);
  });
}

}  // namespace bbk
