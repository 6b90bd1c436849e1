// What every operator uses: checks, the device of a launch, conversion to fp32 and dispatch over dtypes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/params.h"

namespace bbk {

// Throws a std::runtime_error that names the operator, unless `status` is cudaSuccess.
inline void check_cuda(cudaError_t status, const char* op) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("blockbatch_kernels.") + op + ": " + cudaGetErrorName(status) +
                             ": " + cudaGetErrorString(status));
  }
}

// Makes `device` current while it lives: a stream takes launches from its own device alone.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check_cuda(cudaGetDevice(&previous_), op);
    if (device != previous_) {
      check_cuda(cudaSetDevice(device), op);
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Right after a <<<...>>> launch: configuration errors and a missing machine code for this GPU appear here.
inline void check_launch(const char* op) { check_cuda(cudaGetLastError(), op); }

// For bad input; `what` names the argument, what was expected and what came.
[[noreturn]] inline void refuse(const char* op, const std::string& what) {
  throw std::invalid_argument(std::string("blockbatch_kernels.") + op + ": " + what);
}

// A size or stride that the Python side got wrong.
inline void check_at_least(const char* op, const char* argument, int64_t value, int64_t least) {
  if (value < least) {
    refuse(op, std::string(argument) + ": expected at least " + std::to_string(least) + ", got " +
                   std::to_string(value));
  }
}

template <typename Integer>
constexpr Integer ceil_div(Integer value, Integer divisor) {
  return (value + divisor - 1) / divisor;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// A pointer to shared memory as instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// As many elements as one 16-byte memory transaction of a thread moves.
template <typename T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <typename T>
__device__ __forceinline__ bool is_vec_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vec<T>) == 0;
}

// Loads kSize elements from `pointer`, in one transaction if it is `aligned` and one by one if not.
template <typename T>
__device__ __forceinline__ Vec<T> load_vec(const T* pointer, bool aligned) {
  if (aligned) return *reinterpret_cast<const Vec<T>*>(pointer);
  Vec<T> vec;
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) vec.values[i] = pointer[i];
  return vec;
}

template <typename T>
__device__ __forceinline__ void store_vec(T* pointer, const Vec<T>& vec, bool aligned) {
  if (aligned) {
    *reinterpret_cast<Vec<T>*>(pointer) = vec;
    return;
  }
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) pointer[i] = vec.values[i];
}

// Calls launch(T()) with the C++ type T of `dtype`.
template <typename Launch>
void dispatch_dtype(DType dtype, const char* op, Launch&& launch) {
  switch (dtype) {
    case DType::kFloat32:
      return launch(float());
    case DType::kFloat16:
      return launch(__half());
    case DType::kBFloat16:
      return launch(__nv_bfloat16());
  }
  throw std::invalid_argument(std::string("blockbatch_kernels.") + op +
                              ": dtype: expected code 0, 1 or 2, got " +
                              std::to_string(static_cast<int>(dtype)));
}

}  // namespace bbk
