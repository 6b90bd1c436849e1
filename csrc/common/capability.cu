// A kernel that is never launched, compiled like all others, tells by its static shared memory which of them
// were loaded for a device.
#include <atomic>

#include "common/capability.h"
#include "common/common.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "has_code_for";
constexpr int kMaxDevices = 64;
// Far enough apart for what a driver may reserve of each CTA's shared memory.
constexpr int kPortableBytes = 16;
constexpr int kSm90aBytes = 16384;

__global__ void probe_kernel() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __shared__ volatile char bytes[kSm90aBytes];
#else
  __shared__ volatile char bytes[kPortableBytes];
#endif
  bytes[threadIdx.x] = 0;
}

Code ask(int device) {
  const DeviceGuard guard(device, kOp);
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, probe_kernel);
  switch (status) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorInvalidPtx:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
      cudaGetLastError();  // or the next check would find it
      return Code::kNone;
    default:
      check_cuda(status, kOp);
  }
  return attributes.sharedSizeBytes >= kSm90aBytes ? Code::kSm90a : Code::kPortable;
}

}  // namespace

Code has_code_for(int device) {
  static std::atomic<int> known[kMaxDevices];  // 0: not asked yet, else 1 + the answer
  if (device < 0 || device >= kMaxDevices) return ask(device);
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    answer = 1 + static_cast<int>(ask(device));
    known[device].store(answer, std::memory_order_relaxed);
  }
  return static_cast<Code>(answer - 1);
}

}  // namespace bbk
