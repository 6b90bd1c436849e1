// A warp's 16 rows of attention in registers, as the tensor cores lay them out: lane l holds rows l / 4 and
// l / 4 + 8 ("halves") of a 16 x 8 accumulator, columns 2 * (l % 4) + {0, 1}.
#pragma once

#include <type_traits>

#include "attention/work_tiles.cuh"

namespace bbk {

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// Over the four lanes that hold one row.
__device__ __forceinline__ float row_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

__device__ __forceinline__ float row_sum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// The queries of a warp's rows as left operands of 16 x 16, and where their results go.
// Given: their dtype in memory, T or bf16.
template <typename T, int kHeadDim, typename Given = T>
struct QueryRows {
  int2 source[2];  // token and head of each half; token -1: no such row
  bool direct[2];  // the row reaches into one piece alone, so that the result is final
  uint32_t values[kHeadDim / 16][4];

  __device__ __forceinline__ void load(const AttentionParams& params, const WorkTile& work, int row0) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + lane / 4 + 8 * half;
      const bool exists = row < work.num_rows;
      source[half] = exists ? token_and_head(params, work, row) : make_int2(-1, 0);
      direct[half] = exists && single_piece(params, source[half].x);
    }
    load_values(params);
  }

  // From `source`; 0 where there is no row.
  __device__ __forceinline__ void load_values(const AttentionParams& params) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool exists = source[half].x >= 0;
      const Given* from = static_cast<const Given*>(params.q) + source[half].x * params.q_token_stride +
                          source[half].y * params.q_head_stride + 2 * (threadIdx.x % 32 % 4);
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        values[k][half] = exists ? pair(from + 16 * k) : 0;
        values[k][half + 2] = exists ? pair(from + 16 * k + 8) : 0;
      }
    }
  }

 private:
  __device__ __forceinline__ static uint32_t pair(const Given* from) {
    if constexpr (std::is_same_v<T, Given>) {
      return *reinterpret_cast<const uint32_t*>(from);
    } else {
      const float2 both = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(from));
      return pack_pair<T>(both.x, both.y);
    }
  }
};

// Softmax of a warp's rows so far: sums of weights and of weighted values, relative to the running maximum.
// Given: the dtype of results in memory.
template <typename T, int kHeadDim, typename Given = T>
struct RowState {
  static constexpr int kTiles = kHeadDim / 8;
  float most[2];  // of the scores before the scale
  float sum[2];   // of this lane's columns until `finish`
  float out[kTiles][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      most[half] = -INFINITY;
      sum[half] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
    }
  }

  // Turns the scores of more keys into weights, relative to the new maximum. `scale` leads to base 2.
  // correction: what the earlier sums shrink by; `out` is left to `shrink`.
  template <int kScoreTiles>
  __device__ __forceinline__ void weigh(float (&score)[kScoreTiles][4], float scale, float (&correction)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float new_most = most[half];
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
        new_most = fmaxf(new_most, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
      }
      new_most = row_max(new_most);
      // A warp's keys can all lie behind the end; then everything is exp2(-inf).
      const float shift = new_most == -INFINITY ? 0.0f : new_most * scale;
      correction[half] = exp2_fast(most[half] * scale - shift);
      most[half] = new_most;
      float added = 0.0f;
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          score[n][i] = exp2_fast(score[n][i] * scale - shift);
          added += score[n][i];
        }
      }
      sum[half] = sum[half] * correction[half] + added;
    }
  }

  __device__ __forceinline__ void shrink(const float (&correction)[2]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] *= correction[i / 2];
    }
  }

  __device__ __forceinline__ void finish() {
    sum[0] = row_sum(sum[0]);
    sum[1] = row_sum(sum[1]);
  }

  // Writes the rows' results, or their part of them.
  __device__ __forceinline__ void store(const AttentionParams& params, const WorkTile& work,
                                        const QueryRows<T, kHeadDim, Given>& rows, float scale) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = rows.source[half].x;
      if (token < 0) continue;
      const int64_t place = static_cast<int64_t>(token) * params.num_heads + rows.source[half].y;
      const float inverse = 1.0f / sum[half];
      if (rows.direct[half]) {
        Given* target = static_cast<Given*>(params.out) + place * kHeadDim + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          *reinterpret_cast<uint32_t*>(target + 8 * n) =
              pack_pair<Given>(out[n][2 * half] * inverse, out[n][2 * half + 1] * inverse);
        }
      } else {
        const int64_t partial =
            static_cast<int64_t>(work.piece) * params.num_tokens * params.num_heads + place;
        float* target = params.partial_out + partial * kHeadDim + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          *reinterpret_cast<float2*>(target + 8 * n) =
              make_float2(out[n][2 * half] * inverse, out[n][2 * half + 1] * inverse);
        }
        if (lane % 4 == 0) params.partial_lse[partial] = most[half] * scale + log2f(sum[half]);
      }
    }
  }
};

// Scores of keys behind the work tile's last one count as minus infinity. `key`: of the scores' first column.
template <int kScoreTiles>
__device__ __forceinline__ void mask_scores(float (&score)[kScoreTiles][4], int key, int key_end) {
#pragma unroll
  for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (key + 8 * n + 2 * (static_cast<int>(threadIdx.x) % 4) + i % 2 >= key_end) score[n][i] = -INFINITY;
    }
  }
}

// Weights as left operands of the product with the values.
template <typename T, int kScoreTiles>
__device__ __forceinline__ void pack_weights(const float (&score)[kScoreTiles][4],
                                             uint32_t (&weights)[kScoreTiles / 2][4]) {
#pragma unroll
  for (int k = 0; k < kScoreTiles / 2; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&tile)[4] = score[2 * k + i / 2];
      weights[k][i] = pack_pair<T>(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
    }
  }
}

}  // namespace bbk
