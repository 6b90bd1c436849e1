// A kernel that is never launched, compiled like all others, tells by its static shared memory which of them
// were loaded for a device.
#include "common/capability.h"
#include "common/device.h"

namespace bbk {
namespace {

// Of the probe in code for sm_90a; far more than a driver may reserve of each CTA's shared memory.
constexpr int kSm90aBytes = 16384;

__global__ void probe_kernel() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __shared__ volatile char bytes[kSm90aBytes];
  bytes[threadIdx.x] = 0;
#endif
}

Code ask(int device) {
  constexpr char kOp[] = "has_code_for";
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
  static PerDevice known;
  return static_cast<Code>(known.get(device, [&] { return static_cast<int>(ask(device)); }));
}

void check_sm90a(const char* op, int device) {
  if (has_code_for(device) == Code::kSm90a) return;
  fail(op, "expected a GPU of sm_90 and an extension built for 90a");
}

}  // namespace bbk
