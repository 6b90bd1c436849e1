// The 64 rows of a warpgroup in attention_even.cu: their products with a stretch's units, and how the rows of
// a tile that several processors share come together.
#pragma once

#include "attention_stretches.cuh"

namespace bbk {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A warpgroup's 64 rows of a tile, and what it does with the tile's units.
template <typename T, int kHeadDim, class S>
class Block {
 public:
  __device__ __forceinline__ Block(const AttentionParams& params, const Portion& portion,
                                   unsigned char* shared_memory, Ring<S>& keys, Ring<S>& values)
      : params_(params),
        portion_(portion),
        units_(units_of(params)),
        shared_memory_(shared_memory),
        keys_(keys),
        values_(values),
        index_(static_cast<int>(threadIdx.x) / 128),
        scale_(params.softmax_scale * kLog2e) {
    const int group = params.num_heads / params.num_kv_heads;
    const int first = index_ ? portion.first_token[1] : portion.first_token[0];
    const int number = index_ ? portion.num_tokens[1] : portion.num_tokens[0];
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane / 4 + 8 * half;
      slot_[half] = row / group;
      const bool exists = slot_[half] < number;
      rows_.source[half] =
          exists ? make_int2(first + slot_[half], portion.kv_head * group + row % group) : make_int2(-1, 0);
      if (!exists) slot_[half] = 63;  // whose bit is 0, unless 64 tokens exist
    }
    rows_.load_values(params);
    state_.clear();
  }

  __device__ __forceinline__ void attend() {
    int unit = portion_.begin;
    Task task = look_up(unit);
    while (unit < portion_.end) {
      if (task.tokens == 0) {
        pass(keys_);
        pass(values_);
        task = look_up(++unit);
      } else {
        unit = attend_run(unit, task);
      }
    }
    state_.finish();
  }

  // Adds the partial results of the processors that had earlier units of the tile, in their order.
  __device__ __forceinline__ void add_earlier(const Line& line) {
    const int first = portion_.kv_head * line.units;
    if (portion_.begin == portion_.tile_begin) return;
    for (int processor = line.processor_of(first + portion_.tile_begin);
         processor < static_cast<int>(blockIdx.x); ++processor) {
      int32_t* arrival = params_.arrivals + kEvenWarpgroups * processor + index_;
      if (threadIdx.x % 128 == 0) {
        int arrived;
        do {
          asm volatile("ld.acquire.gpu.global.b32 %0, [%1];\n" : "=r"(arrived) : "l"(arrival) : "memory");
        } while (arrived == 0);
        *arrival = 0;  // for the next launch
      }
      sync();
      if (has_rows()) add(processor);
    }
  }

