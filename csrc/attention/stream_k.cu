// Attention on sm_90a, stream-K: its work is laid out in units (128 keys for up to 128 rows) that are cut
// into as many work ranges as there are SMs. Shared pages are read once for all rows of a tile, and rows with
// pages of their own follow in the same accumulators. Only a tile that crosses from one range into the next
// leaves partial results, which the CTA with the tile's last units adds to its own.
#include "attention/e4m3_feeder.cuh"
#include "attention/stream_k_block.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "varlen_attention";

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Fills the rings, run by a warpgroup of its own. Each copy moves the keys of one page and 64 elements, and
// takes its warp a while to start, so that the copies of a tile are spread over the warps, one a thread. The
// lanes look up a batch of units at once, ahead of its use: one after another they would wait for memory.
template <class S>
class UnitLoader {
 public:
  __device__ __forceinline__ UnitLoader(const Sm90Params& params, const Portion& portion)
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
    bool read_once;
  };

  struct Source {
    int num_keys;
    int page;  // of this thread's box
    int slot;
    bool read_once;
  };

  __device__ __forceinline__ Entry look_up(int batch) const {
    const int unit = batch + static_cast<int>(threadIdx.x) % 32;
    if (unit >= portion_.end) return Entry{0, 0, {0, 0}, false};
    const AttentionUnit& from = units_[unit];
    return Entry{from.num_keys,
                 from.first_slot,
                 {from.pages[first_box_], from.pages[first_box_ + 4]},
                 from.read_once != 0};
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
    source.read_once = __shfl_sync(0xffffffffu, here_.read_once, lane);
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
      const uint32_t target = ring.tile() + target_;
      const int from[4] = {64 * slice_, source.slot, portion_.kv_head, source.page};
      if (source.read_once) {
        copy_box(target, map, from, ring.full(), evict_first_policy());
      } else {
        copy_box(target, map, from, ring.full());
      }
    }
    ring.advance();
  }

  const Sm90Params& params_;
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

// The units of a work range, for caches in e4m3.
template <int kHeadDim, class S>
class UnitWalk {
  using Place = FeederPlace<kHeadDim, S>;

 public:
  __device__ __forceinline__ UnitWalk(const Sm90Params& params, WorkRange& range, const Portion& first)
      : params_(params),
        units_(units_of(params.attention)),
        range_(range),
        portion_(first),
        unit_(first.begin) {}

  __device__ __forceinline__ FeederTile<Place::kPasses> fetch() {
    FeederTile<Place::kPasses> tile = {};
    if (unit_ == portion_.end && !portion_.is_empty()) {
      portion_ = range_.take();
      unit_ = portion_.begin;
    }
    if (portion_.is_empty()) return tile;
    const AttentionUnit& from = units_[unit_++];
    tile.num_keys = from.num_keys;
    tile.first_slot = from.first_slot;
    tile.kv_head = portion_.kv_head;
    const int box_shift = 31 - __clz(params_.box_keys);  // a power of two
#pragma unroll
    for (int i = 0; i < Place::kPasses; ++i) {
      tile.pages[i] = from.pages[(keys_.key + i * Place::kPassKeys) >> box_shift];
    }
    return tile;
  }

 private:
  const Sm90Params& params_;
  const AttentionUnit* units_;
  WorkRange& range_;
  Portion portion_;
  int unit_;
  const Place keys_;
};

#endif

template <typename T, int kHeadDim, bool kE4m3>
__global__ void __launch_bounds__(Shape<kHeadDim, kStreamKWarpgroups, kUnitKeys, kE4m3>::kThreads, 1)
    attention_stream_k_kernel(const __grid_constant__ Sm90Params params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Shape<kHeadDim, kStreamKWarpgroups, kUnitKeys, kE4m3>;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const AttentionParams& p = params.attention;
  const uint32_t tiles = shared_address(shared_memory);
  const uint32_t raw = tiles + S::kStages * S::kStageBytes;
  const uint32_t barriers = raw + S::kRawBytes;
  Ring<S> keys{tiles, barriers};
  Ring<S> values{tiles + S::kStages * S::kTileBytes, barriers + 16 * S::kStages};
  prefetch_units(p);
  if (threadIdx.x == 0) {
    if constexpr (!kE4m3) {
      prefetch_map(&params.k_map);
      prefetch_map(&params.v_map);
    }
    for (int i = 0; i < 2 * S::kStages; ++i) {
      barrier_init(barriers + 16 * i, S::kArrivals);
      barrier_init(barriers + 16 * i + 8, 4 * kStreamKWarpgroups);
    }
    publish_barriers();
  }
  __syncthreads();

  // The plan may be read before the wait: its kernel lets none behind it start early, so that it has ended
  // once anything behind it runs.
  WorkRange range(p);
  Portion portion = range.take();
  if (threadIdx.x >= kStreamKThreads) {
    give_registers<40>();
    if constexpr (kE4m3) {
      using Walk = UnitWalk<kHeadDim, S>;
      Walk walk(params, range, portion);
      Feeder<kHeadDim, S, Walk> feeder(p, walk, raw);
      wait_for_predecessors();
      feeder.run(keys, values);
    } else {
      while (!portion.is_empty()) {
        UnitLoader<S> loader(params, portion);
        wait_for_predecessors();
        loader.run(keys, values);
        portion = range.take();
      }
      wait_for_predecessors();
    }
    zero_padding<T>(p, threadIdx.x % 128, 128);
  } else {
    take_registers<232>();
    wait_for_predecessors();
    allow_successors();
    Block<T, kHeadDim, kE4m3, S> block(p, shared_memory, keys, values);
    block.load_rows(portion);
    while (!portion.is_empty()) {
      block.attend(portion);
      const Portion next = range.take();
      if (portion.end < portion.tile_end) {
        block.leave(next);
      } else {
        block.add_earlier(portion, range.first_cta());
        block.store();
        block.load_rows(next);
      }
      portion = next;
    }
  }
#endif
}

template <typename T, int kHeadDim, bool kE4m3>
void launch_stream_k(const Sm90Params& params, const Launch& launch) {
  using S = Shape<kHeadDim, kStreamKWarpgroups, kUnitKeys, kE4m3>;
  constexpr auto kKernel = attention_stream_k_kernel<T, kHeadDim, kE4m3>;
  const dim3 grid(static_cast<unsigned>(params.attention.num_processors));
  launch_kernel<kKernel>(kOp, launch, {grid, S::kThreads, S::kSharedBytes, params.attention.programmatic},
                         params);
}

template <typename T, int kHeadDim>
void launch_stream_k(const Sm90Params& params, const Launch& launch) {
  if (params.attention.k_scale != nullptr) return launch_stream_k<T, kHeadDim, true>(params, launch);
  launch_stream_k<T, kHeadDim, false>(params, launch);
}

template <typename T>
void launch_stream_k(const Sm90Params& params, const Launch& launch) {
  if (params.attention.head_dim == 64) return launch_stream_k<T, 64>(params, launch);
  launch_stream_k<T, 128>(params, launch);
}

}  // namespace

void attention_stream_k(const AttentionParams& params, const Launch& launch) {
  const Sm90Params all = sm90_params(params);
  if (params.dtype == DType::kBFloat16) return launch_stream_k<__nv_bfloat16>(all, launch);
  launch_stream_k<__half>(all, launch);
}

}  // namespace bbk
