// What happens between two forwards (commit, EOS check, advance, merge, sync, next plan), in one launch for
// one request and in two for several. The arguments are the tensors of blockbatch_kernels/structs.py; row r
// is branch r % num_branches of request r / num_branches.
#pragma once

#include "common/params.h"

namespace bbk {

constexpr int kMaxBranches = 32;
constexpr int kMaxEosTokens = 32;

// In the order of blockbatch_kernels.structs.
enum Phase : int32_t { kPhaseInit = 0, kPhaseBlock = 1, kPhaseRefresh = 2 };
enum StopReason : int32_t { kRunning = 0, kStopEos = 1, kStopLength = 2 };
enum EosExit : int32_t { kEosPrefix = 0, kEosWindow = 1, kEosNone = 2 };
enum QuerySpan : int32_t { kSpanWindow = 0, kSpanSuffix = 1, kSpanCanvas = 2 };

// R rows, Q requests, G generated positions; bool tensors as bytes of 0 and 1.
struct BranchStateView {
  const int32_t* prompt_length;  // [Q]
  const int32_t* block_size;     // [R]
  int32_t* tokens;               // [R, G]
  int32_t* window_start;         // [R], and so on
  int32_t* window_end;
  int32_t* decoded;
  int32_t* progress;
  int32_t* blocks_since_refresh;
  int32_t* steps_in_block;
  uint8_t* needs_refresh;
  uint8_t* done;
  int32_t* top_token;    // [R, G]
  float* confidence;     // [R, G]
  int32_t* committed;    // [R]
  int32_t* merged;       // [R]
  int32_t* synced;       // [R]
  int32_t* nfe;          // [Q, 3]
  uint8_t* finished;     // [Q]
  int32_t* winner;       // [Q]
  int32_t* stop_reason;  // [Q]
};

struct PolicySettings {
  int32_t mask_token_id;
  int32_t num_eos;
  int32_t eos_token_ids[kMaxEosTokens];
  bool scheduled;  // steps_per_block decides instead of threshold
  int32_t steps_per_block;
  float threshold;
  bool has_tail;
  float tail_threshold;  // behind the first candidate below `threshold`
  int32_t leap_radius;
  float leap_threshold;
  float merge_threshold;
  int64_t sync_threshold;
  int64_t refresh_interval;  // the largest integer: never
  EosExit eos_exit;
  QuerySpan query_span;
  int32_t prediction_offset;
};

struct PredictionsView {
  const int64_t* target;  // [size]
  const int32_t* top_token;
  const float* confidence;
  const float* probe_probability;  // nullptr: none
  int64_t size;
};

struct StepPlanView {
  int32_t* query_start;  // [R]
  int32_t* query_end;    // [R]
  int32_t* source_row;   // [R]
  uint8_t* predict;      // [R, G]
  int32_t* flags;        // [5]
};

struct PolicyEventsView {
  uint8_t* committed;    // [R, G]
  uint8_t* merged;       // [R, G]
  int32_t* sync_source;  // [R]
};

struct PolicyParams {
  BranchStateView state;
  PolicySettings settings;
  PredictionsView predictions;
  const int32_t* source_row;  // of the plan whose forward this was
  const int32_t* flags;
  StepPlanView out_plan;  // may be that very plan
  PolicyEventsView events;
  int32_t* counters;  // [5] scratch
  int64_t num_requests;
  int32_t num_branches;
  int32_t gen_length;
};

constexpr int kNumCounters = 5;

// device = -1 in `launch`: the tensors are in host memory and the calling thread does the work.
void decode_policy(const PolicyParams& params, const Launch& launch);

// Reads state, settings, counters and sizes alone.
void initial_plan(const PolicyParams& params, const Launch& launch);

}  // namespace bbk
