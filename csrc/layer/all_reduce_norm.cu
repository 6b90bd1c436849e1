// The sum of a row over GPUs with the residual add and the norm behind it, in one kernel.
//
// Each rank pushes its part of a row into the inboxes of all others over NVLink, and adds up what lies in its
// own: every rank has all sums, and each computes all norms. Data says by itself that it is there: a word of
// an inbox that was not written reads as kNotThere, a NaN that no part holds. So nobody waits for a flag
// behind the data, and no fence is needed: every word is waited for by itself, and no other memory hangs on
// it. What was read is set back to kNotThere by the thread that read it. (Published as the "Lamport"
// all-reduce of TensorRT-LLM, with -0 in the place of the NaN and three buffers.)
//
// Two turns take turns. That is enough: a peer pushes its part of call n + 2 into what held call n only once
// its kernel of call n + 1 has ended, which waited for this rank's part of call n + 1. This rank pushed that
// behind the end of its own kernel of call n, and with it all of its reads and resets of that turn. Kernels
// of one rank's calls follow each other in a stream, also where they are launched early: each waits for its
// predecessor before it touches memory, and a grid's end makes its writes visible.
//
// No rank waits for a block that cannot run: all blocks of a grid are resident, with room beside them for the
// grids of the other lanes. A successor in the stream may take its place on the processors while this kernel
// waits (it loads its first weights meanwhile), unless another lane is at work: then it could take the room
// of that lane's kernel, for which another rank may be waiting.
#include "common/launch.cuh"
#include "layer/all_reduce_norm.h"
#include "layer/e4m3.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "all_reduce_norm";
// As of the norm, whose sums are to be the same.
constexpr int kThreads = 256;
constexpr int kMaxThreads = 512;
constexpr int kMaxVecs = 8;
constexpr uint32_t kNotThere = AllReduceNormParams::kNotThere;

// Four words, each by itself, past the cache of the processor.
__device__ __forceinline__ uint4 load_words(const char* place) {
  uint4 found;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
               : "l"(place)
               : "memory");
  return found;
}

__device__ __forceinline__ void store_words(char* place, const uint4& words) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(place), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

template <typename T>
__device__ __forceinline__ Vec<T> as_elements(const uint4& words) {
  return *reinterpret_cast<const Vec<T>*>(&words);
}

// Of a NaN with the sign another NaN.
__device__ __forceinline__ uint32_t sendable(uint32_t word) {
  return word == kNotThere ? kNotThere >> 1 : word;
}

__device__ __forceinline__ bool is_missing(const uint4& words) {
  return words.x == kNotThere || words.y == kNotThere || words.z == kNotThere || words.w == kNotThere;
}

// In `receiver`'s inbox the first byte of what `sender` has to say in a turn.
__device__ __forceinline__ char* place_of(const AllReduceNormParams& params, int turn, int sender,
                                          int receiver) {
  const int others = params.inboxes.count - 1;
  const int source = sender - (sender > receiver ? 1 : 0);
  return reinterpret_cast<char*>(params.inboxes.ids[receiver]) +
         (static_cast<int64_t>(turn) * others + source) * params.source_bytes;
}

