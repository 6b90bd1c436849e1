// Attention on sm_90a, for bf16 and fp16 with a head_dim of 64 or 128 and pages of a multiple of 8 keys. The
// copy engine fills a ring of stages of K and V, page by page; each warpgroup multiplies 64 rows by wgmma
// straight from the ring. Softmax is online, in fp32 and base 2.
#include <cudaTypedefs.h>

#include <initializer_list>

#include "attention_tile.cuh"
#include "attention_wgmma.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "varlen_attention";
constexpr int kStageKeys = 64;
constexpr int kSliceBytes = kStageKeys * kSwizzledRowBytes;  // 64 elements of all keys of a stage

template <int kHeadDim, int kWarpgroups>
struct Shape {
  static constexpr int kRows = 64 * kWarpgroups;
  static constexpr int kThreads = 128 * kWarpgroups;
  static constexpr int kSlices = kHeadDim / 64;
  static constexpr int kTileBytes = kSlices * kSliceBytes;  // K or V of a stage
  static constexpr int kStageBytes = 2 * kTileBytes;
  // One warpgroup: two CTAs share a processor, so that one's softmax runs under the other's products.
  static constexpr int kResident = kWarpgroups == 1 ? 2 : 1;
  static constexpr int kStages = 6 / kResident * (128 / kHeadDim);
  static constexpr int kSharedBytes = kStages * (kStageBytes + 16);
};

struct Sm90Params {
  CUtensorMap k_map;  // dimensions: head_dim, key in its page, kv head, page
  CUtensorMap v_map;
  AttentionParams attention;
  int box_keys;  // keys that one copy moves
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A place in the ring of stages. A stage is `full` once its bytes have arrived and `empty` once every warp of
// products is through with it.
template <class S>
struct Ring {
  uint32_t shared;
  int stage = 0;
  int phase = 0;

