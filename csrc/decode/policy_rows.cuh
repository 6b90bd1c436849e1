// A request's rows while a group works on them: what is read, what the rules ask about their tokens, how
// their windows move.
#pragma once

#include <cstring>

#include "common/group.cuh"
#include "decode/policy.h"

namespace bbk {

// What the rules ask about the tokens of a row; gen_length where there is none.
struct RowScan {
  int32_t first_eos;
  int32_t first_mask;
  int32_t first_open;  // first MASK from window_start on
  int32_t window_eos;  // first EOS from window_start on
};

// A branch while its request is worked on.
struct BranchRow {
  int32_t block_size;
  int32_t window_start;
  int32_t window_end;
  int32_t decoded;
  int32_t progress;
  int32_t blocks_since_refresh;
  int32_t steps_in_block;
  int32_t committed;
  int32_t merged;
  int32_t synced;
  int32_t needs_refresh;
  int32_t done;
  RowScan scan;
  RowScan rescan;  // after merging
  // Whether the row can end its request, and how it ranks among those that can.
  int32_t can_finish;
  float score;
  int32_t source_row;  // row whose predictions it takes in this forward, then in the next; -1: none
  int32_t query_start;
  int32_t query_end;
  int32_t committed_now;
  int32_t merged_now;
  unsigned long long best;  // order_key and the position of the highest candidate, see best_key; 0: none
  int32_t first_unsure;     // first candidate below the threshold; gen_length: none, or nobody asks
  // Of the rule for Dream: see BranchState; the first MASK before the first EOS or, without one, what stands
  // behind that; the highest candidate, an EOS or not, as `best`.
  int32_t moved_since_refresh;
  int32_t frontier;
  unsigned long long best_of_all;
  uint32_t allowed;    // branches that stand behind this one in the order of the merge
  uint32_t differing;  // of them (or of the earlier ones, at a refresh), those that hold other tokens
};

struct RequestScratch {
  BranchRow rows[kMaxBranches];
  int32_t phase;
  int32_t prompt_length;
  int32_t predictions;
  // Of the branch that drafts are made for.
  int32_t masks;           // of its window
  int32_t first_eos_rank;  // of a predicted EOS among them, by falling confidence
};

// What the threads of a group all know.
struct Outcome {
  bool finished;
  int32_t winner;
  int32_t stop_reason;
};

struct Request {
  int64_t index;
  int64_t first_row;
  int64_t first_position;  // first_row * gen_length
};

BBK_HD Request request_at(const PolicyParams& params, int64_t index) {
  const int64_t first_row = index * params.num_branches;
  return Request{index, first_row, first_row * params.gen_length};
}

// Whether steps_per_block says how much is committed, instead of a threshold.
BBK_HD bool is_scheduled(const PolicySettings& settings) { return !settings.threshold.given; }

BBK_HD bool is_eos(const PolicySettings& settings, int32_t token) {
  bool found = false;
  for (int i = 0; i < settings.eos_token_ids.count; ++i) found |= token == settings.eos_token_ids.ids[i];
  return found;
}

// Larger floats have larger keys, equal ones (0 and -0) the same, and NaN stands above all, as torch orders
// them. Never 0.
BBK_HD uint32_t order_key(float value) {
  if (value != value) return 0xFFFFFFFFu;
  value += 0.0f;
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Infinity and NaN alone leave something when they are taken from themselves.
BBK_HD bool is_finite(float value) { return value - value == 0.0f; }

BBK_HD bool is_open(const BranchRow& row) { return row.scan.first_open < row.window_end; }

BBK_HD RowScan empty_scan(int gen_length) { return RowScan{gen_length, gen_length, gen_length, gen_length}; }

BBK_HD void note_token(const PolicySettings& settings, int32_t token, int position, int window_start,
                       RowScan* scan) {
  if (token == settings.mask_token_id) {
    scan->first_mask = smaller(scan->first_mask, position);
    if (position >= window_start) scan->first_open = smaller(scan->first_open, position);
  }
  if (is_eos(settings, token)) {
    scan->first_eos = smaller(scan->first_eos, position);
    if (position >= window_start) scan->window_eos = smaller(scan->window_eos, position);
  }
}

// One team: adds what its lanes noted to the scan of the row.
BBK_HD void add_scan(const Group& group, const RowScan& noted, RowScan* scan) {
  const int first_eos = group.team_min(noted.first_eos), first_mask = group.team_min(noted.first_mask);
  const int first_open = group.team_min(noted.first_open), window_eos = group.team_min(noted.window_eos);
  if (group.lane() != 0) return;
  group.lower_to(&scan->first_eos, first_eos);
  group.lower_to(&scan->first_mask, first_mask);
  group.lower_to(&scan->first_open, first_open);
  group.lower_to(&scan->window_eos, window_eos);
}

// With the prefix exit a branch works only on what stands before its first EOS.
BBK_HD void clip_window(const PolicyParams& params, BranchRow* row) {
  if (params.settings.eos_exit == kEosPrefix) row->window_end = smaller(row->window_end, row->scan.first_eos);
}

// Puts the window on the block of the first open MASK; without one, the row is done.
BBK_HD void move_window(const PolicyParams& params, BranchRow* row) {
  const int limit = params.settings.eos_exit == kEosPrefix ? row->scan.first_eos : params.gen_length;
  if (row->scan.first_mask >= limit) {
    row->window_start = row->window_end = params.gen_length;
    row->done = 1;
  } else {
    row->window_start = row->scan.first_mask - row->scan.first_mask % row->block_size;
    row->window_end = smaller(row->window_start + row->block_size, limit);
  }
  row->progress = row->window_start;
  row->steps_in_block = 0;
  // A done row's window is empty; any other starts with the block of the first MASK.
  row->scan.first_open = row->done ? params.gen_length : row->scan.first_mask;
}

BBK_HD void advance(const PolicyParams& params, BranchRow* row) {
  move_window(params, row);
  if (row->done) return;
  row->blocks_since_refresh += 1;
  const int64_t tokens = static_cast<int64_t>(row->blocks_since_refresh) * row->block_size;
  const Optional<int64_t>& interval = params.settings.refresh_interval;
  if (interval.given && tokens >= interval.value) row->needs_refresh = 1;
}

// What the rules find out about a row and its predictions.
BBK_HD void start_round(const PolicyParams& params, BranchRow* row) {
  row->scan = row->rescan = empty_scan(params.gen_length);
  row->can_finish = 0;
  row->committed_now = row->merged_now = 0;
  row->best = 0;
  row->first_unsure = params.gen_length;
  row->allowed = row->differing = 0;
}

BBK_HD void load_row(const PolicyParams& params, int64_t r, BranchRow* row) {
  const BranchStateView& state = params.state;
  row->block_size = state.block_size[r];
  row->window_start = state.window_start[r];
  row->window_end = state.window_end[r];
  row->decoded = state.decoded[r];
  row->progress = state.progress[r];
  row->blocks_since_refresh = state.blocks_since_refresh[r];
  row->steps_in_block = state.steps_in_block[r];
  row->committed = state.committed[r];
  row->merged = state.merged[r];
  row->synced = state.synced[r];
  row->needs_refresh = state.needs_refresh[r];
  row->done = state.done[r];
  row->source_row = params.source_row[r];
  start_round(params, row);
}

BBK_HD void fill_with_zeros(const Group& group, uint8_t* bytes, int64_t count) {
  int64_t done = 0;
#if defined(__CUDA_ARCH__)
  if (reinterpret_cast<uintptr_t>(bytes) % sizeof(uint4) == 0) {
    const int64_t vectors = count / static_cast<int64_t>(sizeof(uint4));
    for (int64_t i = group.rank(); i < vectors; i += group.size()) {
      reinterpret_cast<uint4*>(bytes)[i] = uint4{0, 0, 0, 0};
    }
    done = vectors * static_cast<int64_t>(sizeof(uint4));
  }
#endif
  for (int64_t i = done + group.rank(); i < count; i += group.size()) bytes[i] = 0;
}

// Group: reads the rows, brings the predictions to their positions and empties the events.
BBK_HD void load_request(const Group& group, const PolicyParams& params, const Request& request,
                         RequestScratch* scratch) {
  const PredictionsView& predictions = params.predictions;
  const int64_t positions = static_cast<int64_t>(params.num_branches) * params.gen_length;
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    load_row(params, request.first_row + n, &scratch->rows[n]);
  }
  if (group.rank() == 0) {
    scratch->phase = params.flags[1];
    scratch->prompt_length = params.state.prompt_length[request.index];
    scratch->predictions = 0;
  }
  for (int64_t i = group.rank(); i < params.num_predictions; i += group.size()) {
    const int64_t target = predictions.target[i];
    const int32_t top_token = predictions.top_token[i];
    const float confidence = predictions.confidence[i];
    const int64_t position = target - request.first_position;
    if (target < 0 || position < 0 || position >= positions) continue;
    params.state.top_token[target] = top_token;
    params.state.confidence[target] = confidence;
    if (!is_finite(confidence)) group.add(&params.state.non_finite[request.index], 1);
  }
  fill_with_zeros(group, params.events.committed + request.first_position, positions);
  fill_with_zeros(group, params.events.merged + request.first_position, positions);
}

BBK_HD void store_request(const Group& group, const PolicyParams& params, const Request& request,
                          const RequestScratch& scratch, const Outcome& outcome, uint32_t trailing,
                          int leader) {
  const BranchStateView& state = params.state;
  bool took_part = false;
  for (int n = 0; n < params.num_branches; ++n) took_part |= scratch.rows[n].source_row >= 0;
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    const int64_t r = request.first_row + n;
    const BranchRow& row = scratch.rows[n];
    state.window_start[r] = row.window_start;
    state.window_end[r] = row.window_end;
    state.decoded[r] = row.decoded;
    state.progress[r] = row.progress;
    state.blocks_since_refresh[r] = row.blocks_since_refresh;
    state.steps_in_block[r] = row.steps_in_block;
    state.committed[r] = row.committed;
    state.merged[r] = row.merged;
    state.synced[r] = row.synced;
    state.needs_refresh[r] = static_cast<uint8_t>(row.needs_refresh);
    state.done[r] = static_cast<uint8_t>(row.done);
    params.events.sync_source[r] = static_cast<int32_t>(request.first_row + (trailing >> n & 1 ? leader : n));
  }
  if (group.rank() == 0) {
    const int phase = scratch.phase;
    if (took_part && phase >= kPhaseInit && phase <= kPhaseRefresh) state.nfe[request.index * 3 + phase] += 1;
    state.finished[request.index] = outcome.finished;
    state.winner[request.index] = outcome.winner;
    state.stop_reason[request.index] = outcome.stop_reason;
  }
}

}  // namespace bbk