// Rows of whole, aligned vectors, at most kVecs a thread; parts of kAtOnce ranks are asked for together.
template <typename T, int kVecs, int kAtOnce, bool kQuantized>
__global__ void __launch_bounds__(kMaxThreads, 2)
    all_reduce_norm_kernel(const __grid_constant__ AllReduceNormParams params) {
  constexpr int kSize = Vec<T>::kSize;
  constexpr int kTogether = kVecs < 2 ? kVecs : 2;
  if (params.lets_next_wait) allow_successors();
  wait_for_predecessors();
  const int ranks = params.inboxes.count, rank = params.rank;
  const int num_vecs = static_cast<int>(params.dim / kSize);
  const int64_t row_bytes = params.dim * static_cast<int64_t>(sizeof(T));
  const int turn = __ldcg(params.turn);
  const auto part_of = [&](int64_t token) {
    return reinterpret_cast<const Vec<T>*>(static_cast<const T*>(params.x) + token * params.x_row_stride);
  };

  for (int64_t token = blockIdx.x; token < params.num_tokens; token += gridDim.x) {
    const Vec<T>* x = part_of(token);
    uint4 mine[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int index = threadIdx.x + i * blockDim.x;
      if (index < num_vecs) mine[i] = *reinterpret_cast<const uint4*>(x + index);
    }
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      uint4& words = mine[i];
      words = make_uint4(sendable(words.x), sendable(words.y), sendable(words.z), sendable(words.w));
    }
    for (int step = 1; step < ranks; ++step) {  // each rank begins with another one
      const int receiver = rank + step < ranks ? rank + step : rank + step - ranks;
      char* place = place_of(params, turn, rank, receiver) + token * row_bytes;
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int index = threadIdx.x + i * blockDim.x;
        if (index < num_vecs) store_words(place + 16 * index, mine[i]);
      }
    }
  }

  const auto* weight = static_cast<const Vec<T>*>(params.weight);
  for (int64_t token = blockIdx.x; token < params.num_tokens; token += gridDim.x) {
    const Vec<T>* x = part_of(token);
    auto* residual =
        reinterpret_cast<Vec<T>*>(static_cast<T*>(params.residual) + token * params.residual_row_stride);
    Vec<T> row[kVecs];
    float sum = 0.0f;
#pragma unroll
    for (int begin = 0; begin < kVecs; begin += kTogether) {
      Vec<T> mine[kTogether], added[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int index = threadIdx.x + (begin + i) * blockDim.x;
        if (index < num_vecs) {
          mine[i] = x[index];
          added[i] = residual[index];
        }
      }
      for (int first = 0; first < ranks; first += kAtOnce) {
        uint4 parts[kAtOnce][kTogether];
        bool missing;
        do {
          missing = false;
#pragma unroll
          for (int p = 0; p < kAtOnce; ++p) {
            const int sender = first + p;
            if (sender >= ranks || sender == rank) continue;
            const char* place = place_of(params, turn, sender, rank) + token * row_bytes;
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
              const int index = threadIdx.x + (begin + i) * blockDim.x;
              if (index < num_vecs) parts[p][i] = load_words(place + 16 * index);
            }
          }
#pragma unroll
          for (int p = 0; p < kAtOnce; ++p) {
            if (first + p >= ranks || first + p == rank) continue;
#pragma unroll
            for (int i = 0; i < kTogether; ++i) {
              if (threadIdx.x + (begin + i) * blockDim.x < num_vecs) missing |= is_missing(parts[p][i]);
            }
          }
        } while (missing);
#pragma unroll
        for (int p = 0; p < kAtOnce; ++p) {
          const int sender = first + p;
          if (sender >= ranks) continue;
          const bool is_mine = sender == rank;
          char* place = is_mine ? nullptr : place_of(params, turn, sender, rank) + token * row_bytes;
#pragma unroll
          for (int i = 0; i < kTogether; ++i) {
            const int index = threadIdx.x + (begin + i) * blockDim.x;
            if (index >= num_vecs) continue;
            const Vec<T> part = is_mine ? mine[i] : as_elements<T>(parts[p][i]);
            if (!is_mine) {
              store_words(place + 16 * index, make_uint4(kNotThere, kNotThere, kNotThere, kNotThere));
            }
#pragma unroll
            for (int j = 0; j < kSize; ++j) {
              T& total = row[begin + i].values[j];
              total = sender == 0 ? part.values[j] : rounded_sum(total, part.values[j]);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int index = threadIdx.x + (begin + i) * blockDim.x;
        if (index >= num_vecs) continue;
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          T& total = row[begin + i].values[j];
          total = rounded_sum(total, added[i].values[j]);
          sum += to_float(total) * to_float(total);
        }
        residual[index] = row[begin + i];
      }
    }
    // A thread that has come here at its last row has met every peer's block of that row: no other thread
    // waits for what does not come.
    if (!params.lets_next_wait && token + gridDim.x >= params.num_tokens) allow_successors();

    const float inverse = inverse_rms(block_sum(sum), params.dim, params.eps);
    int most = 0;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int index = threadIdx.x + i * blockDim.x;
      if (index >= num_vecs) continue;
      const Vec<T> factors = weight[index];
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        T& value = row[i].values[j];
        value = scaled(to_float(value), inverse, factors.values[j]);
        if (kQuantized) most = max(most, magnitude(value));
      }
      if constexpr (!kQuantized) {
        reinterpret_cast<Vec<T>*>(static_cast<T*>(params.out) + token * params.out_row_stride)[index] =
            row[i];
      }
    }
    if constexpr (kQuantized) {
      const float by = multiplier(most, &params.scale[token]);
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int index = threadIdx.x + i * blockDim.x;
        if (index < num_vecs)
          store_e4m3(row[i], by, static_cast<uint8_t*>(params.out) + token * params.dim, index);
      }
    }
    __syncthreads();  // the next row's reductions take the same memory
  }

  // By the last block: none has yet to read the turn then.
  if (threadIdx.x == 0 && atomicAdd(&params.turn[1], 1) == static_cast<int>(gridDim.x) - 1) {
    params.turn[1] = 0;
    params.turn[0] = turn ^ 1;
  }
}

