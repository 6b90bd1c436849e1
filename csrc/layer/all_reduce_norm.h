#pragma once

#include "common/params.h"
#include "layer/peers.h"

namespace bbk {

// The sum of all ranks' x, added in the order of the ranks and rounded to the dtype after each addition; then
// what RmsNormParams or, with `scale`, QuantizeParams of a norm say about it. Every rank launches it, in the
// same order of calls, with an equal number of tokens.
struct AllReduceNormParams {
  const void* x;       // [num_tokens, dim]
  const void* weight;  // [dim], contiguous
  void* residual;      // [num_tokens, dim], written
  void* out;           // [num_tokens, dim], written: of the dtype, or with `scale` contiguous e4m3
  float* scale;        // [num_tokens] or null, written
  Peers peers;         // with room for num_tokens * dim elements of a source
  int64_t num_tokens;
  int64_t dim;
  int64_t x_row_stride;
  int64_t residual_row_stride;
  int64_t out_row_stride;
  float eps;
  int lanes;            // such kernels that may wait for other ranks at the same time on a GPU, at most
  bool lets_next_wait;  // see peers.cuh: only where no other lane is at work
  DType dtype;          // of x, weight and residual: fp32 or bf16
};

// `programmatic`: the kernel may be launched while its predecessor in the stream still drains.
void all_reduce_norm(const AllReduceNormParams& params, bool programmatic, const Launch& launch);

}  // namespace bbk
