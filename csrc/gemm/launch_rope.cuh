// What products that rotate and store q, k and v check before they are launched.
#pragma once

#include "gemm/gemm.h"
#include "layer/rope.cuh"

namespace bbk {

inline void check_rotated(const char* op, int64_t num_tokens, int64_t out_features, DType dtype,
                          const RopeKvWriteParams& rope) {
  check_rope(op, rope);
  if (rope.head_dim % 64 != 0) {
    refuse(op, "head_dim: expected a multiple of 64, got " + std::to_string(rope.head_dim));
  }
  const int64_t rows = (rope.num_heads + 2LL * rope.num_kv_heads) * rope.head_dim;
  if (out_features != rows) {
    refuse(op, "out_features: expected " + std::to_string(rows) + ", got " + std::to_string(out_features));
  }
  if (num_tokens != rope.num_tokens || dtype != rope.dtype) {
    refuse(op, "rope: expected the tokens and dtype of the product");
  }
}

template <typename T>
void check_vectors(const char* op, const RopeKvWriteParams& rope) {
  if (writes_vectors<T>(rope)) return;
  refuse(op, "q, k_cache, v_cache, cos, sin: expected addresses and strides of whole 16 bytes");
}

}  // namespace bbk
