// What the arguments of all operators have in common. Each operator has a header with its arguments as a
// plain struct and its host entry point. No torch type appears: a tensor is a device pointer with sizes and
// strides, counted in elements. An entry point checks its sizes (std::invalid_argument), launches and returns
// without waiting. A failed launch is a std::runtime_error that names the operator.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/dtype.h"

namespace bbk {

// Where an operator runs: a stream of the device with this index.
struct Launch {
  int device;
  cudaStream_t stream;
};

}  // namespace bbk
