// The 64 rows of a warpgroup in stream_k.cu: their products with a work range's units, and how the rows of a
// tile that several CTAs share come together.
#pragma once

#include "attention/stream_k_ranges.cuh"

namespace bbk {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A warpgroup's 64 rows of a tile, and what it does with the tile's units.
template <typename T, int kHeadDim, bool kE4m3, class S>
class Block {
  using C = Computed<T, kE4m3>;

 public:
  __device__ __forceinline__ Block(const AttentionParams& params, unsigned char* shared_memory, Ring<S>& keys,
                                   Ring<S>& values)
      : params_(params),
        units_(units_of(params)),
        shared_memory_(shared_memory),
        keys_(keys),
        values_(values),
        index_(static_cast<int>(threadIdx.x) / 128),
        scale_(params.softmax_scale * kLog2e) {}

  // The rows of a portion's tile.
  __device__ __forceinline__ void load_rows(const Portion& portion) {
    if constexpr (kE4m3) {
      scale_ = params_.softmax_scale * kLog2e * params_.k_scale[portion.kv_head];
      value_scale_ = params_.v_scale[portion.kv_head];
    }
    const int group = params_.num_heads / params_.num_kv_heads;
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
    rows_.load_values(params_);
  }

  __device__ __forceinline__ void attend(const Portion& portion) {
    state_.clear();
    end_ = portion.end;
    int unit = portion.begin;
    Task task = look_up(unit);
    while (unit < end_) {
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

  // Adds the partial results of the CTAs from `first` on that had earlier units of the tile, in order.
  __device__ __forceinline__ void add_earlier(const Portion& portion, int first) {
    if (portion.begin == portion.tile_begin) return;
    const int end = blockIdx.x;
    // A thread waits for each of them.
    for (int cta = first + threadIdx.x % 128; cta < end; cta += 128) {
      int32_t* arrival = params_.arrivals + kStreamKWarpgroups * cta + index_;
      int arrived;
      do {
        asm volatile("ld.acquire.gpu.global.b32 %0, [%1];\n" : "=r"(arrived) : "l"(arrival) : "memory");
      } while (arrived == 0);
      *arrival = 0;  // for the next launch
    }
    sync();
    if (!has_rows()) return;
    for (int cta = first; cta < end; ++cta) add(cta);
  }

  __device__ __forceinline__ void store() {
    const int lane = threadIdx.x % 4;  // of the four that hold a row
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int2 source = rows_.source[half];
      const int64_t place = static_cast<int64_t>(source.x) * params_.num_heads + source.y;
      T* target = static_cast<T*>(params_.out) + place * kHeadDim + 8 * lane;
      const float inverse = (kE4m3 ? value_scale_ : 1.0f) / state_.sum[half];
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; n += 4) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          pairs[i] =
              pack_pair<T>(state_.out[n + i][2 * half] * inverse, state_.out[n + i][2 * half + 1] * inverse);
        }
        trade_pairs(pairs, lane);
        if (source.x >= 0) {
          *reinterpret_cast<uint4*>(target + 8 * n) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
      }
    }
  }

