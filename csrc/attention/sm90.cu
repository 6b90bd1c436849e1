// Attention on sm_90a, for bf16 and fp16 with a head_dim of 64 or 128 and pages of a multiple of 8 keys. The
// copy engine fills a ring of stages of K and V, page by page; each warpgroup multiplies 64 rows by wgmma
// straight from the ring. Softmax is online, in fp32 and base 2.
#include <initializer_list>

#include "attention/e4m3_feeder.cuh"
#include "attention/sm90.cuh"
#include "common/capability.h"
#include "common/tensor_map.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "varlen_attention";

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Fills the rings, run by a warpgroup of its own. Each copy moves the keys of one page and 64 elements, and
// takes its warp a while to start, so that the copies of a tile are spread over the warps, one a thread.
template <class S>
class Loader {
 public:
  __device__ __forceinline__ Loader(const Sm90Params& params, const WorkTile& work)
      : params_(params), work_(work), first_key_(work.key_start) {
    const int copy = static_cast<int>(threadIdx.x) % 32 * 4 + static_cast<int>(threadIdx.x) / 32 % 4;
    const int box = copy / S::kSlices;
    slice_ = copy % S::kSlices;
    key_ = box * params.box_keys;
    target_ = slice_ * S::kSliceBytes + key_ * kSwizzledRowBytes;
    pages_ = params.attention.page_table + work.row * params.attention.page_table_stride;
    now_ = look_up(first_key_);
    next_ = look_up(first_key_ + kStageKeys);
  }

  // Every tile of keys ahead of the values before it, which are used later.
  __device__ __forceinline__ void run(Ring<S>& keys, Ring<S>& values) {
    copy(&params_.k_map, first_key_, now_, keys);
    while (first_key_ < work_.key_end) {
      copy(&params_.k_map, first_key_ + kStageKeys, next_, keys);
      copy(&params_.v_map, first_key_, now_, values);
      first_key_ += kStageKeys;
      now_ = next_;
      next_ = look_up(first_key_ + kStageKeys);  // early, so that no copy waits for its page
    }
  }

 private:
  __device__ __forceinline__ bool takes_part(int first_key) const {
    return key_ < kStageKeys && first_key + key_ < work_.key_end;
  }

  // Page of this thread's box in a tile, and the key in it.
  __device__ __forceinline__ int2 look_up(int first_key) const {
    if (!takes_part(first_key)) return make_int2(0, 0);
    const int key = first_key + key_, page_size = params_.attention.page_size;
    return make_int2(pages_[key / page_size], key % page_size);
  }

  __device__ __forceinline__ void copy(const CUtensorMap* map, int first_key, int2 source,
                                       Ring<S>& ring) const {
    if (first_key >= work_.key_end) return;
    barrier_wait(ring.empty(), ring.phase ^ 1);
    if (threadIdx.x % 128 == 0) {
      const int num_keys = min(kStageKeys, work_.key_end - first_key);
      const int num_boxes = (num_keys + params_.box_keys - 1) / params_.box_keys;
      barrier_arrive_expecting(ring.full(), num_boxes * params_.box_keys * kSwizzledRowBytes * S::kSlices);
    }
    if (takes_part(first_key)) {
      copy_box(ring.tile() + target_, map, {64 * slice_, source.y, work_.kv_head, source.x}, ring.full());
    }
    ring.advance();
  }

  const Sm90Params& params_;
  const WorkTile& work_;
  const int32_t* pages_;
  int first_key_;
  int slice_;
  int key_;
  uint32_t target_;
  int2 now_;
  int2 next_;
};

// The tiles of keys of the work at one place, for caches in e4m3.
template <int kHeadDim, class S>
class TileWalk {
  using Place = FeederPlace<kHeadDim, S>;

 public:
  __device__ __forceinline__ TileWalk(const AttentionParams& params, int num_work_tiles, int place,
                                      int num_places)
      : params_(params), num_work_tiles_(num_work_tiles), place_(place), num_places_(num_places) {}

