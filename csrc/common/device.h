// The device that an operator runs on: made current for a launch, and asked for what it has.
#pragma once

#include <atomic>

#include "common/check.h"
#include "common/integers.h"

namespace bbk {

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

// Bytes of shared memory that a CTA can have, static and dynamic together.
inline int max_shared_bytes(const char* op, int device) {
  return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(op, device);
}

}  // namespace bbk
