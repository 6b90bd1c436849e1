// The LM head of few rows on sm_90 without logits in memory: the product with the vocabulary's weight, whose
// CTAs keep of every tile of logits what lm_head_finish needs. Each CTA, or pair of CTAs that share the
// reading of the weight, works through tiles of the vocabulary; the tiles to come are fetched while one is
// reduced.
#include <climits>

#include "common/capability.h"
#include "common/tensor_map.cuh"
#include "gemm/kernel.cuh"
#include "gemm/lm_head.h"
#include "gemm/lm_head_math.cuh"

namespace bbk {
namespace {

constexpr char kOp[] = "lm_head_confidence";
constexpr int kGroups = kLmHeadTileTokens / 64;
constexpr int kConsumerWarps = 4 * kGroups;

struct ProductArgs {
  LmHeadPartial* partials;
  int num_rows;
  int box_rows;  // that a copy moves
  int vocab_size;
  int suppress_token;
  int num_pieces;
  int num_k_blocks;
};

// The reduction of some logits of a row.
struct Best {
  float highest;
  float sum;  // of exp(logit - highest)
  int place;  // of the first logit that is the highest
};

template <class S>
struct BestTable {
  float highest[kConsumerWarps][S::kTokens];
  float sum[kConsumerWarps][S::kTokens];
  int place[kConsumerWarps][S::kTokens];
};

template <class S>
constexpr int kProductSharedBytes = (S::kSharedBytes + 15) / 16 * 16 + static_cast<int>(sizeof(BestTable<S>));

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ Best better(const Best& a, const Best& b) {
  const bool second = is_higher(b.highest, a.highest);
  const bool equal = a.highest == b.highest;
  const float low = second ? a.highest : b.highest, high = second ? b.highest : a.highest;
  // Two times minus infinity are equal: their difference would be NaN.
  const float weight = equal ? 1.0f : weight_of(low, high);
  Best best;
  best.highest = high;
  best.sum = second ? b.sum + a.sum * weight : a.sum + b.sum * weight;
  const bool tied = !second && !is_higher(a.highest, b.highest);
  best.place = tied ? min(a.place, b.place) : second ? b.place : a.place;
  return best;
}

// A logit that is rounded as the published models round it. Infinity and NaN have no softmax.
template <typename T>
__device__ __forceinline__ Best best_of(float sum, int place, bool counts) {
  const float logit = counts ? to_float(from_float<T>(sum)) : -INFINITY;
  return Best{logit, logit == -INFINITY ? 0.0f : 1.0f + (logit - logit), place};
}

__device__ __forceinline__ Best exchange(const Best& mine, int mask) {
  return Best{__shfl_xor_sync(~0u, mine.highest, mask), __shfl_xor_sync(~0u, mine.sum, mask),
              __shfl_xor_sync(~0u, mine.place, mask)};
}

// Each member on its own: a choice between structs would go through memory.
__device__ __forceinline__ Best choose(bool first, const Best& a, const Best& b) {
  return Best{first ? a.highest : b.highest, first ? a.sum : b.sum, first ? a.place : b.place};
}

// Of lanes that are `kMask` apart, each goes on with one half of the columns, of both lanes.
template <int kCount, int kMask>
__device__ __forceinline__ void halve(Best* best) {
  if constexpr (kCount > 1) {
    const bool high = threadIdx.x & kMask;
#pragma unroll
    for (int c = 0; c < kCount / 2; ++c) {
      const Best kept = choose(high, best[c + kCount / 2], best[c]);
      const Best given = choose(high, best[c], best[c + kCount / 2]);
      best[c] = better(kept, exchange(given, kMask));
    }
  } else {
    best[0] = better(best[0], exchange(best[0], kMask));
  }
}

// Reduces the warp's 16 logits of every row of `hidden` into its line of the table.
template <class S>
__device__ __forceinline__ void reduce_warp(const float (&sums)[S::kTokens / 2], BestTable<S>& table,
                                            int num_tokens, int suppress) {
  // A thread holds two logits of each of these columns, which are rows of `hidden`.
  constexpr int kColumns = S::kTokens / 4;
  constexpr int kHalf = kColumns / 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int place = 16 * warp + lane / 4;
  // What lies behind the vocabulary comes after everything that is there.
  const bool counts[2] = {place < num_tokens && place != suppress,
                          place + 8 < num_tokens && place + 8 != suppress};
  const int places[2] = {place < num_tokens ? place : INT_MAX, place + 8 < num_tokens ? place + 8 : INT_MAX};
  const auto of_column = [&](int c) {
    const float* both = &sums[c / 2 * 4 + c % 2];
    return better(best_of<typename S::T>(both[0], places[0], counts[0]),
                  best_of<typename S::T>(both[2], places[1], counts[1]));
  };
  Best best[kHalf];
  const bool high = lane & 16;
#pragma unroll
  for (int c = 0; c < kHalf; ++c) {
    const Best first = of_column(c), second = of_column(c + kHalf);
    best[c] = better(choose(high, second, first), exchange(choose(high, first, second), 16));
  }
  halve<kHalf, 8>(best);
  constexpr int kQuarter = kHalf > 1 ? kHalf / 2 : 1;
  halve<kQuarter, 4>(best);
  constexpr int kLeft = kQuarter > 1 ? kQuarter / 2 : 1;
  int column = high ? kHalf : 0;
  if (kHalf > 1 && lane & 8) column += kQuarter;
  if (kQuarter > 1 && lane & 4) column += kLeft;
  if (kQuarter == 1 && lane & 4) return;  // the other lane has the same
#pragma unroll
  for (int c = 0; c < kLeft; ++c, ++column) {
    const int row = column / 2 * 8 + 2 * (lane % 4) + column % 2;
    table.highest[warp][row] = best[c].highest;
    table.sum[warp][row] = best[c].sum;
    table.place[warp][row] = best[c].place;
  }
}

// Adds up the warps' lines.
template <class S>
__device__ __forceinline__ void write_partial(const BestTable<S>& table, const ProductArgs& args, int piece) {
  const int row = threadIdx.x;
  if (row >= args.num_rows) return;
  const auto line = [&](int warp) {
    return Best{table.highest[warp][row], table.sum[warp][row], table.place[warp][row]};
  };
  Best best = line(0);
#pragma unroll
  for (int warp = 1; warp < kConsumerWarps; ++warp) best = better(best, line(warp));
  args.partials[static_cast<int64_t>(row) * args.num_pieces + piece] =
      LmHeadPartial{best.highest, best.sum, piece * kLmHeadTileTokens + best.place, -INFINITY};
}

#endif

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    lm_head_product_kernel(const __grid_constant__ CUtensorMap hidden_map,
                           const __grid_constant__ CUtensorMap weight_map, const ProductArgs args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  static_assert(S::kProducer && S::kSplitK * S::kMulticast == 1 && S::kGroups == kGroups && !S::kGated);
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t stages = shared_address(shared);
  const uint32_t full = stages + S::kPipelineBytes;
  const uint32_t empty = full + 8 * S::kStages;
  auto& table = *reinterpret_cast<BestTable<S>*>(shared + (S::kSharedBytes + 15) / 16 * 16);
  const int first_piece = blockIdx.x, step = gridDim.x;

  if (threadIdx.x == 0) {
    prefetch_map(&hidden_map);
    prefetch_map(&weight_map);
    for (int stage = 0; stage < S::kStages; ++stage) {
      barrier_init(full + 8 * stage, 1);
      barrier_init(empty + 8 * stage, kConsumerWarps);
    }
    publish_barriers();
  }
  __syncthreads();

  int stage = 0, phase = 0;
  const auto advance = [&] {
    if (++stage == S::kStages) {
      stage = 0;
      phase ^= 1;
    }
  };
  if (threadIdx.x >= kConsumerWarps * 32) {
    give_registers<S::kProducerRegisters>();
    if (threadIdx.x == kConsumerWarps * 32) {
      const uint64_t read_once = evict_first_policy();
      const uint64_t keep = evict_last_policy();
      for (int piece = first_piece; piece < args.num_pieces; piece += step) {
        const int first_token = piece * kLmHeadTileTokens;
#pragma unroll 1
        for (int block = 0; block < args.num_k_blocks; ++block) {
          barrier_wait(empty + 8 * stage, phase ^ 1);
          const uint32_t barrier = full + 8 * stage, target = stages + stage * S::kStageBytes;
          const int k = block * S::kBlockK;
          barrier_arrive_expecting(barrier, S::kWeightBytes + args.box_rows * S::kBlockK * 2);
          copy_box(target, &weight_map, {k, first_token}, barrier, read_once);
          copy_box(target + S::kWeightBytes, &hidden_map, {k, 0}, barrier, keep);
          advance();
        }
      }
    }
  } else {
    take_registers<S::kConsumerRegisters>();
    using Product = Wgmma<typename S::T, S::kTokens>;
    const auto release = [&](int stage) {
      if (threadIdx.x % 32 == 0) barrier_arrive(empty + 8 * stage);
    };
    for (int piece = first_piece; piece < args.num_pieces; piece += step) {
      float sums[S::kTokens / 2];
      int before = 0;  // stage
#pragma unroll 1
      for (int block = 0; block < args.num_k_blocks; ++block) {
        barrier_wait(full + 8 * stage, phase);
        const uint32_t base = stages + stage * S::kStageBytes;
        const uint64_t a = matrix_descriptor(base + threadIdx.x / 128 * 64 * S::kBlockK * 2);
        const uint64_t b = matrix_descriptor(base + S::kWeightBytes);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < S::kBlockK / Product::kK; ++k) {
          Product::run(sums, a + 2 * k, b + 2 * k, block > 0 || k > 0);
        }
        wgmma_commit();
        // Products of the block before are done: its stage may be filled again.
        wgmma_wait<1>();
        if (block > 0) release(before);
        before = stage;
        advance();
      }
      wgmma_wait<0>();
      release(before);
      keep_in_registers(sums);
      const int first_token = piece * kLmHeadTileTokens;
      named_barrier(1, kConsumerWarps * 32);  // the table has been read
      reduce_warp<S>(sums, table, args.vocab_size - first_token, args.suppress_token - first_token);
      named_barrier(2, kConsumerWarps * 32);
      write_partial<S>(table, args, piece);
    }
  }
#endif
}

template <class S>
void launch_product(const LmHeadProductParams& p, const Launch& launch) {
  constexpr auto kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  const int box_rows = copied_rows(p.num_rows);
  const CUtensorMap hidden_map = tensor_map<2>(kOp, "hidden", p.hidden, p.dtype, {p.dim, p.num_rows},
                                               {p.hidden_row_stride}, {S::kBlockK, box_rows}, kPromotion);
  const CUtensorMap weight_map =
      tensor_map<2>(kOp, "weight", p.weight, p.dtype, {p.dim, p.vocab_size}, {p.weight_row_stride},
                    {S::kBlockK, kLmHeadTileTokens}, kPromotion);
  ProductArgs args;
  args.partials = p.partials;
  args.num_rows = static_cast<int>(p.num_rows);
  args.box_rows = box_rows;
  args.vocab_size = static_cast<int>(p.vocab_size);
  args.suppress_token = p.suppress_token < 0 ? INT_MIN / 2 : static_cast<int>(p.suppress_token);
  args.num_pieces = static_cast<int>(p.num_pieces);
  args.num_k_blocks = static_cast<int>(ceil_div<int64_t>(p.dim, S::kBlockK));

  constexpr int kSharedBytes = kProductSharedBytes<S>;
  static_assert(kSharedBytes <= 232448, "shared memory of an sm_90 CTA");
  const int sms = num_sms(kOp, launch.device);
  const dim3 grid(static_cast<unsigned>(p.num_pieces < sms ? p.num_pieces : sms));
  launch_kernel<lm_head_product_kernel<S>>(kOp, launch, {grid, S::kThreads, kSharedBytes}, hidden_map,
                                           weight_map, args);
}

template <typename T>
void launch_product(const LmHeadProductParams& params, int tile_rows, const Launch& launch) {
  switch (tile_rows) {
    case 16:
      return launch_product<GemmShape<T, 16, kGroups, 8, 1, 1, GemmUse::kLinear>>(params, launch);
    case 64:
      return launch_product<GemmShape<T, 64, kGroups, 6, 1, 1, GemmUse::kLinear>>(params, launch);
    default:
      return launch_product<GemmShape<T, 128, kGroups, 5, 1, 1, GemmUse::kLinear>>(params, launch);
  }
}

}  // namespace

