// Attention on the tensor cores (mma.sync), for bf16 and fp16 with a head_dim of 64 or 128. K and V pass
// through a ring of stages in shared memory, filled by cp.async with a page lookup per key, so that the
// memory bus stays busy while the products run. Softmax is online, in fp32 and base 2.
//
// A warp holds 16 rows of the work tile. One with fewer rows than the CTA has room for splits the keys of
// every stage over the warps that are left, which shortens the chain of products per stage; their results are
// joined at the end, in a fixed order.
#include <initializer_list>
#include <type_traits>

#include "attention/tile.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "varlen_attention";

// 16 bytes to shared memory, zeros if not `valid`.
__device__ __forceinline__ void copy_async(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(target), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l names the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// c[16, 8] += a[16, 16] b[16, 8]
template <typename T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

template <typename T, int kHeadDim, int kWarps>
struct Shape {
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kStages = 3;
  static constexpr int kRowBytes = 2 * kHeadDim;
  static constexpr int kTileBytes = kStageKeys * kRowBytes;  // K or V of a stage
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // Eight threads copy 128 bytes of a key at a time.
  static constexpr int kPassKeys = kThreads / 8;
  static constexpr int kPasses = kStageKeys / kPassKeys;
};

// Copies stages of a work tile's K and V to shared memory. The 16-byte chunks of a key are stored at places
// permuted by the key, so that ldmatrix reads eight keys of one chunk without bank conflicts.
template <typename T, int kHeadDim, int kWarps>
class KeyLoader {
  using S = Shape<T, kHeadDim, kWarps>;

 public:
  __device__ __forceinline__ KeyLoader(const AttentionParams& params, const WorkTile& work, uint32_t shared)
      : params_(params), end_(work.key_end), key_(work.key_start + threadIdx.x / 8), shared_(shared) {
    table_ = params.page_table + work.row * params.page_table_stride;
    const int lane = threadIdx.x % 8;
    k_ = static_cast<const T*>(params.k_cache) + work.kv_head * params.k_head_stride + 8 * lane;
    v_ = static_cast<const T*>(params.v_cache) + work.kv_head * params.v_head_stride + 8 * lane;
    const int key = threadIdx.x / 8;
    place_ = key * S::kRowBytes + ((lane ^ (key & 7)) << 4);
    look_up();
  }

  // Starts the copy of the next stage into the ring's place `stage`; nothing behind the last key.
  __device__ __forceinline__ void load(int stage) {
    if (key_ - static_cast<int>(threadIdx.x / 8) < end_) {
      const uint32_t target = shared_ + stage * S::kStageBytes + place_;
#pragma unroll
      for (int pass = 0; pass < S::kPasses; ++pass) {
        const int key = key_ + pass * S::kPassKeys;
        const bool valid = key < end_;
        const int64_t offset = valid ? key % params_.page_size : 0;
        const int64_t page = pages_[pass];
        const T* k = k_ + page * params_.k_page_stride + offset * params_.k_token_stride;
        const T* v = v_ + page * params_.v_page_stride + offset * params_.v_token_stride;
        const uint32_t row = target + pass * S::kPassKeys * S::kRowBytes;
#pragma unroll
        for (int part = 0; part < kHeadDim / 64; ++part) {
          copy_async(row + 128 * part, k + 64 * part, valid);
          copy_async(row + 128 * part + S::kTileBytes, v + 64 * part, valid);
        }
      }
      key_ += kStageKeys;
      look_up();
    }
    commit_copies();
  }

 private:
  // Pages of the stage that is loaded next: a stage early, so that no copy waits for its address.
  __device__ __forceinline__ void look_up() {
#pragma unroll
    for (int pass = 0; pass < S::kPasses; ++pass) {
      const int key = key_ + pass * S::kPassKeys;
      pages_[pass] = table_[(key < end_ ? key : end_ - 1) / params_.page_size];
    }
  }

  const AttentionParams& params_;
  const int32_t* table_;
  const T* k_;
  const T* v_;
  int end_;
  int key_;  // of this thread's first pass in the next stage
  int place_;
  uint32_t shared_;
  int pages_[S::kPasses];
};

// kSplit warps share the 16 rows and take a part of each stage's keys.
template <typename T, int kHeadDim, int kWarps, int kSplit>
__device__ __forceinline__ void attend(const AttentionParams& params, const WorkTile& work,
                                       unsigned char* shared_memory) {
  using S = Shape<T, kHeadDim, kWarps>;
  constexpr int kRowGroups = kWarps / kSplit;
  constexpr int kKeys = kStageKeys / kSplit;
  constexpr int kScoreTiles = kKeys / 8;
  constexpr int kOutTiles = kHeadDim / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row0 = warp % kRowGroups * 16;     // of this warp
  const int key0 = warp / kRowGroups * kKeys;  // in each stage
  const bool has_rows = row0 < work.num_rows;
  const uint32_t shared = shared_address(shared_memory);

  KeyLoader<T, kHeadDim, kWarps> loader(params, work, shared);
#pragma unroll
  for (int stage = 0; stage < S::kStages - 1; ++stage) loader.load(stage);

  QueryRows<T, kHeadDim> rows;
  rows.load(params, work, row0);
  const float scale = params.softmax_scale * kLog2e;
  RowState<T, kHeadDim> state;
  state.clear();

  // Keys are the columns of the first product (lane / 16 chooses the key octet, lane / 8 % 2 the half of the
  // 16 elements) and the rows of the second (the other way round, transposed).
  const int k_row = key0 + lane % 8 + lane / 16 * 8;
  const int v_row = key0 + lane % 8 + lane / 8 % 2 * 8;
  const uint32_t k_base = shared + k_row * S::kRowBytes;
  const uint32_t v_base = shared + S::kTileBytes + v_row * S::kRowBytes;
  const uint32_t k_chunk = (lane / 8 % 2 ^ lane % 8) << 4;
  const uint32_t v_chunk = (lane / 16 ^ lane % 8) << 4;

  int stage = 0;
  for (int first_key = work.key_start; first_key < work.key_end; first_key += kStageKeys) {
    wait_for_copies<S::kStages - 2>();
    __syncthreads();  // the stage has arrived for all, and the one before is free
    loader.load(stage == 0 ? S::kStages - 1 : stage - 1);

    if (has_rows) {
      const uint32_t k_stage = k_base + stage * S::kStageBytes;
      const uint32_t v_stage = v_base + stage * S::kStageBytes;
      float score[kScoreTiles][4];
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) score[n][i] = 0.0f;
      }
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
#pragma unroll
        for (int n = 0; n < kScoreTiles; n += 2) {
          uint32_t keys[4];
          load_matrices(keys, k_stage + n * 8 * S::kRowBytes + (k_chunk ^ (k << 5)));
          multiply<T>(score[n], rows.values[k], keys[0], keys[1]);
          multiply<T>(score[n + 1], rows.values[k], keys[2], keys[3]);
        }
      }
      if (first_key + kStageKeys > work.key_end) mask_scores(score, first_key + key0, work.key_end);
      float correction[2];
      state.weigh(score, scale, correction);
      state.shrink(correction);
      uint32_t weights[kKeys / 16][4];
      pack_weights<T>(score, weights);
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
        for (int n = 0; n < kOutTiles; n += 2) {
          uint32_t values[4];
          load_matrices_transposed(values, v_stage + k * 16 * S::kRowBytes + (v_chunk ^ (n << 4)));
          multiply<T>(state.out[n], weights[k], values[0], values[1]);
          multiply<T>(state.out[n + 1], weights[k], values[2], values[3]);
        }
      }
    }
    stage = stage == S::kStages - 1 ? 0 : stage + 1;
  }
  wait_for_copies<0>();
  state.finish();

  if constexpr (kSplit > 1) {
    // The warps of one row group hold the same rows in the same lanes: each but the first hands over its
    // accumulator as it is.
    constexpr int kHanded = 4 * kOutTiles + 4;
    float* handed = reinterpret_cast<float*>(shared_memory);
    __syncthreads();  // the stages are free
    if (warp >= kRowGroups && has_rows) {
      float* mine = handed + (warp - kRowGroups) * kHanded * 32 + lane;
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) mine[(4 * n + i) * 32] = state.out[n][i];
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mine[(4 * kOutTiles + half) * 32] = state.most[half];
        mine[(4 * kOutTiles + 2 + half) * 32] = state.sum[half];
      }
    }
    __syncthreads();
    if (warp < kRowGroups && has_rows) {
#pragma unroll 1
      for (int other = 1; other < kSplit; ++other) {
        const float* theirs = handed + (warp + (other - 1) * kRowGroups) * kHanded * 32 + lane;
        float weight[2], their_weight[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // The first warp holds the first key of every stage, so its maximum is finite.
          const float their_most = theirs[(4 * kOutTiles + half) * 32];
          const float new_most = fmaxf(state.most[half], their_most);
          weight[half] = exp2_fast((state.most[half] - new_most) * scale);
          their_weight[half] = exp2_fast((their_most - new_most) * scale);
          state.most[half] = new_most;
          state.sum[half] =
              state.sum[half] * weight[half] + theirs[(4 * kOutTiles + 2 + half) * 32] * their_weight[half];
        }
#pragma unroll
        for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            state.out[n][i] =
                state.out[n][i] * weight[i / 2] + theirs[(4 * n + i) * 32] * their_weight[i / 2];
          }
        }
      }
    }
  }

  if (warp < kRowGroups) state.store(params, work, rows, scale);
  __syncthreads();  // the next work tile reuses the stages
}

