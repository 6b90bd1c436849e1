// How a product for few tokens is cut, and what its kernel is told.
#pragma once

#include <type_traits>

#include "common/elements.cuh"
#include "common/sm90.cuh"
#include "common/wgmma.cuh"
#include "layer/rope.h"

namespace bbk {

// What becomes of the sums. kLinear: the product itself. kSwiglu: the rows of the tile are gates and ups in
// turns of 8, a thread's two rows a gate and its up. kRopeKvWrite: they are the first and the second half of
// heads of q, k and v in turns of 8, a thread's two rows two places that rotate into each other.
// kRoundedSwiglu: as kSwiglu, of gates and ups that are rounded first. kRopeKvWriteAny: as kRopeKvWrite, into
// caches in e4m3 where `rope` has their scales.
enum class GemmUse { kLinear, kSwiglu, kRopeKvWrite, kRoundedSwiglu, kRopeKvWriteAny };

struct GemmArgs {
  void* out;         // [num_tokens, out_features]
  const void* bias;  // [rows of the weight] or null
  int64_t out_row_stride;
  int num_tokens;
  int box_tokens;  // that a CTA fetches and writes
  int out_features;
  int num_k_blocks;
  bool static_weight;  // may be read before the kernels in front are done
};

struct RotatedGemmArgs : GemmArgs {
  RopeKvWriteParams rope;  // its q and caches are written instead of `out`
};

// What a CTA computes. kTokens: columns of its tile. kGroups: consumer warpgroups, each with 64 rows of the
// weight. kSplitK: CTAs of a cluster that share the sum of a tile, each over a stretch of K. kMulticast: CTAs
// of a cluster that share one read of the weight, each with tokens of its own. kXMulticast: CTAs of a cluster
// that share one read of the tokens, each with rows of the weight of its own; for e4m3 alone.
template <typename Element, int kTokens_, int kGroups_, int kStages_, int kSplitK_, int kMulticast_,
          GemmUse kUse, int kXMulticast_ = 1>
struct GemmShape {
  using T = Element;
  static constexpr int kTokens = kTokens_;
  static constexpr int kGroups = kGroups_;
  static constexpr int kStages = kStages_;
  static constexpr int kSplitK = kSplitK_;
  static constexpr int kMulticast = kMulticast_;
  static constexpr int kXMulticast = kXMulticast_;
  static constexpr int kCluster = kXMulticast * kSplitK * kMulticast;
  // CTAs that copy into the pipeline of one: itself, and those with which it shares reads.
  static constexpr int kSources = kMulticast + kXMulticast - 1;
  static constexpr bool kRoundedGates = kUse == GemmUse::kRoundedSwiglu;
  static constexpr bool kGated = kUse == GemmUse::kSwiglu || kRoundedGates;
  static constexpr bool kAnyCache = kUse == GemmUse::kRopeKvWriteAny;
  static constexpr bool kRotated = kUse == GemmUse::kRopeKvWrite || kAnyCache;
  using Args = std::conditional_t<kRotated, RotatedGemmArgs, GemmArgs>;

  static constexpr int kBlockK = 64;  // 128 bytes: a row of the swizzle
  static constexpr int kRows = 64 * kGroups;
  // A warpgroup beside the consumers fetches the tiles, except where its registers are needed: an instruction
  // over 256 tokens names 128 sums, as many registers as each of 512 threads starts with. There a thread of
  // the first consumer fetches between two blocks.
  static constexpr bool kProducer = kGroups < 3 || kTokens < 256;
  static constexpr int kThreads = 128 * (kProducer ? kGroups + 1 : kGroups);
  // Rows of the weight that one copy of heads moves: they never reach from one head into the next.
  static constexpr int kHeadBoxRows = kMulticast > 1 ? 32 : 64;
  static constexpr int kWeightBytes = kRows * kBlockK * 2;
  static constexpr int kXBytes = kTokens * kBlockK * 2;
  static constexpr int kStageBytes = kWeightBytes + kXBytes;
  static constexpr int kPipelineBytes = kStages * kStageBytes;
  // Behind the pipeline's barriers lies that of what other splits of a sum send.
  static constexpr int kPartsBarrier = kPipelineBytes + 2 * kStages * 8;
  static constexpr int kSharedBytes = kPartsBarrier + 8;

  // Where split `part` of the sum starts to finish it, in pairs of 8 tokens.
  template <int kPart>
  static constexpr int kPartBegin = kPart * (kTokens / 16) / kSplitK;
  static constexpr int kMaxPairs = (kTokens / 16 + kSplitK - 1) / kSplitK;
  static constexpr int kPartBytes = kMaxPairs * 2 * kGroups * 128 * 16;
  static constexpr int kPartsBytes = (kSplitK - 1) * kPartBytes;

  static constexpr int kOutColumns = kGated ? 32 : 64;   // of a warpgroup
  static constexpr int kStagingPitch = kOutColumns + 8;  // elements; keeps banks apart
  static constexpr int kStagingBytes = 16 * kMaxPairs * kStagingPitch * 2;
  static_assert(kPartsBytes + kGroups * kStagingBytes <= kPipelineBytes,
                "the end reuses the pipeline's memory");
  static_assert(kSharedBytes <= 232448, "shared memory of an sm_90 CTA");
  static_assert(kTokens % 16 == 0, "whole matrices and swizzle groups");
  static_assert(kCluster <= 8, "CTAs of a cluster, on every GPU of the architecture");
  static_assert(kMulticast == 1 || kUse != GemmUse::kSwiglu, "its map of gates and ups has whole tiles");
  static_assert(kProducer || kSources == 1, "a consumer that waited for others would hold up its own");
  static_assert(!kRotated || kSplitK == 1 || kTokens / kSplitK % 32 == 0,
                "heads are written by the CTA that has their whole sums, in turns of 32 tokens");

  static constexpr int kProducerRegisters = kGroups == 3 ? 32 : 40;
  static constexpr int kConsumerRegisters = kGroups == 3 ? 160 : 232;
};

}  // namespace bbk