  __device__ __forceinline__ uint32_t keys() const { return shared + stage * S::kStageBytes; }
  __device__ __forceinline__ uint32_t values() const { return keys() + S::kTileBytes; }
  __device__ __forceinline__ uint32_t full() const {
    return shared + S::kStages * S::kStageBytes + 16 * stage;
  }
  __device__ __forceinline__ uint32_t empty() const { return full() + 8; }
  __device__ __forceinline__ void advance() {
    if (++stage == S::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Starts the copy of the stage of keys from first_key on, once its place is free. Run by one warp: each lane
// copies boxes of its own.
template <class S>
__device__ __forceinline__ void load_stage(const Sm90Params& params, const AttentionItem& item, int first_key,
                                           Ring<S>& ring) {
  if (first_key >= item.key_end) return;
  const AttentionParams& p = params.attention;
  const int lane = threadIdx.x % 32;
  const int32_t* pages = p.page_table + item.row * p.page_table_stride;
  const int box_bytes = params.box_keys * kSwizzledRowBytes;
  const int num_boxes = (min(kStageKeys, item.key_end - first_key) + params.box_keys - 1) / params.box_keys;
  const int num_copies = num_boxes * S::kSlices * 2;
  for (int copy = lane; copy < num_copies || copy == lane; copy += 32) {
    const int box = copy / (2 * S::kSlices), slice = copy / 2 % S::kSlices;
    const int key = first_key + box * params.box_keys;
    const int page = copy < num_copies ? pages[key / p.page_size] : 0;  // looked up before the wait
    if (copy == lane) {
      barrier_wait(ring.empty(), ring.phase ^ 1);
      if (lane == 0) barrier_arrive_expecting(ring.full(), num_copies * box_bytes);
      __syncwarp();
    }
    if (copy >= num_copies) break;
    const uint32_t target = (copy % 2 ? ring.values() : ring.keys()) + slice * kSliceBytes + box * box_bytes;
    copy_box(target, copy % 2 ? &params.v_map : &params.k_map, ring.full(), 64 * slice, key % p.page_size,
             item.kv_head, page);
  }
  __syncwarp();
  ring.advance();
}

// Values behind the last key get the weight 0, but NaN there would survive it.
template <class S>
__device__ __forceinline__ void clear_values(unsigned char* shared_memory, const Ring<S>& ring,
                                             int num_keys) {
  const int thread = threadIdx.x % 128;
  unsigned char* values = shared_memory + (ring.values() - ring.shared);
  for (int chunk = num_keys * 8 + thread; chunk < kStageKeys * 8; chunk += 128) {
#pragma unroll
    for (int slice = 0; slice < S::kSlices; ++slice) {
      *reinterpret_cast<uint4*>(values + slice * kSliceBytes + 16 * chunk) = make_uint4(0, 0, 0, 0);
    }
  }
  publish_stores();
  if (threadIdx.x < 128) {
    asm volatile("bar.sync 1, 128;\n" ::: "memory");
  } else {
    asm volatile("bar.sync 2, 128;\n" ::: "memory");
  }
}

// Works through an item, 64 rows a warpgroup. The first warp also keeps the ring filled, up to `loaded`.
template <typename T, int kHeadDim, class S>
__device__ __forceinline__ void attend(const Sm90Params& all, const AttentionItem& item,
                                       unsigned char* shared_memory, Ring<S>& ring, Ring<S>& loaded) {
  // Stages that are loaded ahead. The place of the next is free once all are through with the stage before,
  // or, so that a warpgroup does not wait for the other, with the one before that.
  constexpr int kAhead = S::kStages - S::kRows / 64;
  const AttentionParams& params = all.attention;
  const bool loads = threadIdx.x < 32;
  if (loads) {
    for (int stage = 0; stage < kAhead; ++stage) {
      load_stage(all, item, item.key_start + stage * kStageKeys, loaded);
    }
  }
  const int row0 = static_cast<int>(threadIdx.x) / 32 * 16;
  const bool has_rows = row0 < item.num_rows;  // of this warp
  const float scale = params.softmax_scale * kLog2e;
  QueryRows<T, kHeadDim> rows;
  rows.load(params, item, row0);
  RowState<T, kHeadDim> state;
  state.clear();

  for (int first_key = item.key_start; first_key < item.key_end; first_key += kStageKeys) {
    barrier_wait(ring.full(), ring.phase);
    float score[kStageKeys / 8][4];
    start_products();
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const uint32_t keys = ring.keys() + k / 4 * kSliceBytes + k % 4 * 32;
      multiply_warpgroup<T, false>(score, rows.values[k], matrix_descriptor(keys, 16), k > 0);
    }
    commit_products();
    if (loads) load_stage(all, item, first_key + kAhead * kStageKeys, loaded);
    const bool last = first_key + kStageKeys > item.key_end;
    if (last) clear_values(shared_memory, ring, item.key_end - first_key);
    wait_for_products<0>();
    keep_in_registers(score);

    uint32_t weights[kStageKeys / 16][4];
    if (has_rows) {
      if (last) mask_scores(score, first_key, item.key_end);
      float correction[2];
      state.weigh(score, scale, correction);
      pack_weights<T>(score, weights);
      state.shrink(correction);
    }
    keep_in_registers(state.out);
    start_products();
#pragma unroll
    for (int k = 0; k < kStageKeys / 16; ++k) {
      const uint32_t values = ring.values() + k * 16 * kSwizzledRowBytes;
      multiply_warpgroup<T, true>(state.out, weights[k], matrix_descriptor(values, kSliceBytes), true);
    }
    commit_products();
    wait_for_products<0>();
    keep_in_registers(state.out);
    if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty());
    ring.advance();
  }
  state.finish();
  state.store(params, item, rows, scale);
}

#endif

template <typename T, int kHeadDim, int kWarpgroups>
__global__ void __launch_bounds__(Shape<kHeadDim, kWarpgroups>::kThreads,
                                  Shape<kHeadDim, kWarpgroups>::kResident)
    attention_sm90_kernel(const __grid_constant__ Sm90Params params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using S = Shape<kHeadDim, kWarpgroups>;
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const AttentionParams& p = params.attention;
  Ring<S> ring{shared_address(shared_memory)};
  Ring<S> loaded = ring;
  prefetch_plan(p);
  if (threadIdx.x == 0) {
    prefetch_map(&params.k_map);
    prefetch_map(&params.v_map);
    for (Ring<S> place = ring; place.phase == 0; place.advance()) {
      barrier_init(place.full(), 1);
      barrier_init(place.empty(), 4 * kWarpgroups);
    }
    publish_barriers();
  }
  __syncthreads();
  wait_for_predecessors();
  allow_successors();

  const int num_items = p.counts[0] * parts_of_tile(p, S::kRows) * p.num_kv_heads;
  for (int round = 0; round * static_cast<int>(gridDim.x) < num_items; ++round) {
    const int index = item_of_round(round, num_items);
    if (index < 0) continue;
    const AttentionItem item = read_item(p, index, S::kRows);
    if (item.num_rows == 0) continue;
    attend<T, kHeadDim>(params, item, shared_memory, ring, loaded);
  }
  zero_padding<T>(p, threadIdx.x, blockDim.x);
#endif
}

template <typename T, int kHeadDim, int kWarpgroups>
void launch_sm90(const Sm90Params& params, const Launch& launch) {
  using S = Shape<kHeadDim, kWarpgroups>;
  launch_persistent<attention_sm90_kernel<T, kHeadDim, kWarpgroups>>(S::kThreads, S::kSharedBytes, S::kRows,
                                                                     params.attention, launch, kOp, params);
}

template <typename T, int kHeadDim>
void launch_sm90(const Sm90Params& params, const Launch& launch) {
  if (parts_of_tile(params.attention, 64) > 1) return launch_sm90<T, kHeadDim, 2>(params, launch);
  launch_sm90<T, kHeadDim, 1>(params, launch);
}

template <typename T>
void launch_sm90(const Sm90Params& params, const Launch& launch) {
  if (params.attention.head_dim == 64) return launch_sm90<T, 64>(params, launch);
  launch_sm90<T, 128>(params, launch);
}

// The driver's function that describes a tensor to the copy engine. Linking it would need libcuda at load
// time, which a machine without a GPU does not have.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault,
                                                &found),
               kOp);
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(
          "blockbatch_kernels.varlen_attention: the driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(pointer);
  }();
  return function;
}

