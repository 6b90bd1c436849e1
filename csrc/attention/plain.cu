// Attention for what the tensor cores do not take: fp32, any head_dim up to 256, any alignment. fp32
// arithmetic throughout; a lane holds one key for the scores and a slice of head_dim for the output.
#include <type_traits>

#include "attention/work_tiles.cuh"
#include "common/e4m3.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "varlen_attention";
constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kWarpRows = 4;
constexpr int kWorkTileRows = kWarps * kWarpRows;
constexpr int kKeys = 32;

__host__ __device__ constexpr int padded(int head_dim) { return (head_dim + 3) / 4 * 4; }
// An odd number of 16-byte units for the usual head_dims: a column of keys then spreads over all banks.
__host__ __device__ constexpr int key_stride(int head_dim) { return padded(head_dim) + 4; }

int shared_bytes(int head_dim) {
  return 4 * ((kWorkTileRows + kKeys) * padded(head_dim) + kKeys * key_stride(head_dim));
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// kSlices: multiples of 32 that cover head_dim. C: elements of the caches.
template <typename T, typename C, int kSlices>
__global__ void __launch_bounds__(kThreads)
    attention_plain_kernel(const __grid_constant__ AttentionParams params) {
  extern __shared__ float4 shared[];
  const int head_dim = params.head_dim, width = padded(head_dim), stride = key_stride(head_dim);
  float* queries = reinterpret_cast<float*>(shared);  // [kWorkTileRows, width], zero behind head_dim
  float* values = queries + kWorkTileRows * width;    // [kKeys, width]
  float* keys = values + kKeys * width;               // [kKeys, stride], zero behind head_dim
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* q = static_cast<const T*>(params.q);

  prefetch_plan(params);
  wait_for_predecessors();
  allow_successors();
  zero_padding<T>(params, threadIdx.x, blockDim.x);
  const int num_work_tiles = params.counts[0] * parts_of_tile(params, kWorkTileRows) * params.num_kv_heads;
  for (int round = 0; round * static_cast<int>(gridDim.x) < num_work_tiles; ++round) {
    const int index = work_tile_of_round(round, num_work_tiles, blockIdx.x, gridDim.x);
    if (index < 0) continue;
    const WorkTile work = read_work_tile(params, index, kWorkTileRows);
    if (work.num_rows == 0) continue;

    float scale = params.softmax_scale;
    float value_scale = 1.0f;
    if constexpr (std::is_same_v<C, E4m3>) {
      scale *= params.k_scale[work.kv_head];
      value_scale = params.v_scale[work.kv_head];
    }
    __syncthreads();  // the work tile before still reads its queries
    for (int row = warp; row < work.num_rows; row += kWarps) {
      const int2 source = token_and_head(params, work, row);
      const T* from = q + source.x * params.q_token_stride + source.y * params.q_head_stride;
      for (int d = lane; d < width; d += 32) {
        queries[row * width + d] = d < head_dim ? to_float(from[d]) * scale : 0.0f;
      }
    }

    float running_max[kWarpRows], sum[kWarpRows], out[kWarpRows][kSlices];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      running_max[r] = -INFINITY;
      sum[r] = 0.0f;
#pragma unroll
      for (int j = 0; j < kSlices; ++j) out[r][j] = 0.0f;
    }

    const int32_t* pages = params.page_table + work.row * params.page_table_stride;
    const C* k_cache = static_cast<const C*>(params.k_cache) + work.kv_head * params.k_head_stride;
    const C* v_cache = static_cast<const C*>(params.v_cache) + work.kv_head * params.v_head_stride;
    for (int key0 = work.key_start; key0 < work.key_end; key0 += kKeys) {
      const int num_keys = min(kKeys, work.key_end - key0);
      __syncthreads();
      for (int key = warp; key < num_keys; key += kWarps) {
        const int64_t page = pages[(key0 + key) / params.page_size];
        const int offset = (key0 + key) % params.page_size;
        const C* k = k_cache + page * params.k_page_stride + offset * params.k_token_stride;
        const C* v = v_cache + page * params.v_page_stride + offset * params.v_token_stride;
        for (int d = lane; d < width; d += 32) {
          keys[key * stride + d] = d < head_dim ? to_float(k[d]) : 0.0f;
          values[key * width + d] = d < head_dim ? to_float(v[d]) : 0.0f;
        }
      }
      __syncthreads();
      if (warp * kWarpRows >= work.num_rows) continue;

      float4 products[kWarpRows] = {};
      const float4* my_key = reinterpret_cast<const float4*>(keys + lane * stride);
      for (int d = 0; d < width / 4; ++d) {
        const float4 k = my_key[d];
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
          const float4 x = reinterpret_cast<const float4*>(queries + (warp * kWarpRows + r) * width)[d];
          products[r].x = fmaf(x.x, k.x, products[r].x);
          products[r].y = fmaf(x.y, k.y, products[r].y);
          products[r].z = fmaf(x.z, k.z, products[r].z);
          products[r].w = fmaf(x.w, k.w, products[r].w);
        }
      }
      float score[kWarpRows], corrections[kWarpRows];
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
        score[r] = (products[r].x + products[r].y) + (products[r].z + products[r].w);
        if (lane >= num_keys) score[r] = -INFINITY;
        const float new_max = fmaxf(running_max[r], warp_max(score[r]));
        const float correction = expf(running_max[r] - new_max);
        running_max[r] = new_max;
        score[r] = expf(score[r] - new_max);
        sum[r] = sum[r] * correction + warp_sum(score[r]);
        corrections[r] = correction;
      }
      // Summed by themselves first: fewer roundings at the size of the whole.
      float added[kWarpRows][kSlices] = {};
      for (int key = 0; key < num_keys; ++key) {
        float value[kSlices];
#pragma unroll
        for (int j = 0; j < kSlices; ++j) {
          const int d = lane + 32 * j;
          value[j] = d < width ? values[key * width + d] : 0.0f;
        }
#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
          const float weight = __shfl_sync(0xffffffffu, score[r], key);
#pragma unroll
          for (int j = 0; j < kSlices; ++j) added[r][j] = fmaf(weight, value[j], added[r][j]);
        }
      }