  __device__ __forceinline__ FeederTile<Place::kPasses> fetch() {
    FeederTile<Place::kPasses> tile = {};
    if (first_key_ >= work_.key_end && !advance()) return tile;
    tile.num_keys = min(kStageKeys, work_.key_end - first_key_);
    tile.first_slot = first_key_;
    tile.kv_head = work_.kv_head;
    const int32_t* pages = params_.page_table + work_.row * params_.page_table_stride;
    const int page_shift = 31 - __clz(params_.page_size);
#pragma unroll
    for (int i = 0; i < Place::kPasses; ++i) {
      const int key = keys_.key + i * Place::kPassKeys;
      if (key < tile.num_keys) tile.pages[i] = pages[(first_key_ + key) >> page_shift];
    }
    first_key_ += kStageKeys;
    return tile;
  }

 private:
  __device__ __forceinline__ bool advance() {
    while (round_ * num_places_ < num_work_tiles_) {
      const int index = work_tile_of_round(round_++, num_work_tiles_, place_, num_places_);
      if (index < 0) continue;
      work_ = read_work_tile(params_, index, S::kRows);
      first_key_ = work_.key_start;
      if (work_.num_rows > 0) return true;
    }
    work_.key_end = first_key_ = 0;
    return false;
  }

  const AttentionParams& params_;
  const int num_work_tiles_;
  const int place_;
  const int num_places_;
  const Place keys_;
  WorkTile work_ = {};
  int round_ = 0;
  int first_key_ = 0;
};

// Works through a work tile, 64 rows a warpgroup. The products of the next keys run under the softmax of
// these.
template <typename T, int kHeadDim, bool kE4m3, class S>
__device__ __forceinline__ void attend(const AttentionParams& params, const WorkTile& work,
                                       unsigned char* shared_memory, Ring<S>& keys, Ring<S>& values) {
  const int row0 = static_cast<int>(threadIdx.x) % S::kHalfThreads / 32 * 16;
  const bool has_rows = row0 < work.num_rows;  // of this warp
  float scale = params.softmax_scale * kLog2e;
  if constexpr (kE4m3) scale *= params.k_scale[work.kv_head];
  using C = Computed<T, kE4m3>;
  QueryRows<C, kHeadDim, T> rows;
  rows.load(params, work, row0);
  RowState<C, kHeadDim, T> state;
  state.clear();
  float score[kStageKeys / 8][4];
  float correction[2];
  uint32_t weights[kStageKeys / 16][4];

  barrier_wait(keys.full(), keys.phase);
  start_scores<S>(score, rows, keys.tile());
  wgmma_wait<0>();
  keep_in_registers(flat(score));
  release(keys);
  int first_key = work.key_start;
  if (has_rows) {
    if (first_key + kStageKeys > work.key_end) mask_scores(score, first_key, work.key_end);
    state.weigh(score, scale, correction);
    pack_weights<C>(score, weights);
  }
  for (; first_key + kStageKeys < work.key_end; first_key += kStageKeys) {
    barrier_wait(keys.full(), keys.phase);
    start_scores<S>(score, rows, keys.tile());
    barrier_wait(values.full(), values.phase);
    start_weighing<S>(state, weights, values.tile());
    wgmma_wait<1>();
    keep_in_registers(flat(score));
    release(keys);
    const int next_key = first_key + kStageKeys;
    if (has_rows) {
      if (next_key + kStageKeys > work.key_end) mask_scores(score, next_key, work.key_end);
      state.weigh(score, scale, correction);
    }
    wgmma_wait<0>();
    keep_in_registers(flat(state.out));
    release(values);
    if (has_rows) {
      pack_weights<C>(score, weights);
      state.shrink(correction);
    }
  }
  barrier_wait(values.full(), values.phase);
  if (first_key + kStageKeys > work.key_end) {
    clear_values<S>(shared_memory + (values.tile() - shared_address(shared_memory)),
                    work.key_end - first_key);
  }
  start_weighing<S>(state, weights, values.tile());
  wgmma_wait<0>();
  keep_in_registers(flat(state.out));
  release(values);
  state.finish();
  if constexpr (kE4m3) {
    const float by[2] = {params.v_scale[work.kv_head], params.v_scale[work.kv_head]};
    state.shrink(by);
  }
  state.store(params, work, rows, scale);
}

