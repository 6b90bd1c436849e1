// The policy of one request, executed by one group. blockbatch_kernels/reference/policy.py fixes the results
// bit for bit; here the passes over [branches, positions] are joined: whatever the rules ask about a row (its
// first EOS, its first MASK, whether its window is open) comes from one scan after each change of its tokens.
#pragma once

#include "decode/policy_commit.cuh"
#include "decode/policy_merge.cuh"

namespace bbk {

// Group: the trailing rows take over the leader's tokens and move to their own blocks. The leader is none of
// them, or takes over from itself.
BBK_HD void sync_rows(const Group& group, const PolicyParams& params, const Request& request, int leader,
                      uint32_t trailing, int32_t* tokens, BranchRow* rows) {
  const int64_t gen_length = params.gen_length;
  int32_t* cached_token = params.state.cached_token + request.first_position;
  for (uint32_t left = trailing; left != 0; left &= left - 1) {
    const int64_t to = lowest_bit(left) * gen_length, from = leader * gen_length;
    for (int p = group.rank(); p < params.gen_length; p += group.size()) {
      tokens[to + p] = tokens[from + p];
      // Goes with the K/V of the leader.
      if (params.settings.query_span == kSpanOpen) cached_token[to + p] = cached_token[from + p];
    }
  }
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    if ((trailing >> n & 1) == 0) continue;
    rows[n].decoded = rows[leader].decoded;
    rows[n].done = rows[leader].done;
    rows[n].scan = rows[leader].scan;
    move_window(params, &rows[n]);
    rows[n].synced += 1;
  }
}

// Rows that take over the state of another.
struct Sync {
  uint32_t trailing;
  int leader;
};

// Group: the rules for a request whose rows are loaded, from its predictions to its outcome, which is known
// to every thread.
BBK_HD Sync apply_rules(const Group& group, const PolicyParams& params, const Request& request,
                        int32_t* tokens, Outcome* outcome_so_far, RequestScratch* scratch) {
  const PolicySettings& settings = params.settings;
  BranchRow* rows = scratch->rows;
  Outcome& outcome = *outcome_so_far;
  const bool is_refresh = scratch->phase == kPhaseRefresh;

  commit_request(group, params, request, tokens, outcome, scratch);
  finish(params, rows, kStopEos, &outcome);
  group.sync();

  // A refresh only commits; the rest waits for the next block denoise.
  const bool goes_on = !outcome.finished && !is_refresh;
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    if (goes_on && !rows[n].done && !is_open(rows[n])) advance(params, &rows[n]);
  }
  group.sync();

  bool possible = false;
  for (int n = 0; goes_on && n < params.num_branches; ++n) possible |= rows[n].decoded > 0;
  if (possible) {
    order_merge(group, params, rows);
    group.sync();
    find_conflicts(group, params, tokens, rows);
    group.sync();
    merge(group, params, request, tokens, rows);
    group.sync();
  }
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    BranchRow& row = rows[n];
    if (row.merged_now > 0) row.scan = row.rescan;
    row.merged += row.merged_now;
    clip_window(params, &row);
    if (goes_on && !row.done && !is_open(row)) advance(params, &row);
    row.can_finish = 0;
    if (settings.eos_exit == kEosPrefix) {
      rate_prefix(params, params.state.confidence + (request.first_row + n) * params.gen_length, &row);
    }
  }
  group.sync();
  finish(params, rows, kStopEos, &outcome);

  int leader = 0;
  for (int n = 1; n < params.num_branches; ++n) leader = rows[n].decoded > rows[leader].decoded ? n : leader;
  uint32_t trailing = 0;
  for (int n = 0; !outcome.finished && !is_refresh && n < params.num_branches; ++n) {
    const int64_t behind = static_cast<int64_t>(rows[leader].decoded) - rows[n].decoded;
    if (!rows[n].done && behind > settings.sync_threshold) trailing |= 1u << n;
  }
  group.sync();
  if (trailing != 0) {
    sync_rows(group, params, request, leader, trailing, tokens, rows);
    group.sync();
  }

  bool all_done = true;
  for (int n = 0; n < params.num_branches; ++n) all_done &= rows[n].done != 0;
  if (all_done && !outcome.finished) {
    // Without an open branch the most advanced one wins.
    int most = 0;
    for (int n = 1; n < params.num_branches; ++n) most = rows[n].progress > rows[most].progress ? n : most;
    outcome = Outcome{true, most, kStopLength};
  }
  return Sync{trailing, leader};
}

BBK_HD Outcome outcome_before(const PolicyParams& params, int64_t index) {
  const BranchStateView& state = params.state;
  return Outcome{state.finished[index] != 0, state.winner[index], state.stop_reason[index]};
}

// Group: everything after a forward of one request. `tokens` [branches, G] is the request's part of the state
// or a copy of it nearer by; the caller brings it there and back. The scratch keeps the rows for the next
// plan. Returns the outcome to every thread.
BBK_HD Outcome policy_request(const Group& group, const PolicyParams& params, int64_t index, int32_t* tokens,
                              RequestScratch* scratch) {
  const Request request = request_at(params, index);
  Outcome outcome = outcome_before(params, index);
  load_request(group, params, request, scratch);
  group.sync();
  const Sync sync = apply_rules(group, params, request, tokens, &outcome, scratch);
  store_request(group, params, request, *scratch, outcome, sync.trailing, sync.leader);
  group.sync();
  return outcome;
}

}  // namespace bbk
