// The LM head's parts of several ranks put together, on every rank: see layer/peers.cuh for how they come.
#include "common/launch.cuh"
#include "gemm/lm_head.h"
#include "gemm/lm_head_math.cuh"
#include "layer/peers.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "lm_head_merge";
constexpr int kThreads = 128;

// What a rank says about a row.
struct Part {
  float highest, sum, token, probe;
};

__device__ __forceinline__ Part part_of(const uint4& words) {
  return Part{__uint_as_float(words.x), __uint_as_float(words.y), __uint_as_float(words.z),
              __uint_as_float(words.w)};
}

// A thread has a row.
__global__ void __launch_bounds__(kThreads)
    lm_head_merge_kernel(const __grid_constant__ LmHeadMergeParams params) {
  const Peers& peers = params.peers;
  const int ranks = peers.inboxes.count;
  const int turn = turn_of(peers);
  const auto* parts = reinterpret_cast<const uint4*>(params.parts);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t row = first; row < params.num_rows; row += step) {
    const uint4 mine = parts[row];
    const uint4 words = make_uint4(sendable(mine.x), sendable(mine.y), sendable(mine.z), sendable(mine.w));
    for (int other = 1; other < ranks; ++other) {
      store_words(place_of(peers, turn, peers.rank, receiver_of(peers, other)) + 16 * row, words);
    }
  }
  for (int64_t row = first; row < params.num_rows; row += step) {
    const auto words_of = [&](int sender) {
      if (sender == peers.rank) return parts[row];
      uint4 words;
      do {
        words = load_words(place_of(peers, turn, sender, peers.rank) + 16 * row);
      } while (is_missing(words));
      return words;
    };
    // Ranks are in the order of their tokens: of equal logits the first has the lowest.
    Part best = part_of(words_of(0));
    for (int sender = 1; sender < ranks; ++sender) {
      const Part part = part_of(words_of(sender));
      best.probe = max_or_nan(best.probe, part.probe);
      if (is_higher(part.highest, best.highest)) {
        best.highest = part.highest;
        best.token = part.token;
      }
    }
    float sum = 0.0f;
    for (int sender = 0; sender < ranks; ++sender) {
      const Part part = part_of(words_of(sender));
      sum += part.sum * expf(part.highest - best.highest);
      if (sender != peers.rank) reset_words(place_of(peers, turn, sender, peers.rank) + 16 * row);
    }
    params.top_token[row] = static_cast<int32_t>(best.token);
    params.confidence[row] = 1.0f / sum;
    if (params.probe_probability != nullptr) {
      params.probe_probability[row] = expf(best.probe - best.highest) / sum;
    }
  }
  __syncthreads();
  end_turn(peers, turn);
}

}  // namespace

void lm_head_merge(const LmHeadMergeParams& params, const Launch& launch) {
  check_at_least(kOp, "num_rows", params.num_rows, 0);
  check_at_least(kOp, "rank", params.peers.rank, 0);
  check_at_least(kOp, "inboxes", params.peers.inboxes.count, params.peers.rank + 1);
  check_at_least(kOp, "source_bytes", params.peers.source_bytes, params.num_rows * 16);
  if (params.num_rows == 0) return;  // on every rank
  const DeviceGuard guard(launch.device, kOp);
  const int64_t blocks = ceil_div<int64_t>(params.num_rows, kThreads), most = num_sms(kOp, launch.device);
  const dim3 grid(static_cast<unsigned>(blocks < most ? blocks : most));
  launch_kernel<lm_head_merge_kernel>(kOp, launch, {grid, kThreads}, params);
}

}  // namespace bbk
