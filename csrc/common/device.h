// The device that an operator runs on: made current for a launch, and asked for what it has.
#pragma once

#include <atomic>
#include <climits>

#include "common/driver.h"
#include "common/integers.h"

namespace bbk {

// The context that the runtime uses on a device.
inline CUcontext primary_context(int device, const char* op) {
  constexpr int kMaxDevices = 64;  // those beyond are asked every time
  static std::atomic<CUcontext> known[kMaxDevices];
  const bool is_kept = device >= 0 && device < kMaxDevices;
  CUcontext context = is_kept ? known[device].load(std::memory_order_acquire) : nullptr;
  if (context != nullptr) return context;
  static const auto get = driver_function<PFN_cuDeviceGet_v2000>(op, "cuDeviceGet", 2000);
  static const auto retain =
      driver_function<PFN_cuDevicePrimaryCtxRetain_v7000>(op, "cuDevicePrimaryCtxRetain", 7000);
  static const auto init = driver_function<PFN_cuInit_v2000>(op, "cuInit", 2000);
  check_driver(init(0), op, "cuInit");  // where nothing has been done on a GPU yet; else it does nothing
  CUdevice handle;
  check_driver(get(&handle, device), op, "cuDeviceGet");
  check_driver(retain(&context, handle), op, "cuDevicePrimaryCtxRetain");
  if (is_kept) known[device].store(context, std::memory_order_release);
  return context;
}

// Makes `device` current while it lives: a stream takes launches from its own device alone. It pushes a
// context and pops it: cudaSetDevice on the way back would start a context on the device that was current,
// some 500 MB of its memory, where there was none.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    int current = 0;
    check_cuda(cudaGetDevice(&current), op);
    if (device == current) return;
    static const auto push = driver_function<PFN_cuCtxPushCurrent_v4000>(op, "cuCtxPushCurrent", 4000);
    pop_ = pop(op);
    check_driver(push(primary_context(device, op)), op, "cuCtxPushCurrent");
    changed_ = true;
  }
  ~DeviceGuard() {
    CUcontext popped;
    if (changed_) pop_(&popped);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static PFN_cuCtxPopCurrent_v4000 pop(const char* op) {
    static const auto function = driver_function<PFN_cuCtxPopCurrent_v4000>(op, "cuCtxPopCurrent", 4000);
    return function;
  }

  PFN_cuCtxPopCurrent_v4000 pop_ = nullptr;
  bool changed_ = false;
};

// An integer for each device, not negative, that is found once. Threads may ask at the same time.
class PerDevice {
 public:
  static constexpr int kMaxDevices = 64;  // those beyond are asked every time

  template <typename Ask>
  int get(int device, Ask&& ask) {
    if (device < 0 || device >= kMaxDevices) return ask();
    int known = known_[device].load(std::memory_order_relaxed);
    if (known == 0) {
      known = 1 + ask();
      known_[device].store(known, std::memory_order_relaxed);
    }
    return known - 1;
  }

 private:
  std::atomic<int> known_[kMaxDevices] = {};  // 0: not asked yet, else 1 + the answer
};

template <cudaDeviceAttr kAttribute>
int device_attribute(const char* op, int device) {
  static PerDevice known;
  return known.get(device, [&] {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, kAttribute, device), op);
    return value;
  });
}

inline int num_sms(const char* op, int device) {
  return device_attribute<cudaDevAttrMultiProcessorCount>(op, device);
}

// For tests: no device counts as having more shared memory for a CTA than this.
inline std::atomic<int>& shared_bytes_limit() {
  static std::atomic<int> limit{INT_MAX};
  return limit;
}

// Bytes of shared memory that a CTA can have, static and dynamic together: 99 KiB on sm_86, sm_89 and sm_120,
// 163 on sm_80, 227 on sm_90.
inline int max_shared_bytes(const char* op, int device) {
  const int there = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(op, device);
  return smaller(there, shared_bytes_limit().load(std::memory_order_relaxed));
}

}  // namespace bbk
