// What happens between two forwards (commit, EOS check, advance, merge, sync, next plan), in one launch for
// one request and in two for several. The arguments are the tensors of blockbatch_kernels/structs.py; row r
// is branch r % num_branches of request r / num_branches.
#pragma once

#include "common/params.h"
#include "decode/records.h"

namespace bbk {

constexpr int kMaxBranches = 32;
constexpr int kMaxEosTokens = 32;
constexpr int kMaxDrafts = kMaxBranches - 1;

// In the order of blockbatch_kernels.structs.
enum Phase : int32_t { kPhaseInit = 0, kPhaseBlock = 1, kPhaseRefresh = 2 };
enum StopReason : int32_t { kRunning = 0, kStopEos = 1, kStopLength = 2 };

#define BBK_EOS_EXITS(X) X(kEosPrefix, "prefix") X(kEosWindow, "window") X(kEosNone, "none")
BBK_ENUM(EosExit, BBK_EOS_EXITS)

#define BBK_QUERY_SPANS(X) \
  X(kSpanWindow, "window") X(kSpanSuffix, "suffix") X(kSpanCanvas, "canvas") X(kSpanOpen, "open")
BBK_ENUM(QuerySpan, BBK_QUERY_SPANS)

#define BBK_REFRESH_SCOPES(X) X(kScopeCanvas, "canvas") X(kScopeGeneration, "generation")
BBK_ENUM(RefreshScope, BBK_REFRESH_SCOPES)

#define BBK_POLICIES(X) X(kLladaPublished, "llada_published") X(kDreamPublished, "dream_published")
BBK_ENUM(Policy, BBK_POLICIES)

// Tokens above this probability are likely; of what adds up to 1 at most so many can be.
constexpr float kLeastLikely = 0.2f;
constexpr int kNumLikely = 4;

struct TokenIds {
  static constexpr int kMost = kMaxEosTokens;
  int32_t count;
  int32_t ids[kMost];
};

struct DraftLengths {
  static constexpr int kMost = kMaxDrafts;
  int32_t count;
  int32_t ids[kMost];
};

// blockbatch_kernels.structs.PolicyParams, whose docstring says what they mean: a line here is all that a new
// option needs to reach the kernels.
#define BBK_POLICY_SETTINGS(X)           \
  X(int32_t, mask_token_id)              \
  X(TokenIds, eos_token_ids)             \
  X(Optional<float>, threshold)          \
  X(Optional<int32_t>, steps_per_block)  \
  X(int32_t, leap_radius)                \
  X(float, leap_threshold)               \
  X(Optional<float>, tail_threshold)     \
  X(float, merge_threshold)              \
  X(int64_t, sync_threshold)             \
  X(Optional<int64_t>, refresh_interval) \
  X(EosExit, eos_exit)                   \
  X(QuerySpan, query_span)               \
  X(RefreshScope, refresh_scope)         \
  X(int32_t, prediction_offset)          \
  X(DraftLengths, drafts)                \
  X(Policy, policy)

struct PolicySettings {
  BBK_POLICY_SETTINGS(BBK_MEMBER)
};

struct PolicyParams {
  BranchStateView state;
  PolicySettings settings;
  PredictionsView predictions;
  int64_t num_predictions;
  const int32_t* source_row;  // of the plan whose forward this was
  const int32_t* flags;
  StepPlanView out_plan;  // may be that very plan
  PolicyEventsView events;
  int32_t* counters;  // [5] scratch
  int64_t num_requests;
  int32_t num_branches;
  int32_t gen_length;
  int32_t map_entries;  // of a line of the state's map; 0 without the policy that keeps one
};

constexpr int kNumCounters = 5;

// device = -1 in `launch`: the tensors are in host memory and the calling thread does the work.
void decode_policy(const PolicyParams& params, const Launch& launch);

// Reads state, settings, counters and sizes alone.
void initial_plan(const PolicyParams& params, const Launch& launch);

}  // namespace bbk
