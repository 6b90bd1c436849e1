// The sum of a row over GPUs with the residual add and the norm behind it, in one kernel: each rank adds up
// the parts of all and computes all norms. How parts come to it: peers.cuh.
#include <type_traits>

#include "common/launch.cuh"
#include "layer/all_reduce_norm.h"
#include "layer/e4m3.cuh"
#include "layer/peers.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "all_reduce_norm";
// As of the norm, whose sums are to be the same.
constexpr int kThreads = 256;
constexpr int kMaxThreads = 512;
constexpr int kMaxVecs = 8;

// The elements of a word: kept in words, they take as few registers as they have bytes.
template <typename T>
struct Elements {
  static constexpr int kCount = 4 / sizeof(T);
  float values[kCount];

  __device__ __forceinline__ explicit Elements(uint32_t word) {
    if constexpr (kCount == 1) {
      values[0] = __uint_as_float(word);
    } else {
      const T* pair = reinterpret_cast<const T*>(&word);
      values[0] = to_float(pair[0]);
      values[1] = to_float(pair[1]);
    }
  }

  // Rounded to T.
  __device__ __forceinline__ uint32_t word() const {
    if constexpr (kCount == 1) return __float_as_uint(values[0]);
    if constexpr (kCount == 2) return pack_pair<T>(values[0], values[1]);
  }
};

template <typename T>
__device__ __forceinline__ uint32_t rounded_sum_of(uint32_t a, uint32_t b) {
  Elements<T> sum(a);
  const Elements<T> other(b);
#pragma unroll
  for (int i = 0; i < Elements<T>::kCount; ++i) sum.values[i] += other.values[i];
  return sum.word();
}

template <typename T>
__device__ __forceinline__ float squares_of(uint32_t word, float sum) {
  const Elements<T> x(word);
#pragma unroll
  for (int i = 0; i < Elements<T>::kCount; ++i) sum += x.values[i] * x.values[i];
  return sum;
}

// As `scaled` has it: rounded before it meets the weight, and behind it.
template <typename T>
__device__ __forceinline__ uint32_t scaled_word(uint32_t word, float scale, uint32_t weight) {
  Elements<T> x(word);
#pragma unroll
  for (int i = 0; i < Elements<T>::kCount; ++i) x.values[i] *= scale;
  Elements<T> rounded(x.word());
  const Elements<T> factors(weight);
#pragma unroll
  for (int i = 0; i < Elements<T>::kCount; ++i) rounded.values[i] *= factors.values[i];
  return rounded.word();
}

// The largest magnitude, as an integer.
template <typename T>
__device__ __forceinline__ int magnitude_of(const uint4& words) {
  int most = 0;
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) {
    most = max(most, magnitude(reinterpret_cast<const Vec<T>&>(words).values[i]));
  }
  return most;
}

// f(a, b) for each of the four words.
template <typename F>
__device__ __forceinline__ uint4 each_word(const uint4& a, const uint4& b, F&& f) {
  return make_uint4(f(a.x, b.x), f(a.y, b.y), f(a.z, b.z), f(a.w, b.w));
}

// A hint, which reads nothing: it may come before what wrote there is done.
__device__ __forceinline__ void prefetch_to_l2(const void* place) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(place));
}

