#pragma once

#include "common/params.h"

namespace bbk {

// A tensor [num_tokens, num_heads, head_dim] inside a larger product; the last stride is 1.
struct HeadsView {
  void* data;
  int64_t token_stride;
  int64_t head_stride;
};

// A cache [num_pages, page_size, num_kv_heads, head_dim]; the last stride is 1.
struct CacheView {
  void* data;
  int64_t page_stride;
  int64_t token_stride;
  int64_t head_stride;
};

// Norms (where asked) and rotates q in place and k on its way into the cache, at their tokens' positions, and
// stores v beside it.
struct RopeKvWriteParams {
  HeadsView q;               // num_heads, written
  HeadsView k;               // num_kv_heads
  HeadsView v;               // num_kv_heads
  CacheView k_cache;         // written at the slots
  CacheView v_cache;         // written at the slots
  const float* k_scale;      // [num_kv_heads]: the caches are e4m3, divided by these; null: they are not
  const float* v_scale;      // null where k_scale is
  const int32_t* positions;  // [num_tokens]; outside [0, num_positions) the rotation is NaN
  const int64_t* slots;      // [num_tokens], page * page_size + offset; outside of the cache: not stored
  const float* cos;          // [num_positions, head_dim / 2]
  const float* sin;          // [num_positions, head_dim / 2]
  const void* q_norm;        // [head_dim]: RMSNorm over each head in front of the rotation; null: none
  const void* k_norm;        // [head_dim], null where q_norm is
  float norm_eps;
  int64_t cos_row_stride;
  int64_t sin_row_stride;
  int64_t num_tokens;
  int64_t num_positions;
  int64_t num_pages;
  int64_t page_size;
  int num_heads;
  int num_kv_heads;
  int head_dim;  // even
  DType dtype;   // of q, k, v, and of the caches unless they are e4m3
};

// Throws std::invalid_argument in the name of `op`.
void check_rope(const char* op, const RopeKvWriteParams& params);

// `programmatic`: the kernel may be launched while its predecessor in the stream still drains.
void rope_kv_write(const RopeKvWriteParams& params, bool programmatic, const Launch& launch);

}  // namespace bbk
