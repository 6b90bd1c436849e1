#pragma once

#include "common/fields.h"
#include "common/params.h"
#include "layer/rope.h"

namespace bbk {

// out = x weight^T (+ bias), or with `gated` out = silu(x gate^T) * (x up^T) for a weight of gate's rows over
// up's. Sums in fp32, rounded once.
struct GemmParams {
  const void* x;       // [num_tokens, in_features]
  const void* weight;  // [out_features, in_features]; gated: as many rows of gates and, further on, of ups
  const void* bias;    // [out_features] or null; not with `gated`
  void* out;           // [num_tokens, out_features], written
  int64_t num_tokens;
  int64_t in_features;
  int64_t out_features;
  int64_t x_row_stride;
  int64_t weight_row_stride;
  int64_t out_row_stride;
  int64_t up_distance;  // gated: rows of the weight from a gate to its up
  bool gated;
  DType dtype;  // of all tensors: fp16 or bf16
};

// How the product is cut, by the names of blockbatch_kernels.tuning.LinearTile; linear.cu lists what is
// compiled.
#define BBK_GEMM_TILE(X)                                                              \
  X(int, tokens)    /* room for tokens in a tile */                                   \
  X(int, rows)      /* of the weight in a tile */                                     \
  X(int, split_k)   /* CTAs that share the sum of a tile, each over a stretch of K */ \
  X(int, multicast) /* CTAs that share one read of the weight, each for a part of the tokens */

struct GemmTile {
  BBK_GEMM_TILE(BBK_MEMBER)
};

// Needs Code::kSm90a (common/capability.h); pointers and rows of x, weight and out aligned to 16 bytes;
// num_tokens <= tile.tokens; in_features and out_features multiples of 8. With `static_weight` the weight may
// be read while the kernels before this one in the stream still run, so none of them may write it; that takes
// a `programmatic` launch, which lets the kernel start early and wait on the device.
void gemm(const GemmParams& params, const GemmTile& tile, bool static_weight, bool programmatic,
          const Launch& launch);

// out = x weight^T * x_scale * weight_scale (+ bias) of elements in e4m3. Sums of a stretch of K by the
// tensor cores, sums of stretches in fp32, rounded once. With `gated` out = silu(gate) * up of such rounded
// gates and ups, rounded again, for a weight of gate's rows over up's.
struct GemmFp8Params {
  const uint8_t* x;           // [num_tokens, in_features]
  const float* x_scale;       // [num_tokens]
  const uint8_t* weight;      // [out_features, in_features], gated: of twice as many rows
  const float* weight_scale;  // [rows of the weight]
  const void* bias;           // [out_features] or null; not with `gated`
  void* out;                  // [num_tokens, out_features], written
  int64_t num_tokens;
  int64_t in_features;
  int64_t out_features;
  int64_t x_row_stride;
  int64_t weight_row_stride;
  int64_t out_row_stride;
  bool gated;
  DType dtype;  // of bias and out: fp16 or bf16
};

// How the product is cut, by the names of blockbatch_kernels.tuning.Fp8Tile; linear_fp8.cu,
// linear_swiglu_fp8.cu and linear_fp8_waves.cu list what is compiled.
#define BBK_GEMM_FP8_TILE(X)                                                                      \
  X(int, tokens)      /* room for tokens in a tile; with waves: in a tile of `multicast` CTAs */  \
  X(int, rows)        /* of the weight in a tile of a CTA */                                      \
  X(int, split_k)     /* CTAs that share the sum of a tile, each over a stretch of K */           \
  X(int, multicast)   /* CTAs that share one read of the weight, each for a part of the tokens */ \
  X(int, x_multicast) /* CTAs that share one read of x, each with rows of its own */              \
  X(bool, waves)      /* as many CTAs as fit go from tile to tile, over any number of tokens */

struct GemmFp8Tile {
  BBK_GEMM_FP8_TILE(BBK_MEMBER)
};

// What `gemm` needs, with in_features and row strides in multiples of 16. A `static_weight` has static
// scales.
void gemm_fp8(const GemmFp8Params& params, const GemmFp8Tile& tile, bool static_weight, bool programmatic,
              const Launch& launch);

// The product whose rows are the heads of q, then of k and of v, with `rope` behind it: q goes to rope.q, k
// and v into the caches, and `out`, rope.k and rope.v are not used. Beyond what `gemm` needs: heads of a
// multiple of 64 elements, and 16 bytes of alignment of all that is written, and of cos and sin; of caches in
// e4m3 8 bytes.
void linear_rope_kv_write(const GemmParams& params, const RopeKvWriteParams& rope, const GemmTile& tile,
                          bool static_weight, bool programmatic, const Launch& launch);

// The same behind `gemm_fp8`, whose tiles it has in part: linear_rope_fp8.cu lists them.
void linear_rope_kv_write_fp8(const GemmFp8Params& params, const RopeKvWriteParams& rope,
                              const GemmFp8Tile& tile, bool static_weight, bool programmatic,
                              const Launch& launch);

}  // namespace bbk
