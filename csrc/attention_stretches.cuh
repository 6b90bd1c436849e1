// How the line of a plan's units is cut into stretches, one for each processor, for attention_even.cu.
#pragma once

#include "attention_sm90.cuh"

namespace bbk {

constexpr int kEvenWarpgroups = 2;
constexpr int kEvenThreads = 128 * kEvenWarpgroups;  // that compute

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A stretch gets no shorter than this for the sake of another processor.
constexpr int kMinUnits = 2;

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

// The line of the units of all heads, and the stretch of each processor in it.
struct Line {
  int units;  // of a head
  int total;
  int processors;  // that take part
  int each;        // units of a processor; of the first `longer` ones there is one more
  int longer;

  __device__ __forceinline__ Line(const AttentionParams& params) {
    units = params.units[0];
    total = units * params.num_kv_heads;
    // As many for each head, if there are enough: then no tile is cut where a head ends.
    const int heads = params.num_kv_heads, all = gridDim.x;
    processors = min(all < heads ? all : all - all % heads, (total + kMinUnits - 1) / kMinUnits);
    each = total / max(1, processors);
    longer = total - each * processors;
  }

  __device__ __forceinline__ int begin(int processor) const {
    return min(total, processor * each + min(processor, longer));
  }

  // The processor whose stretch holds a unit.
  __device__ __forceinline__ int processor_of(int unit) const {
    const int first = longer * (each + 1);
    return unit < first ? unit / (each + 1) : longer + (unit - first) / each;
  }
};

// A stretch's units of one tile and kv head.
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

// The portions of a processor's stretch, from the last to the first: what others wait for is done first, and
// what waits for others last. A processor waits for earlier ones alone, so that some can always go on.
class Stretch {
 public:
  __device__ __forceinline__ Stretch(const AttentionParams& params, const Line& line)
      : params_(params), line_(line), begin_(line.begin(blockIdx.x)), end_(line.begin(blockIdx.x + 1)) {}

  // The next portion; one without units where there is none.
  __device__ __forceinline__ Portion take() {
    Portion portion = {};
    if (end_ <= begin_) return portion;
    portion.kv_head = (end_ - 1) / line_.units;
    const int first = portion.kv_head * line_.units;
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
  const Line& line_;
  const int begin_;
  int end_;
};

#endif

}  // namespace bbk