void lm_head_product(const LmHeadProductParams& params, int tile_rows, const Launch& launch) {
  check_at_least(kOp, "num_rows", params.num_rows, 0);
  check_at_least(kOp, "dim", params.dim, 1);
  check_at_least(kOp, "vocab_size", params.vocab_size, 1);
  const int64_t pieces = ceil_div<int64_t>(params.vocab_size, kLmHeadTileTokens);
  if (params.num_pieces != pieces) {
    refuse(kOp,
           "num_pieces: expected " + std::to_string(pieces) + ", got " + std::to_string(params.num_pieces));
  }
  if (tile_rows != 16 && tile_rows != 64 && tile_rows != 128) {
    refuse(kOp, "tile_rows: expected 16, 64 or 128, got " + std::to_string(tile_rows));
  }
  if (params.num_rows > tile_rows) {
    refuse(kOp, "num_rows: expected at most tile_rows, " + std::to_string(tile_rows) + ", got " +
                    std::to_string(params.num_rows));
  }
  if (params.vocab_size > INT_MAX / 2) {
    refuse(kOp, "vocab_size: expected at most " + std::to_string(INT_MAX / 2) + ", got " +
                    std::to_string(params.vocab_size));
  }
  if (params.dim % 8 != 0) refuse(kOp, "dim: expected a multiple of 8, got " + std::to_string(params.dim));
  check_aligned(kOp, "hidden", params.hidden, params.hidden_row_stride);
  check_aligned(kOp, "weight", params.weight, params.weight_row_stride);
  if (params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) {
    refuse(kOp, "dtype: expected code 1 or 2, got " + std::to_string(static_cast<int>(params.dtype)));
  }
  if (params.num_rows == 0) return;
  const DeviceGuard guard(launch.device, kOp);
  check_sm90a(kOp, launch.device);
  if (params.dtype == DType::kFloat16) return launch_product<__half>(params, tile_rows, launch);
  launch_product<__nv_bfloat16>(params, tile_rows, launch);
}

}  // namespace bbk
