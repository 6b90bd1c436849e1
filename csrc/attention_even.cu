// Attention on sm_90a whose work is cut evenly: the plan's units (128 keys for up to 128 rows) of all heads
// form one line, of which every processor takes an equal stretch. Shared pages are read once for all rows of
// a tile, and rows with pages of their own follow in the same accumulators. Only a tile that crosses from one
// stretch into the next leaves partial results, which the processor with the tile's last units adds to its
// own.
#include "attention_sm90.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "varlen_attention";
constexpr int kWarpgroups = 2;

struct EvenParams {
  CUtensorMap k_map;
  CUtensorMap v_map;
  AttentionParams attention;
  int box_keys;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int kRowThreads = 128 * kWarpgroups;
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
};

// Calls work(portion) from the last portion to the first: what others wait for is done first, and what waits
// for others last. A processor waits for earlier ones alone, so that some can always go on.
template <typename Work>
__device__ __forceinline__ void for_each_portion(const AttentionParams& params, const Line& line, Work work) {
  const int begin = line.begin(blockIdx.x);
  int end = line.begin(blockIdx.x + 1);
  while (end > begin) {
    Portion portion;
    portion.kv_head = (end - 1) / line.units;
    const int first = portion.kv_head * line.units;
    portion.end = end - first;
    const AttentionUnit& unit = units_of(params)[portion.end - 1];
    portion.tile_begin = unit.tile_begin;
    portion.tile_end = unit.tile_end;
    for (int i = 0; i < 2; ++i) {
      portion.first_token[i] = unit.first_token[i];
      portion.num_tokens[i] = unit.num_tokens[i];
    }
    portion.begin = max(begin - first, unit.tile_begin);
    work(portion);
    end = first + portion.begin;
  }
}

// Fills the rings, run by a warpgroup of its own. Each copy moves the keys of one page and 64 elements, and
// takes its warp a while to start, so that the copies of a tile are spread over the warps, one a thread. The
// lanes look up a batch of units at once, ahead of its use: one after another they would wait for memory.
template <class S>
class UnitLoader {
 public:
  __device__ __forceinline__ UnitLoader(const EvenParams& params, const Portion& portion)
      : params_(params), units_(units_of(params.attention)), portion_(portion) {
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4, lane = threadIdx.x % 32;
    first_box_ = warp;
    box_ = warp + 4 * (lane / S::kSlices);
    slice_ = lane % S::kSlices;
    key_ = box_ * params.box_keys;
    target_ = slice_ * S::kSliceBytes + key_ * kSwizzledRowBytes;
    batch_ = portion.begin;
    here_ = look_up(batch_);
    ahead_ = look_up(batch_ + 32);
  }

  // Every tile of keys ahead of the values before it, which are used later.
  __device__ __forceinline__ void run(Ring<S>& keys, Ring<S>& values) {
    Source now = source(portion_.begin);
    copy(&params_.k_map, now, keys);
    for (int unit = portion_.begin; unit < portion_.end; ++unit) {
      const Source next = source(unit + 1);
      copy(&params_.k_map, next, keys);
      copy(&params_.v_map, now, values);
      now = next;
    }
  }

 private:
  // Of a unit; held by the lane with the unit's place in the batch.
  struct Entry {
    int num_keys;  // 0: there is no such unit
    int first_slot;
    int pages[2];  // of this warp's boxes
  };

  struct Source {
    int num_keys;
    int page;  // of this thread's box
    int slot;
  };

  __device__ __forceinline__ Entry look_up(int batch) const {
    const int unit = batch + static_cast<int>(threadIdx.x) % 32;
    if (unit >= portion_.end) return Entry{0, 0, {0, 0}};
    const AttentionUnit& from = units_[unit];
    return Entry{from.num_keys, from.first_slot, {from.pages[first_box_], from.pages[first_box_ + 4]}};
  }

  __device__ __forceinline__ Source source(int unit) {
    if (unit - batch_ == 32) {
      batch_ = unit;
      here_ = ahead_;
      ahead_ = look_up(batch_ + 32);
    }
    const int lane = unit - batch_;
    Source source;
    source.num_keys = __shfl_sync(0xffffffffu, here_.num_keys, lane);
    const int slot = __shfl_sync(0xffffffffu, here_.first_slot, lane);
    const int first = __shfl_sync(0xffffffffu, here_.pages[0], lane);
    const int second = __shfl_sync(0xffffffffu, here_.pages[1], lane);
    source.page = box_ < 4 ? first : second;
    // Boxes are halves and quarters of a page, or pages are parts of a unit.
    source.slot = (slot + key_) % params_.attention.page_size;
    return source;
  }