template <typename T, int kHeadDim, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 8 / kWarps)
    attention_mma_kernel(const __grid_constant__ AttentionParams params) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  constexpr int kRows = Shape<T, kHeadDim, kWarps>::kRows;
  prefetch_plan(params);
  wait_for_predecessors();
  allow_successors();
  zero_padding<T>(params, threadIdx.x, blockDim.x);
  const int num_work_tiles = params.counts[0] * parts_of_tile(params, kRows) * params.num_kv_heads;
  for (int round = 0; round * static_cast<int>(gridDim.x) < num_work_tiles; ++round) {
    const int index = work_tile_of_round(round, num_work_tiles, blockIdx.x, gridDim.x);
    if (index < 0) continue;
    const WorkTile work = read_work_tile(params, index, kRows);
    if (work.num_rows == 0) continue;
    if (work.num_rows <= kRows / 4) {
      attend<T, kHeadDim, kWarps, 4>(params, work, shared_memory);
    } else if (work.num_rows <= kRows / 2) {
      attend<T, kHeadDim, kWarps, 2>(params, work, shared_memory);
    } else {
      attend<T, kHeadDim, kWarps, 1>(params, work, shared_memory);
    }
  }
}

template <typename T, int kHeadDim, int kWarps>
void launch_mma(const AttentionParams& params, const Launch& launch) {
  using S = Shape<T, kHeadDim, kWarps>;
  constexpr auto kKernel = attention_mma_kernel<T, kHeadDim, kWarps>;
  const dim3 grid = persistent_grid<kKernel>(kOp, launch, params, S::kThreads, S::kSharedBytes, S::kRows);
  launch_kernel<kKernel>(kOp, launch, {grid, S::kThreads, S::kSharedBytes, params.programmatic}, params);
}

