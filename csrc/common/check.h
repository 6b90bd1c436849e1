// How operators refuse and fail. Needs no CUDA compiler.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace bbk {

// For bad input; `what` names the argument, what was expected and what came.
[[noreturn]] inline void refuse(const char* op, const std::string& what) {
  throw std::invalid_argument(std::string("blockbatch_kernels.") + op + ": " + what);
}

// For what the device or this build cannot do.
[[noreturn]] inline void fail(const char* op, const std::string& what) {
  throw std::runtime_error(std::string("blockbatch_kernels.") + op + ": " + what);
}

// Throws a std::runtime_error that names the operator, unless `status` is cudaSuccess.
inline void check_cuda(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  fail(op, std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status));
}

// A size or stride that the Python side got wrong.
inline void check_at_least(const char* op, const char* argument, int64_t value, int64_t least) {
  if (value >= least) return;
  refuse(op, std::string(argument) + ": expected at least " + std::to_string(least) + ", got " +
                 std::to_string(value));
}

}  // namespace bbk