template <typename T, int kVecs, int kAtOnce, bool kQuantized>
void launch(const AllReduceNormParams& params, int threads, bool programmatic, const Launch& launch) {
  constexpr auto kKernel = all_reduce_norm_kernel<T, kVecs, kAtOnce, kQuantized>;
  const int64_t resident = resident_ctas<kKernel>(kOp, launch.device, threads, 0) / params.lanes;
  const int64_t blocks = params.num_tokens < resident ? params.num_tokens : resident;
  if (blocks < 1)
    fail(kOp, "lanes: expected room for each on the device, got " + std::to_string(params.lanes));
  const dim3 grid(static_cast<unsigned>(blocks));
  launch_kernel<kKernel>(kOp, launch, {grid, threads, 0, programmatic}, params);
}

template <typename T, int kVecs>
void launch_as_needed(const AllReduceNormParams& params, int threads, bool programmatic,
                      const Launch& where) {
  const bool quantized = params.scale != nullptr;
  if (params.inboxes.count <= 2) {
    return quantized ? launch<T, kVecs, 1, true>(params, threads, programmatic, where)
                     : launch<T, kVecs, 1, false>(params, threads, programmatic, where);
  }
  return quantized ? launch<T, kVecs, 2, true>(params, threads, programmatic, where)
                   : launch<T, kVecs, 2, false>(params, threads, programmatic, where);
}

template <typename T>
void check_vectors(const AllReduceNormParams& params) {
  constexpr int kSize = Vec<T>::kSize;
  const auto aligned = [](const char* argument, const void* pointer, int64_t row_stride) {
    if (reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_stride % kSize == 0) return;
    refuse(kOp, std::string(argument) + ": expected rows aligned to 16 bytes");
  };
  if (params.dim % kSize != 0 || params.dim > kMaxThreads * kMaxVecs * kSize) {
    refuse(kOp, "dim: expected a multiple of " + std::to_string(kSize) + " up to " +
                    std::to_string(kMaxThreads * kMaxVecs * kSize) + ", got " + std::to_string(params.dim));
  }
  aligned("x", params.x, params.x_row_stride);
  aligned("weight", params.weight, 0);
  aligned("residual", params.residual, params.residual_row_stride);
  aligned("out", params.out, params.scale == nullptr ? params.out_row_stride : 0);
  const int64_t bytes = params.num_tokens * params.dim * static_cast<int64_t>(sizeof(T));
  if (bytes > params.source_bytes) {
    refuse(kOp, "source_bytes: expected at least " + std::to_string(bytes) + ", got " +
                    std::to_string(params.source_bytes));
  }
}

template <typename T>
void launch_of_dtype(const AllReduceNormParams& params, bool programmatic, const Launch& launch) {
  check_vectors<T>(params);
  const int num_vecs = static_cast<int>(params.dim / Vec<T>::kSize);
  int vecs = 1;
  while (vecs < kMaxVecs && num_vecs > vecs * kThreads) vecs *= 2;
  const int threads = ceil_div(ceil_div(num_vecs, vecs), 32) * 32;
  switch (vecs) {
    case 1:
      return launch_as_needed<T, 1>(params, threads, programmatic, launch);
    case 2:
      return launch_as_needed<T, 2>(params, threads, programmatic, launch);
    case 4:
      return launch_as_needed<T, 4>(params, threads, programmatic, launch);
    default:
      return launch_as_needed<T, 8>(params, threads, programmatic, launch);
  }
}

}  // namespace

void all_reduce_norm(const AllReduceNormParams& params, bool programmatic, const Launch& launch) {
  check_at_least(kOp, "num_tokens", params.num_tokens, 0);
  check_at_least(kOp, "dim", params.dim, 1);
  check_at_least(kOp, "lanes", params.lanes, 1);
  check_at_least(kOp, "rank", params.rank, 0);
  check_at_least(kOp, "inboxes", params.inboxes.count, params.rank + 1);
  if (params.num_tokens == 0) return;  // on every rank
  const DeviceGuard guard(launch.device, kOp);
  switch (params.dtype) {
    case DType::kFloat32:
      return launch_of_dtype<float>(params, programmatic, launch);
    case DType::kBFloat16:
      return launch_of_dtype<__nv_bfloat16>(params, programmatic, launch);
    default:
      refuse(kOp, "dtype: expected fp32 or bf16, got " + std::string(name_of(params.dtype)));
  }
}

}  // namespace bbk