  // Leaves the sums for the CTA that has the tile's last units, and takes the rows of `next`, which
  // arrive under the stores.
  __device__ __forceinline__ void leave(const Portion& next) {
    const bool leaves = has_rows();
    load_rows(next);
    if (leaves) {
      float4* out = partial(blockIdx.x);
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        out[n * kStreamKThreads] =
            make_float4(state_.out[n][0], state_.out[n][1], state_.out[n][2], state_.out[n][3]);
      }
      out[kHeadDim / 8 * kStreamKThreads] =
          make_float4(state_.most[0], state_.most[1], state_.sum[0], state_.sum[1]);
    }
    sync();  // with which the release below counts for all threads
    if (threadIdx.x % 128 == 0) {
      asm volatile("st.release.gpu.global.b32 [%0], %1;\n" ::"l"(params_.arrivals +
                                                                 kStreamKWarpgroups * blockIdx.x + index_),
                   "r"(1)
                   : "memory");
    }
  }

 private:
  struct Task {
    uint64_t tokens;  // a bit for each of the block that reads these keys
    int num_keys;
  };

  // Of four lanes, each with a pair of neighbouring columns of four matrices: lane i leaves with all pairs of
  // matrix i, which it can store at once.
  __device__ __forceinline__ static void trade_pairs(uint32_t (&pairs)[4], int lane) {
    const bool odd = lane & 1, high = lane & 2;
    const uint32_t first = __shfl_xor_sync(0xffffffffu, odd ? pairs[0] : pairs[1], 1);
    const uint32_t second = __shfl_xor_sync(0xffffffffu, odd ? pairs[2] : pairs[3], 1);
    const uint32_t even_pairs[2] = {odd ? first : pairs[0], odd ? second : pairs[2]};
    const uint32_t odd_pairs[2] = {odd ? pairs[1] : first, odd ? pairs[3] : second};
    const uint32_t third = __shfl_xor_sync(0xffffffffu, high ? even_pairs[0] : even_pairs[1], 2);
    const uint32_t fourth = __shfl_xor_sync(0xffffffffu, high ? odd_pairs[0] : odd_pairs[1], 2);
    pairs[0] = high ? third : even_pairs[0];
    pairs[1] = high ? fourth : odd_pairs[0];
    pairs[2] = high ? even_pairs[1] : third;
    pairs[3] = high ? odd_pairs[1] : fourth;
  }

  __device__ __forceinline__ void sync() const { named_barrier(index_ + 1, 128); }

  // Of the warp.
  __device__ __forceinline__ bool has_rows() const {
    return __any_sync(0xffffffffu, rows_.source[0].x >= 0 || rows_.source[1].x >= 0);
  }

  __device__ __forceinline__ float4* partial(int cta) const {
    constexpr int kSize = (kHeadDim / 8 + 1) * kStreamKThreads;
    return reinterpret_cast<float4*>(params_.partial_out) + static_cast<int64_t>(cta) * kSize + threadIdx.x;
  }

  __device__ __forceinline__ void add(int cta) {
    const float4* other = partial(cta);
    const float4 theirs = __ldcg(other + kHeadDim / 8 * kStreamKThreads);
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
      const float4 out = __ldcg(other + n * kStreamKThreads);
      const float values[4] = {out.x, out.y, out.z, out.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        state_.out[n][i] = state_.out[n][i] * mine[i / 2] + values[i] * weight[i / 2];
      }
    }
  }

  __device__ __forceinline__ Task look_up(int unit) const {
    if (unit >= end_) return Task{0, 0};
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
    pack_weights<C>(score, weights);
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
    keep_in_registers(flat(score));
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
      keep_in_registers(flat(score));
      release(keys_);
      takes_part = weigh(score, task, correction);
      wgmma_wait<0>();
      keep_in_registers(flat(state_.out));
      release(values_);
      pack(score, takes_part, weights);
      if (takes_part) state_.shrink(correction);
    }
    barrier_wait(values_.full(), values_.phase);
    clear_missing_values(task);
    start_weighing<S>(state_, weights, values_.tile());
    wgmma_wait<0>();
    keep_in_registers(flat(state_.out));
    release(values_);
    task = next;
    return unit + 1;
  }

  const AttentionParams& params_;
  const AttentionUnit* units_;
  unsigned char* shared_memory_;
  Ring<S>& keys_;
  Ring<S>& values_;
  const int index_;  // of the warpgroup
  float scale_;
  float value_scale_ = 1.0f;  // of a cache in e4m3
  int end_ = 0;               // unit behind the portion's last one
  int slot_[2];               // token of the block that each half belongs to
  QueryRows<C, kHeadDim, T> rows_;
  RowState<C, kHeadDim, T> state_;
};

#endif

}  // namespace bbk