  __device__ __forceinline__ void copy(const CUtensorMap* map, const Source& source, Ring<S>& ring) const {
    if (source.num_keys == 0) return;
    barrier_wait(ring.empty(), ring.phase ^ 1);
    if (threadIdx.x % 128 == 0) {
      const int num_boxes = (source.num_keys + params_.box_keys - 1) / params_.box_keys;
      barrier_arrive_expecting(ring.full(), num_boxes * params_.box_keys * kSwizzledRowBytes * S::kSlices);
    }
    if (key_ < source.num_keys) {
      copy_box(ring.tile() + target_, map, ring.full(), 64 * slice_, source.slot, portion_.kv_head,
               source.page);
    }
    ring.advance();
  }

  const EvenParams& params_;
  const AttentionUnit* units_;
  const Portion& portion_;
  int first_box_;
  int box_;
  int slice_;
  int key_;
  uint32_t target_;
  int batch_;
  Entry here_;
  Entry ahead_;
};

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
      int32_t* arrival = params_.arrivals + kWarpgroups * processor + index_;
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
        out[n * kRowThreads] =
            make_float4(state_.out[n][0], state_.out[n][1], state_.out[n][2], state_.out[n][3]);
      }
      out[kHeadDim / 8 * kRowThreads] =
          make_float4(state_.most[0], state_.most[1], state_.sum[0], state_.sum[1]);
    }
    sync();  // with which the release below counts for all threads
    if (threadIdx.x % 128 == 0) {
      asm volatile(
          "st.release.gpu.global.b32 [%0], %1;\n" ::"l"(params_.arrivals + kWarpgroups * blockIdx.x + index_),
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
    constexpr int kSize = (kHeadDim / 8 + 1) * kRowThreads;
    return reinterpret_cast<float4*>(params_.partial_out) + static_cast<int64_t>(processor) * kSize +
           threadIdx.x;
  }

  __device__ __forceinline__ void add(int processor) {
    const float4* other = partial(processor);
    const float4 theirs = __ldcg(other + kHeadDim / 8 * kRowThreads);
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
      const float4 out = __ldcg(other + n * kRowThreads);
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

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(Shape<kHeadDim, kWarpgroups, kUnitKeys>::kThreads, 1)
    attention_even_kernel(const __grid_constant__ EvenParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Shape<kHeadDim, kWarpgroups, kUnitKeys>;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const AttentionParams& p = params.attention;
  const uint32_t tiles = shared_address(shared_memory);
  const uint32_t barriers = tiles + S::kStages * S::kStageBytes;
  Ring<S> keys{tiles, barriers};
  Ring<S> values{tiles + S::kStages * S::kTileBytes, barriers + 16 * S::kStages};
  prefetch_units(p);
  if (threadIdx.x == 0) {
    prefetch_map(&params.k_map);
    prefetch_map(&params.v_map);
    for (int i = 0; i < 2 * S::kStages; ++i) {
      barrier_init(barriers + 16 * i, 1);
      barrier_init(barriers + 16 * i + 8, 4 * kWarpgroups);
    }
    publish_barriers();
  }
  __syncthreads();
  wait_for_predecessors();
  allow_successors();

  const Line line(p);
  if (threadIdx.x >= kRowThreads) {
    give_registers<40>();
    for_each_portion(p, line,
                     [&](const Portion& portion) { UnitLoader<S>(params, portion).run(keys, values); });
    zero_padding<T>(p, threadIdx.x % 128, 128);
  } else {
    take_registers<232>();
    for_each_portion(p, line, [&](const Portion& portion) {
      Block<T, kHeadDim, S> block(p, portion, shared_memory, keys, values);
      block.attend();
      if (portion.end < portion.tile_end) {
        block.leave();
      } else {
        block.add_earlier(line);
        block.store();
      }
    });
  }
#endif
}

template <typename T, int kHeadDim>
void launch_even(const EvenParams& params, const Launch& launch) {
  using S = Shape<kHeadDim, kWarpgroups, kUnitKeys>;
  constexpr auto kKernel = attention_even_kernel<T, kHeadDim>;
  check_cuda(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes),
             kOp);
  launch_shared<kKernel>(dim3(static_cast<unsigned>(params.attention.num_processors)), S::kThreads,
                         S::kSharedBytes, params.attention, launch, kOp, params);
}

template <typename T>
void launch_even(const EvenParams& params, const Launch& launch) {
  if (params.attention.head_dim == 64) return launch_even<T, 64>(params, launch);
  launch_even<T, 128>(params, launch);
}

}  // namespace

void attention_even(const AttentionParams& params, const Launch& launch) {
  EvenParams all;
  all.attention = params;
  all.box_keys = box_keys(params.page_size);
  all.k_map = sm90_cache_map(params, params.k_cache, params.k_page_stride, params.k_token_stride,
                             params.k_head_stride, all.box_keys);
  all.v_map = sm90_cache_map(params, params.v_cache, params.v_page_stride, params.v_token_stride,
                             params.v_head_stride, all.box_keys);
  if (params.dtype == DType::kBFloat16) return launch_even<__nv_bfloat16>(all, launch);
  launch_even<__half>(all, launch);
}

}  // namespace bbk
