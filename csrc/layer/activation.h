#pragma once

#include "common/params.h"

namespace bbk {

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

void swiglu(const SwigluParams& params, const Launch& launch);

}  // namespace bbk
