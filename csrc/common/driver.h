// Functions of the driver, looked up at run time: linking them would need libcuda at load time, which a
// machine without a GPU does not have.
#pragma once

#include <cudaTypedefs.h>

#include "common/check.h"

namespace bbk {

// The driver's function of this name, as it was in this version of CUDA.
template <typename Function>
Function driver_function(const char* op, const char* name, unsigned version) {
  void* pointer = nullptr;
  cudaDriverEntryPointQueryResult found;
  check_cuda(cudaGetDriverEntryPointByVersion(name, &pointer, version, cudaEnableDefault, &found), op);
  if (found != cudaDriverEntryPointSuccess) fail(op, std::string("the driver has no ") + name);
  return reinterpret_cast<Function>(pointer);
}

inline void check_driver(CUresult status, const char* op, const char* name) {
  if (status != CUDA_SUCCESS) fail(op, std::string(name) + " returned error " + std::to_string(status));
}

}  // namespace bbk