#endif

template <typename T, int kHeadDim, int kWarpgroups, bool kE4m3>
__global__ void __launch_bounds__(Shape<kHeadDim, kWarpgroups, kStageKeys, kE4m3>::kThreads, 1)
    attention_sm90_kernel(const __grid_constant__ Sm90Params params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Shape<kHeadDim, kWarpgroups, kStageKeys, kE4m3>;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const AttentionParams& p = params.attention;
  const uint32_t shared = shared_address(shared_memory);
  const int half = static_cast<int>(threadIdx.x) / S::kHalfThreads;
  const int thread = static_cast<int>(threadIdx.x) % S::kHalfThreads;
  const uint32_t tiles = shared + half * S::kStages * S::kStageBytes;
  const uint32_t raw = shared + S::kHalves * S::kStages * S::kStageBytes;
  const uint32_t all_barriers = raw + S::kHalves * S::kRawBytes;
  const uint32_t barriers = all_barriers + half * S::kStages * 32;
  Ring<S> keys{tiles, barriers};
  Ring<S> values{tiles + S::kStages * S::kTileBytes, barriers + 16 * S::kStages};
  prefetch_plan(p);
  if (threadIdx.x == 0) {
    if constexpr (!kE4m3) {
      prefetch_map(&params.k_map);
      prefetch_map(&params.v_map);
    }
    for (int i = 0; i < 2 * S::kStages * S::kHalves; ++i) {
      barrier_init(all_barriers + 16 * i, S::kArrivals);
      barrier_init(all_barriers + 16 * i + 8, 4 * kWarpgroups);
    }
    publish_barriers();
  }
  __syncthreads();
  wait_for_predecessors();
  allow_successors();

  const int num_work_tiles = p.counts[0] * parts_of_tile(p, S::kRows) * p.num_kv_heads;
  const auto for_each_work_tile = [&](auto use) {
    const int num_places = S::kHalves * gridDim.x;
    for (int round = 0; round * num_places < num_work_tiles; ++round) {
      const int index = work_tile_of_round(round, num_work_tiles, half * gridDim.x + blockIdx.x, num_places);
      if (index < 0) continue;
      const WorkTile work = read_work_tile(p, index, S::kRows);
      if (work.num_rows > 0) use(work);
    }
  };
  // Registers a thread: copies need few, and give theirs to the products. In all no more than at the launch,
  // which are 128 or 168 a thread.
  constexpr int kLoaderRegisters = kE4m3 ? (kWarpgroups == 1 ? 80 : 88) : kWarpgroups == 1 ? 48 : 56;
  constexpr int kProductRegisters = kE4m3 ? (kWarpgroups == 1 ? 176 : 208) : kWarpgroups == 1 ? 208 : 224;
  if (thread >= 128 * kWarpgroups) {
    give_registers<kLoaderRegisters>();
    if constexpr (kE4m3) {
      using Walk = TileWalk<kHeadDim, S>;
      Walk walk(p, num_work_tiles, half * gridDim.x + blockIdx.x, S::kHalves * gridDim.x);
      Feeder<kHeadDim, S, Walk>(p, walk, raw + half * S::kRawBytes).run(keys, values);
    } else {
      for_each_work_tile([&](const WorkTile& work) { Loader<S>(params, work).run(keys, values); });
    }
    zero_padding<T>(p, half * 128 + thread % 128, S::kHalves * 128);
  } else {
    take_registers<kProductRegisters>();
    for_each_work_tile(
        [&](const WorkTile& work) { attend<T, kHeadDim, kE4m3>(p, work, shared_memory, keys, values); });
  }
#endif
}

template <typename T, int kHeadDim, int kWarpgroups, bool kE4m3>
void launch_sm90(const Sm90Params& params, const Launch& launch) {
  using S = Shape<kHeadDim, kWarpgroups, kStageKeys, kE4m3>;
  constexpr auto kKernel = attention_sm90_kernel<T, kHeadDim, kWarpgroups, kE4m3>;
  const dim3 grid =
      persistent_grid<kKernel>(kOp, launch, params.attention, S::kThreads, S::kSharedBytes, S::kRows);
  launch_kernel<kKernel>(kOp, launch, {grid, S::kThreads, S::kSharedBytes, params.attention.programmatic},
                         params);
}