CUtensorMap cache_map(const AttentionParams& params, const void* cache, int64_t page_stride,
                      int64_t token_stride, int64_t head_stride, int box_keys) {
  const cuuint64_t sizes[] = {
      static_cast<cuuint64_t>(params.head_dim), static_cast<cuuint64_t>(params.page_size),
      static_cast<cuuint64_t>(params.num_kv_heads), static_cast<cuuint64_t>(params.num_pages)};
  const cuuint64_t bytes[] = {static_cast<cuuint64_t>(2 * token_stride),
                              static_cast<cuuint64_t>(2 * head_stride),
                              static_cast<cuuint64_t>(2 * page_stride)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_keys), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const auto type =
      params.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMap map;
  const CUresult status = tensor_map_encoder()(
      &map, type, 4, const_cast<void*>(cache), sizes, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("blockbatch_kernels.varlen_attention: cuTensorMapEncodeTiled returned error " +
                             std::to_string(status));
  }
  return map;
}

// The largest power of two that divides a page and is no more than a stage.
int box_keys(int page_size) {
  int keys = 1;
  while (keys < kStageKeys && page_size % (2 * keys) == 0) keys *= 2;
  return keys;
}

// Code for another architecture than sm_90a leaves the kernel empty: it needs hardly a register.
bool has_machine_code() {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, attention_sm90_kernel<__half, 64, 1>), kOp);
  return attributes.numRegs > 32;
}

}  // namespace

bool attention_sm90_serves(const AttentionParams& params, const Launch& launch) {
  // A cache with one page, head or token has any stride there, and a repeated one has none.
  for (const int64_t stride : {params.k_page_stride, params.k_token_stride, params.k_head_stride,
                               params.v_page_stride, params.v_token_stride, params.v_head_stride}) {
    if (stride <= 0) return false;
  }
  if (params.page_size % 8 != 0 || !attention_mma_serves(params)) return false;
  int major = 0;
  int minor = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, launch.device), kOp);
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, launch.device), kOp);
  return major == 9 && minor == 0 && has_machine_code();
}

void attention_sm90(const AttentionParams& params, const Launch& launch) {
  Sm90Params all;
  all.attention = params;
  all.box_keys = box_keys(params.page_size);
  all.k_map = cache_map(params, params.k_cache, params.k_page_stride, params.k_token_stride,
                        params.k_head_stride, all.box_keys);
  all.v_map = cache_map(params, params.v_cache, params.v_page_stride, params.v_token_stride,
                        params.v_head_stride, all.box_keys);
  if (params.dtype == DType::kBFloat16) return launch_sm90<__nv_bfloat16>(all, launch);
  launch_sm90<__half>(all, launch);
}

}  // namespace bbk
