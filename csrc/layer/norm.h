#pragma once

#include "common/params.h"

namespace bbk {

// residual[t] += x[t] (if given; rounded to the dtype), then out[t] = weight * round(x[t] / sqrt(mean(x[t]^2)
// + eps)) of the sum, statistics in fp32.
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
};

// `programmatic`: the kernel may be launched while its predecessor in the stream still drains.
void rms_norm(const RmsNormParams& params, bool programmatic, const Launch& launch);

}  // namespace bbk
