// Programmatic dependent launches: on sm_90 a kernel may be scheduled while its predecessor still drains, and
// then waits until everything that came before it in the stream has finished and its writes are visible. The
// small kernels between two matrix products are launched here, and start with that wait.
#pragma once

#include <atomic>

#include "common/common.cuh"

namespace bbk {

// Every thread of a kernel launched by `launch_kernel` calls this before it touches memory or returns: a grid
// that ends without having waited would let its own successor start before its predecessor is done.
__device__ __forceinline__ void wait_for_predecessors() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// From here on the next kernel of the stream may be scheduled, and wait.
__device__ __forceinline__ void allow_successors() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Both, for a kernel of a few microseconds, whose successor takes its place as it ends: the successor is
// launched now and what it does before its own wait comes for free. Where a successor's blocks find room
// beside a long kernel's they would only take it away.
__device__ __forceinline__ void wait_and_let_next_start() {
  allow_successors();
  wait_for_predecessors();
}

// Whether the kernel's machine code on the current device holds the wait: code for sm_80, or compiled by the
// driver from the PTX of sm_80, does not, and must not be launched early.
template <auto kKernel>
bool waits_for_predecessors(int device, const char* op) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int8_t> known[kMaxDevices];  // 0: not asked yet, 1: no, 2: yes
  if (device < 0 || device >= kMaxDevices) return false;
  int8_t answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, kKernel), op);
    answer = attributes.ptxVersion >= 90 ? 2 : 1;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == 2;
}

// Launches kKernel, which starts with wait_for_predecessors(), on the current device.
template <auto kKernel, typename Params>
void launch_kernel(dim3 grid, int threads, const Launch& launch, bool programmatic, const char* op,
                   const Params& params) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = launch.stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  if (programmatic && waits_for_predecessors<kKernel>(launch.device, op)) {
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  check_cuda(cudaLaunchKernelEx(&config, kKernel, params), op);
}

}  // namespace bbk