#pragma unroll
      for (int r = 0; r < kWarpRows; ++r) {
#pragma unroll
        for (int j = 0; j < kSlices; ++j) out[r][j] = fmaf(out[r][j], corrections[r], added[r][j]);
      }
    }

#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      const int row = warp * kWarpRows + r;
      if (row >= work.num_rows) continue;
      const int2 target = token_and_head(params, work, row);
      const int64_t place = static_cast<int64_t>(target.x) * params.num_heads + target.y;
      const bool direct = single_piece(params, target.x);
      const int64_t partial = static_cast<int64_t>(work.piece) * params.num_tokens * params.num_heads + place;
      if (!direct && lane == 0) params.partial_lse[partial] = (running_max[r] + logf(sum[r])) * kLog2e;
#pragma unroll
      for (int j = 0; j < kSlices; ++j) {
        const int d = lane + 32 * j;
        if (d >= head_dim) continue;
        const float result = out[r][j] / sum[r] * value_scale;
        if (direct) {
          static_cast<T*>(params.out)[place * head_dim + d] = from_float<T>(result);
        } else {
          params.partial_out[partial * head_dim + d] = result;
        }
      }
    }
  }
}

template <typename T, typename C, int kSlices>
void launch_plain(const AttentionParams& params, const Launch& launch) {
  constexpr auto kKernel = attention_plain_kernel<T, C, kSlices>;
  const int bytes = shared_bytes(params.head_dim);
  const dim3 grid = persistent_grid<kKernel>(kOp, launch, params, kThreads, bytes, kWorkTileRows);
  launch_kernel<kKernel>(kOp, launch, {grid, kThreads, bytes, params.programmatic}, params);
}

template <typename T, typename C>
void launch_plain(const AttentionParams& params, const Launch& launch) {
  if (params.head_dim <= 64) return launch_plain<T, C, 2>(params, launch);
  if (params.head_dim <= 128) return launch_plain<T, C, 4>(params, launch);
  launch_plain<T, C, 8>(params, launch);
}

}  // namespace

void attention_plain(const AttentionParams& params, const Launch& launch) {
  dispatch_dtype(params.dtype, kOp, [&](auto zero) {
    using T = decltype(zero);
    if (params.k_scale != nullptr) return launch_plain<T, E4m3>(params, launch);
    launch_plain<T, T>(params, launch);
  });
}

}  // namespace bbk
