// Arguments of the operators, as plain structs, and their host entry points. No torch type appears here: a
// tensor is a device pointer with sizes and strides, counted in elements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace bbk {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Where an operator runs: a stream of the device with this index.
struct Launch {
  int device;
  cudaStream_t stream;
};

// out[t, i] = silu(gate_up[t, i]) * gate_up[t, intermediate_size + i]
struct SwigluParams {
  const void* gate_up;  // [num_tokens, 2 * intermediate_size]
  void* out;            // [num_tokens, intermediate_size], written
  int64_t num_tokens;
  int64_t intermediate_size;
  int64_t gate_up_row_stride;  // from a token's first element to the next token's
  int64_t out_row_stride;
  DType dtype;  // of both tensors
};

// Each entry point checks its sizes (std::invalid_argument), launches and returns without waiting. A failed
// launch is a std::runtime_error that names the operator.
void swiglu(const SwigluParams& params, const Launch& launch);

}  // namespace bbk
