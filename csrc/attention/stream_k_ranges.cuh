// The range of a plan's units that an SM, with one CTA, works through in stream_k.cu.
#pragma once

#include "attention/sm90.cuh"

namespace bbk {

constexpr int kStreamKWarpgroups = 2;
constexpr int kStreamKThreads = 128 * kStreamKWarpgroups;  // that compute

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ const AttentionUnit* units_of(const AttentionParams& params) {
  return reinterpret_cast<const AttentionUnit*>(params.units) + 1;
}

// The plan has mostly left L2 since the layer before. Hints alone, so that it may run before
// wait_for_predecessors().
__device__ __forceinline__ void prefetch_units(const AttentionParams& params) {
  constexpr int kLine = 128;
  const int bytes = params.max_units * static_cast<int>(sizeof(AttentionUnit));
  const int step = static_cast<int>(gridDim.x * blockDim.x) * kLine;
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * kLine; i < bytes; i += step) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(reinterpret_cast<const char*>(params.units) + i));
  }
}

// A work range's units of one tile and kv head.
struct Portion {
  int kv_head;
  int begin;  // units of the head
  int end;
  int tile_begin;  // units of the tile
  int tile_end;
  int first_token[2];  // of its blocks
  int num_tokens[2];

  __device__ __forceinline__ bool is_empty() const { return end == begin; }
};

// The portions of a CTA's work range, from the last to the first: what others wait for is done first, and
// what waits for others last. A CTA waits for earlier ones alone, so that some can always go on.
class WorkRange {
 public:
  __device__ __forceinline__ explicit WorkRange(const AttentionParams& params)
      : params_(params), units_(params.units[0]) {
    const int4 range = reinterpret_cast<const int4*>(params.stretches)[blockIdx.x];
    begin_ = range.x;
    end_ = range.y;
    first_cta_ = range.z;
  }

  // Of those that share the tile of the range's first unit.
  __device__ __forceinline__ int first_cta() const { return first_cta_; }

  // The next portion; one without units where there is none.
  __device__ __forceinline__ Portion take() {
    Portion portion = {};
    if (end_ <= begin_) return portion;
    portion.kv_head = (end_ - 1) / units_;
    const int first = portion.kv_head * units_;
    portion.end = end_ - first;
    const AttentionUnit& unit = units_of(params_)[portion.end - 1];
    portion.tile_begin = unit.tile_begin;
    portion.tile_end = unit.tile_end;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      portion.first_token[i] = unit.first_token[i];
      portion.num_tokens[i] = unit.num_tokens[i];
    }
    portion.begin = max(begin_ - first, unit.tile_begin);
    end_ = first + portion.begin;
    return portion;
  }

 private:
  const AttentionParams& params_;
  const int units_;  // of a head
  int begin_;
  int end_;
  int first_cta_;
};

#endif

}  // namespace bbk
