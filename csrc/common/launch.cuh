// How every kernel of the extension is launched, and how kernels behave in programmatic dependent launches:
// on sm_90 a kernel may be scheduled while its predecessor still drains, and then waits until everything that
// came before it in the stream has finished and its writes are visible.
#pragma once

#include <atomic>
#include <mutex>

#include "common/device.h"
#include "common/params.h"

namespace bbk {

// Every thread of a kernel that is launched programmatically calls this before it touches memory or returns:
// a grid that ends without having waited would let its own successor start before its predecessor is done.
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

// Whether the kernel's machine code on the current device, which is `device`, holds the wait: code for sm_80,
// or compiled by the driver from the PTX of sm_80, does not, and must not be launched early.
template <auto kKernel>
bool waits_for_predecessors(const char* op, int device) {
  static PerDevice known;
  return known.get(device, [&] {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, kKernel), op);
    return attributes.ptxVersion >= 90 ? 1 : 0;
  });
}

// Lets a kernel have so much dynamic shared memory on the current device, which is `device`.
inline void raise_shared_bytes(const char* op, int device, const void* kernel, int64_t bytes) {
  constexpr int64_t kWithoutAsking = 48 * 1024;
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), op);
  const int64_t needed = bytes + static_cast<int64_t>(attributes.sharedSizeBytes);
  if (needed <= kWithoutAsking) return;
  const int64_t there = max_shared_bytes(op, device);
  if (bytes <= there) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (status != cudaErrorInvalidValue) return check_cuda(status, op);
    cudaGetLastError();  // too much beside what is static
  }
  fail(op, "shared memory: needs " + std::to_string(needed) + " bytes for a CTA, device " +
               std::to_string(device) + " has " + std::to_string(there));
}

// The same, unless a launch before needed as much. Throws std::runtime_error where the device has less.
template <auto kKernel>
void allow_shared_bytes(const char* op, int device, int64_t bytes) {
  static std::atomic<int64_t> allowed[PerDevice::kMaxDevices];
  static std::mutex mutex;
  const auto kernel = reinterpret_cast<const void*>(kKernel);
  if (device < 0 || device >= PerDevice::kMaxDevices) return raise_shared_bytes(op, device, kernel, bytes);
  if (bytes <= allowed[device].load(std::memory_order_acquire)) return;
  const std::lock_guard<std::mutex> lock(mutex);  // so that no thread lowers what another has raised
  if (bytes <= allowed[device].load(std::memory_order_relaxed)) return;
  raise_shared_bytes(op, device, kernel, bytes);
  allowed[device].store(bytes, std::memory_order_release);
}

// CTAs that the current device, which is `device`, runs at once.
template <auto kKernel>
int64_t resident_ctas(const char* op, int device, int threads, int64_t shared_bytes) {
  allow_shared_bytes<kKernel>(op, device, shared_bytes);
  int per_sm = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kKernel, threads,
                                                           static_cast<size_t>(shared_bytes)),
             op);
  return static_cast<int64_t>(per_sm > 0 ? per_sm : 1) * num_sms(op, device);
}

struct LaunchConfig {
  dim3 grid;
  int threads;                   // of a CTA
  int64_t shared_bytes = 0;      // dynamic, of a CTA
  bool programmatic = false;     // for a kernel that starts with wait_for_predecessors()
  dim3 cluster = dim3(0, 0, 0);  // in CTAs; 0: a kernel without clusters
};

// Launches kKernel on the current device, which is the launch's. A grid of nothing is an error of CUDA's.
template <auto kKernel, typename... Params>
void launch_kernel(const char* op, const Launch& launch, const LaunchConfig& config,
                   const Params&... params) {
  if (config.shared_bytes > 0) allow_shared_bytes<kKernel>(op, launch.device, config.shared_bytes);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t all = {};
  all.gridDim = config.grid;
  all.blockDim = dim3(static_cast<unsigned>(config.threads));
  all.dynamicSmemBytes = static_cast<size_t>(config.shared_bytes);
  all.stream = launch.stream;
  all.attrs = attributes;
  if (config.cluster.x > 0) {
    cudaLaunchAttribute& cluster = attributes[all.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = config.cluster.x;
    cluster.val.clusterDim.y = config.cluster.y;
    cluster.val.clusterDim.z = config.cluster.z;
  }
  if (config.programmatic && waits_for_predecessors<kKernel>(op, launch.device)) {
    cudaLaunchAttribute& early = attributes[all.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  check_cuda(cudaLaunchKernelEx(&all, kKernel, params...), op);
}

}  // namespace bbk