// Rows of whole, aligned vectors, at most kVecs a thread; parts of kAtOnce ranks are asked for together.
template <typename T, int kVecs, int kAtOnce, bool kQuantized>
__global__ void __launch_bounds__(kMaxThreads, 2)
    all_reduce_norm_kernel(const __grid_constant__ AllReduceNormParams params) {
  constexpr int kTogether = kVecs < 2 ? kVecs : 2;
  if (params.lets_next_wait) allow_successors();
  const int num_vecs = static_cast<int>(params.dim / Vec<T>::kSize);
  const auto* weight = static_cast<const uint4*>(params.weight);
  // A step's weights push those of its norms out of the L2 cache.
  for (int index = threadIdx.x; index < num_vecs; index += blockDim.x) prefetch_to_l2(weight + index);
  wait_for_predecessors();
  const Peers& peers = params.peers;
  const int ranks = peers.inboxes.count, rank = peers.rank;
  const int64_t row_bytes = params.dim * static_cast<int64_t>(sizeof(T));
  const int turn = turn_of(peers);
  const auto row_of = [](auto* rows, int64_t token, int64_t stride) {
    using Bytes =
        std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(rows)>>, const char, char>;
    using Words = std::conditional_t<std::is_const_v<Bytes>, const uint4, uint4>;
    return reinterpret_cast<Words*>(static_cast<Bytes*>(rows) +
                                    token * stride * static_cast<int64_t>(sizeof(T)));
  };

  for (int64_t token = blockIdx.x; token < params.num_tokens; token += gridDim.x) {
    const uint4* x = row_of(params.x, token, params.x_row_stride);
    uint4 mine[kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int index = threadIdx.x + i * blockDim.x;
      if (index < num_vecs) mine[i] = x[index];
    }
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const uint4 words = mine[i];
      mine[i] = make_uint4(sendable(words.x), sendable(words.y), sendable(words.z), sendable(words.w));
    }
    for (int step = 1; step < ranks; ++step) {
      char* place = place_of(peers, turn, rank, receiver_of(peers, step)) + token * row_bytes;
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int index = threadIdx.x + i * blockDim.x;
        if (index < num_vecs) store_words(place + 16 * index, mine[i]);
      }
    }
  }

  for (int64_t token = blockIdx.x; token < params.num_tokens; token += gridDim.x) {
    const uint4* x = row_of(params.x, token, params.x_row_stride);
    uint4* residual = row_of(params.residual, token, params.residual_row_stride);
    uint4 row[kVecs];
    float sum = 0.0f;
#pragma unroll
    for (int begin = 0; begin < kVecs; begin += kTogether) {
      uint4 mine[kTogether], added[kTogether];
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
            const char* place = place_of(peers, turn, sender, rank) + token * row_bytes;
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
          char* place = is_mine ? nullptr : place_of(peers, turn, sender, rank) + token * row_bytes;
#pragma unroll
          for (int i = 0; i < kTogether; ++i) {
            const int index = threadIdx.x + (begin + i) * blockDim.x;
            if (index >= num_vecs) continue;
            const uint4 part = is_mine ? mine[i] : parts[p][i];
            if (!is_mine) reset_words(place + 16 * index);
            uint4& total = row[begin + i];
            total = sender == 0 ? part : each_word(total, part, rounded_sum_of<T>);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int index = threadIdx.x + (begin + i) * blockDim.x;
        if (index >= num_vecs) continue;
        const uint4 total = row[begin + i] = each_word(row[begin + i], added[i], rounded_sum_of<T>);
        residual[index] = total;
        sum = squares_of<T>(total.w,
                            squares_of<T>(total.z, squares_of<T>(total.y, squares_of<T>(total.x, sum))));
      }
    }
    // A thread that has come here at its last row has met every peer's block of that row: no other thread
    // waits for what does not come.
    if (!params.lets_next_wait && token + gridDim.x >= params.num_tokens) allow_successors();

    // Asked for ahead of the reduction, where registers allow.
    constexpr bool kWeightsAhead = kVecs <= 2;
    uint4 weights[kWeightsAhead ? kVecs : 1];
    if constexpr (kWeightsAhead) {
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int index = threadIdx.x + i * blockDim.x;
        if (index < num_vecs) weights[i] = weight[index];
      }
    }
    const float inverse = inverse_rms(block_sum(sum), params.dim, params.eps);
    int most = 0;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int index = threadIdx.x + i * blockDim.x;
      if (index >= num_vecs) continue;
      const uint4 factors = kWeightsAhead ? weights[i] : weight[index];
      row[i] = each_word(row[i], factors, [inverse](uint32_t word, uint32_t factor) {
        return scaled_word<T>(word, inverse, factor);
      });
      if constexpr (kQuantized) {
        most = max(most, magnitude_of<T>(row[i]));
      } else {
        row_of(params.out, token, params.out_row_stride)[index] = row[i];
      }
    }
    if constexpr (kQuantized) {
      const float by = multiplier(most, &params.scale[token]);
      auto* out = static_cast<uint8_t*>(params.out) + token * params.dim;
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int index = threadIdx.x + i * blockDim.x;
        if (index < num_vecs) store_e4m3(*reinterpret_cast<const Vec<T>*>(&row[i]), by, out, index);
      }
    }
    __syncthreads();  // the next row's reductions take the same memory
  }

  end_turn(peers, turn);
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
  if (params.peers.inboxes.count <= 2) {
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
  if (bytes > params.peers.source_bytes) {
    refuse(kOp, "source_bytes: expected at least " + std::to_string(bytes) + ", got " +
                    std::to_string(params.peers.source_bytes));
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
  check_at_least(kOp, "rank", params.peers.rank, 0);
  check_at_least(kOp, "inboxes", params.peers.inboxes.count, params.peers.rank + 1);
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