template <typename T, int kHeadDim>
void launch_mma(const AttentionParams& params, const Launch& launch) {
  if (parts_of_tile(params, 64) > 1) return launch_mma<T, kHeadDim, 8>(params, launch);
  launch_mma<T, kHeadDim, 4>(params, launch);
}

template <typename T>
void launch_mma(const AttentionParams& params, const Launch& launch) {
  if (params.head_dim == 64) return launch_mma<T, 64>(params, launch);
  launch_mma<T, 128>(params, launch);
}

// Whether an address and strides counted in 2-byte elements are multiples of `bytes`.
bool aligned(const void* pointer, int bytes, std::initializer_list<int64_t> strides) {
  bool result = reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
  for (const int64_t stride : strides) result = result && 2 * stride % bytes == 0;
  return result;
}

}  // namespace

bool attention_mma_serves(const AttentionParams& params) {
  return params.dtype != DType::kFloat32 && (params.head_dim == 64 || params.head_dim == 128) &&
         aligned(params.q, 4, {params.q_token_stride, params.q_head_stride}) &&
         aligned(params.k_cache, 16, {params.k_page_stride, params.k_token_stride, params.k_head_stride}) &&
         aligned(params.v_cache, 16, {params.v_page_stride, params.v_token_stride, params.v_head_stride});
}

void attention_mma(const AttentionParams& params, const Launch& launch) {
  if (params.dtype == DType::kBFloat16) return launch_mma<__nv_bfloat16>(params, launch);
  launch_mma<__half>(params, launch);
}

}  // namespace bbk
