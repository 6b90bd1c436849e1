// A request's rows while a group works on them: what is read, what the rules ask about their tokens, how
// their windows move.
#pragma once

#include <cstring>

#include "group.cuh"
#include "policy.h"

namespace bbk {

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
  // From the latest scan of its tokens; gen_length where there is none.
  int32_t first_eos;
  int32_t first_mask;
  int32_t first_open;  // first MASK from window_start on
  int32_t window_eos;  // first EOS from window_start on
  // Whether the row can end its request, and how it ranks among those that can.
  int32_t can_finish;
  float score;
  int32_t source_row;  // row whose predictions it takes in this forward, then in the next; -1: none
  int32_t query_start;
  int32_t query_end;
  int32_t merged_now;
  uint32_t allowed;    // branches that stand behind this one in the order of the merge
  uint32_t differing;  // of them (or of the earlier ones, at a refresh), those that hold other tokens
};

struct RequestScratch {
  BranchRow rows[kMaxBranches];
  int32_t phase;
  int32_t predictions;
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

BBK_HD bool is_eos(const PolicySettings& settings, int32_t token) {
  bool found = false;
  for (int i = 0; i < settings.num_eos; ++i) found |= token == settings.eos_token_ids[i];
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

BBK_HD bool is_open(const BranchRow& row) { return row.first_open < row.window_end; }

// Group: calls visit(position, valid) so that the lanes of a team stand at neighbouring positions and all of
// them come, valid or not.
template <typename Visit>
BBK_HD void for_each_position(const Group& group, int gen_length, Visit&& visit) {
  for (int base = group.team() * group.num_lanes(); base < gen_length; base += group.size()) {
    const int position = base + group.lane();
    visit(position, position < gen_length);
  }
}

// One team: everything that the rules ask about the tokens of a row. Lane 0 writes it.
BBK_HD void scan_row(const Group& group, const PolicyParams& params, const int32_t* tokens, BranchRow* row) {
  const int gen_length = params.gen_length;
  const int window_start = row->window_start;
  int first_eos = gen_length, first_mask = gen_length, first_open = gen_length, window_eos = gen_length;
  for (int p = group.lane(); p < gen_length; p += group.num_lanes()) {
    const int32_t token = tokens[p];
    if (token == params.settings.mask_token_id) {
      first_mask = smaller(first_mask, p);
      if (p >= window_start) first_open = smaller(first_open, p);
    }
    if (is_eos(params.settings, token)) {
      first_eos = smaller(first_eos, p);
      if (p >= window_start) window_eos = smaller(window_eos, p);
    }
  }
  first_eos = group.team_min(first_eos);
  first_mask = group.team_min(first_mask);
  first_open = group.team_min(first_open);
  window_eos = group.team_min(window_eos);
  group.team_sync();
  if (group.lane() == 0) {
    row->first_eos = first_eos;
    row->first_mask = first_mask;
    row->first_open = first_open;
    row->window_eos = window_eos;
  }
}

// With the prefix exit a branch works only on what stands before its first EOS.
BBK_HD void clip_window(const PolicyParams& params, BranchRow* row) {
  if (params.settings.eos_exit == kEosPrefix) row->window_end = smaller(row->window_end, row->first_eos);
}

// Puts the window on the block of the first open MASK; without one, the row is done.
BBK_HD void move_window(const PolicyParams& params, BranchRow* row) {
  const int limit = params.settings.eos_exit == kEosPrefix ? row->first_eos : params.gen_length;
  if (row->first_mask >= limit) {
    row->window_start = row->window_end = params.gen_length;
    row->done = 1;
  } else {
    row->window_start = row->first_mask - row->first_mask % row->block_size;
    row->window_end = smaller(row->window_start + row->block_size, limit);
  }
  row->progress = row->window_start;
  row->steps_in_block = 0;
  // No MASK stands before the new window; one behind a done row's first EOS is before its window, too.
  row->first_open = row->done ? params.gen_length : row->first_mask;
}

BBK_HD void advance(const PolicyParams& params, BranchRow* row) {
  move_window(params, row);
  if (row->done) return;
  row->blocks_since_refresh += 1;
  const int64_t tokens = static_cast<int64_t>(row->blocks_since_refresh) * row->block_size;
  if (tokens >= params.settings.refresh_interval) row->needs_refresh = 1;
}

// Group: reads the rows and brings the predictions to their positions.
BBK_HD void load_request(const Group& group, const PolicyParams& params, const Request& request,
                         RequestScratch* scratch) {
  const BranchStateView& state = params.state;
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    const int64_t r = request.first_row + n;
    BranchRow& row = scratch->rows[n];
    row.block_size = state.block_size[r];
    row.window_start = state.window_start[r];
    row.window_end = state.window_end[r];
    row.decoded = state.decoded[r];
    row.progress = state.progress[r];
    row.blocks_since_refresh = state.blocks_since_refresh[r];
    row.steps_in_block = state.steps_in_block[r];
    row.committed = state.committed[r];
    row.merged = state.merged[r];
    row.synced = state.synced[r];
    row.needs_refresh = state.needs_refresh[r];
    row.done = state.done[r];
    row.source_row = params.source_row[r];
    row.can_finish = 0;
    row.merged_now = 0;
    row.allowed = 0;
    row.differing = 0;
  }
  if (group.rank() == 0) {
    scratch->phase = params.flags[1];
    scratch->predictions = 0;
  }
  const PredictionsView& predictions = params.predictions;
  const int64_t positions = static_cast<int64_t>(params.num_branches) * params.gen_length;
  for (int64_t i = group.rank(); i < predictions.size; i += group.size()) {
    const int64_t position = predictions.target[i] - request.first_position;
    if (predictions.target[i] < 0 || position < 0 || position >= positions) continue;
    state.top_token[request.first_position + position] = predictions.top_token[i];
    state.confidence[request.first_position + position] = predictions.confidence[i];
  }
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