template <typename T, int kHeadDim, bool kE4m3>
void launch_sm90(const Sm90Params& params, const Launch& launch) {
  if (parts_of_tile(params.attention, 64) > 1) return launch_sm90<T, kHeadDim, 2, kE4m3>(params, launch);
  launch_sm90<T, kHeadDim, 1, kE4m3>(params, launch);
}

template <typename T, int kHeadDim>
void launch_sm90(const Sm90Params& params, const Launch& launch) {
  if (params.attention.k_scale != nullptr) return launch_sm90<T, kHeadDim, true>(params, launch);
  launch_sm90<T, kHeadDim, false>(params, launch);
}

template <typename T>
void launch_sm90(const Sm90Params& params, const Launch& launch) {
  if (params.attention.head_dim == 64) return launch_sm90<T, 64>(params, launch);
  launch_sm90<T, 128>(params, launch);
}

}  // namespace

Sm90Params sm90_params(const AttentionParams& params) {
  const int keys = box_keys(params.page_size);
  if (params.k_scale != nullptr) return Sm90Params{{}, {}, params, keys};
  const auto cache_map = [&](const void* cache, int64_t page_stride, int64_t token_stride,
                             int64_t head_stride) {
    return tensor_map<4>(kOp, "cache", cache, params.dtype,
                         {params.head_dim, params.page_size, params.num_kv_heads, params.num_pages},
                         {token_stride, head_stride, page_stride}, {kSwizzledRowBytes / 2, keys, 1, 1},
                         CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
  };
  return Sm90Params{
      cache_map(params.k_cache, params.k_page_stride, params.k_token_stride, params.k_head_stride),
      cache_map(params.v_cache, params.v_page_stride, params.v_token_stride, params.v_head_stride), params,
      keys};
}

// Whether the products take the sizes, and a cache in e4m3 can be copied 16 bytes at a time, values from the
// same places as keys, at addresses that take no division and no product of 64 bits.
bool e4m3_fits(const AttentionParams& params) {
  const auto whole = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const auto short_enough = [](int64_t stride, int count) { return stride < (int64_t{1} << 32) / count; };
  if ((params.page_size & (params.page_size - 1)) != 0 || !short_enough(params.k_page_stride, 1) ||
      !short_enough(params.k_token_stride, params.page_size)) {
    return false;
  }
  return params.dtype != DType::kFloat32 && (params.head_dim == 64 || params.head_dim == 128) &&
         reinterpret_cast<uintptr_t>(params.q) % 4 == 0 && params.q_token_stride % 2 == 0 &&
         params.q_head_stride % 2 == 0 && whole(params.k_cache) && whole(params.v_cache) &&
         params.k_page_stride % 16 == 0 && params.k_token_stride % 16 == 0 &&
         params.k_head_stride % 16 == 0 && params.k_page_stride == params.v_page_stride &&
         params.k_token_stride == params.v_token_stride && params.k_head_stride == params.v_head_stride;
}

bool attention_sm90_serves(const AttentionParams& params, const Launch& launch) {
  // A cache with one page, head or token has any stride there, and a repeated one has none.
  for (const int64_t stride : {params.k_page_stride, params.k_token_stride, params.k_head_stride,
                               params.v_page_stride, params.v_token_stride, params.v_head_stride}) {
    if (stride <= 0) return false;
  }
  const bool fits = params.k_scale == nullptr ? attention_mma_serves(params) : e4m3_fits(params);
  return params.page_size % 8 == 0 && fits && has_code_for(launch.device) == Code::kSm90a;
}

void attention_sm90(const AttentionParams& params, const Launch& launch) {
  const Sm90Params all = sm90_params(params);
  if (params.dtype == DType::kBFloat16) return launch_sm90<__nv_bfloat16>(all, launch);
  launch_sm90<__half>(all, launch);
}

}  // namespace bbk
