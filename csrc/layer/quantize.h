#pragma once

#include "common/params.h"

namespace bbk {

// What is quantised: the rows of x; their norm, with the residual add in front of it (see norm.h); or
// silu(gate) * up of rows that hold gates, then ups. All but the first are rounded to the dtype before.
enum class QuantizeSource { kRows, kNorm, kSwiglu };

// scale[t] = amax(abs(row t)) / 448, out[t] = row t * (448 / amax) in e4m3, to the nearest, ties to even; the
// largest magnitude counts as at least 1e-30.
struct QuantizeParams {
  const void* x;       // [num_tokens, dim], kSwiglu: [num_tokens, 2 * dim]
  const void* weight;  // kNorm: [dim], contiguous
  void* residual;      // kNorm: [num_tokens, dim] or null, written
  uint8_t* out;        // [num_tokens, dim], contiguous, written
  float* scale;        // [num_tokens], written
  int64_t num_tokens;
  int64_t dim;
  int64_t x_row_stride;
  int64_t residual_row_stride;
  float eps;
  DType dtype;  // of x, weight and residual
};

// `programmatic`: the kernel may be launched while its predecessor in the stream still drains.
void quantize(const char* op, QuantizeSource source, const QuantizeParams& params, bool programmatic,
              const Launch& launch);

}  // namespace bbk