  __device__ __forceinline__ void store() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (rows_.source[half].x < 0) continue;
      const int64_t place =
          static_cast<int64_t>(rows_.source[half].x) * params_.num_heads + rows_.source[half].y;
      T* target = static_cast<T*>(params_.out) + place * kHeadDim + 2 * (threadIdx.x % 4);
      const float inverse = 1.0f / state_.sum[half];
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        *reinterpret_cast<uint32_t*>(target + 8 * n) =
            bbk::pack<T>(state_.out[n][2 * half] * inverse, state_.out[n][2 * half + 1] * inverse);
      }
    }
  }

  // Leaves the sums for the processor that has the tile's last units.
  __device__ __forceinline__ void leave() {
    if (has_rows()) {
      float4* out = partial(blockIdx.x);
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        out[n * kEvenThreads] =
            make_float4(state_.out[n][0], state_.out[n][1], state_.out[n][2], state_.out[n][3]);
      }
      out[kHeadDim / 8 * kEvenThreads] =
          make_float4(state_.most[0], state_.most[1], state_.sum[0], state_.sum[1]);
    }
    sync();  // with which the release below counts for all threads
    if (threadIdx.x % 128 == 0) {
      asm volatile("st.release.gpu.global.b32 [%0], %1;\n" ::"l"(params_.arrivals +
                                                                 kEvenWarpgroups * blockIdx.x + index_),
                   "r"(1)
                   : "memory");
    }
  }

 private:
  struct Task {
    uint64_t tokens;  // a bit for each of the block that reads these keys
    int num_keys;
  };

  __device__ __forceinline__ void sync() const { named_barrier(index_ + 1, 128); }

  // Of the warp.
  __device__ __forceinline__ bool has_rows() const {
    return __any_sync(0xffffffffu, rows_.source[0].x >= 0 || rows_.source[1].x >= 0);
  }

  __device__ __forceinline__ float4* partial(int processor) const {
    constexpr int kSize = (kHeadDim / 8 + 1) * kEvenThreads;
    return reinterpret_cast<float4*>(params_.partial_out) + static_cast<int64_t>(processor) * kSize +
           threadIdx.x;
  }

  __device__ __forceinline__ void add(int processor) {
    const float4* other = partial(processor);
    const float4 theirs = __ldcg(other + kHeadDim / 8 * kEvenThreads);
    const float most[2] = {theirs.x, theirs.y}, sum[2] = {theirs.z, theirs.w};
    float mine[2], weight[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float new_most = fmaxf(state_.most[half], most[half]);
      const float shift = new_most == -INFINITY ? 0.0f : new_most * scale_;
      mine[half] = exp2_fast(state_.most[half] * scale_ - shift);
      weight[half] = exp2_fast(most[half] * scale_ - shift);
      state_.most[half] = new_most;
      state_.sum[half] = state_.sum[half] * mine[half] + sum[half] * weight[half];
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      const float4 out = __ldcg(other + n * kEvenThreads);
      const float values[4] = {out.x, out.y, out.z, out.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        state_.out[n][i] = state_.out[n][i] * mine[i / 2] + values[i] * weight[i / 2];
      }
    }
  }

  __device__ __forceinline__ Task look_up(int unit) const {
    if (unit >= portion_.end) return Task{0, 0};
    return Task{units_[unit].tokens[index_], units_[unit].num_keys};
  }

  // A unit without work for this warpgroup.
  __device__ __forceinline__ void pass(Ring<S>& ring) {
    barrier_wait(ring.full(), ring.phase);
    release(ring);
  }

  // Scores to weights, unless the warp has no rows here.
  __device__ __forceinline__ bool weigh(float (&score)[kUnitKeys / 8][4], const Task& task,
                                        float (&correction)[2]) {
    const bool reads[2] = {static_cast<bool>(task.tokens >> slot_[0] & 1),
                           static_cast<bool>(task.tokens >> slot_[1] & 1)};
    if (!__any_sync(0xffffffffu, reads[0] || reads[1])) return false;
    if (!__all_sync(0xffffffffu, reads[0] && reads[1])) {
#pragma unroll
      for (int n = 0; n < kUnitKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) score[n][i] = reads[i / 2] ? score[n][i] : -INFINITY;
      }
    }
    if (task.num_keys < kUnitKeys) mask_scores(score, 0, task.num_keys);
    state_.weigh(score, scale_, correction);
    return true;
  }

  // Weights of 0 for a warp without rows.
  __device__ __forceinline__ void pack(const float (&score)[kUnitKeys / 8][4], bool takes_part,
                                       uint32_t (&weights)[kUnitKeys / 16][4]) const {
    pack_weights<T>(score, weights);
    const uint32_t mask = takes_part ? 0xffffffffu : 0;
#pragma unroll
    for (int k = 0; k < kUnitKeys / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[k][i] &= mask;
    }
  }

  __device__ __forceinline__ void clear_missing_values(const Task& task) {
    if (task.num_keys == kUnitKeys) return;
    clear_values<S>(shared_memory_ + (values_.tile() - shared_address(shared_memory_)), task.num_keys);
  }

  // Works through units until one that this warpgroup passes; returns that one, and its task. The products
  // of the next keys run under the softmax of these.
  __device__ __forceinline__ int attend_run(int unit, Task& task) {
    float score[kUnitKeys / 8][4];
    float correction[2];
    uint32_t weights[kUnitKeys / 16][4];
    barrier_wait(keys_.full(), keys_.phase);
    start_scores<S>(score, rows_, keys_.tile());
    Task next = look_up(unit + 1);
    wgmma_wait<0>();
    keep_in_registers(score);
    release(keys_);
    bool takes_part = weigh(score, task, correction);
    pack(score, takes_part, weights);
    if (takes_part) state_.shrink(correction);
    while (next.tokens != 0) {
      barrier_wait(keys_.full(), keys_.phase);
      start_scores<S>(score, rows_, keys_.tile());
      barrier_wait(values_.full(), values_.phase);
      clear_missing_values(task);
      start_weighing<S>(state_, weights, values_.tile());
      task = next;
      next = look_up(++unit + 1);
      wgmma_wait<1>();
      keep_in_registers(score);
      release(keys_);
      takes_part = weigh(score, task, correction);
      wgmma_wait<0>();
      keep_in_registers(state_.out);
      release(values_);
      pack(score, takes_part, weights);
      if (takes_part) state_.shrink(correction);
    }
    barrier_wait(values_.full(), values_.phase);
    clear_missing_values(task);
    start_weighing<S>(state_, weights, values_.tile());
    wgmma_wait<0>();
    keep_in_registers(state_.out);
    release(values_);
    task = next;
    return unit + 1;
  }

  const AttentionParams& params_;
  const Portion& portion_;
  const AttentionUnit* units_;
  unsigned char* shared_memory_;
  Ring<S>& keys_;
  Ring<S>& values_;
  const int index_;  // of the warpgroup
  const float scale_;
  int slot_[2];  // token of the block that each half belongs to
  QueryRows<T, kHeadDim> rows_;
  RowState<T, kHeadDim> state_;
};

#endif

}  // namespace bbk
