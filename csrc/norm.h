#pragma once

#include "params.h"
#include "prefetch.h"

namespace bbk {

// residual[t] += x[t] (if given; rounded to the dtype), then
// out[t] = weight * round(x[t] / sqrt(mean(x[t]^2) + eps)) of the sum, statistics in fp32.
struct RmsNormParams {
  const void* x;       // [num_tokens, dim]
  const void* weight;  // [dim], contiguous
  void* residual;      // [num_tokens, dim] or null, written
  void* out;           // [num_tokens, dim], written
  int64_t num_tokens;
  int64_t dim;
  int64_t x_row_stride;
  int64_t residual_row_stride;
  int64_t out_row_stride;
  float eps;
  DType dtype;  // of all tensors
  Prefetch prefetch;
};

// max_threads: how many threads share a row while each keeps 1, 2, 4 or 8 vectors of 16 bytes.
void rms_norm(const RmsNormParams& params, int max_threads, bool programmatic, const Launch& launch);

}  // namespace bbk
