// The rule that BlockBatch's authors published for Dream, for one request and executed by one group.
// blockbatch_kernels/reference/dream_policy.py fixes the results bit for bit. Windows, `decoded` and `done`
// follow from the tokens and are found anew after every change of them.
#pragma once

#include "decode/policy.cuh"
#include "decode/policy_dream_map.cuh"

namespace bbk {

// A type of its own, for kernels of its own.
struct DreamParams {
  PolicyParams all;
};

// A token is merged from this probability on.
constexpr float kTaken = 0.5f;

BBK_HD bool ends_text(const PolicySettings& settings, int32_t token) {
  return settings.eos_exit == kEosPrefix && is_eos(settings, token);
}

// Group: looks at all tokens and brings the rows up to date. `advances`: tokens that the first MASK has
// moved over count.
BBK_HD void realign(const Group& group, const PolicyParams& params, const int32_t* tokens, bool advances,
                    BranchRow* rows) {
  const PolicySettings& settings = params.settings;
  const int gen_length = params.gen_length;
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    rows[n].scan = empty_scan(gen_length);
    rows[n].decoded = 0;
  }
  group.sync();
  for_each_stretch(group, params.num_branches, gen_length, [&](int n, int first, int behind) {
    int first_eos = gen_length, first_mask = gen_length;
    for (int p = first + group.lane(); p < behind; p += group.num_lanes()) {
      const int32_t token = tokens[static_cast<int64_t>(n) * gen_length + p];
      if (token == settings.mask_token_id) first_mask = smaller(first_mask, p);
      if (ends_text(settings, token)) first_eos = smaller(first_eos, p);
    }
    first_eos = group.team_min(first_eos);
    first_mask = group.team_min(first_mask);
    if (group.lane() != 0) return;
    group.lower_to(&rows[n].scan.first_eos, first_eos);
    group.lower_to(&rows[n].scan.first_mask, first_mask);
  });
  group.sync();
  for_each_stretch(group, params.num_branches, gen_length, [&](int n, int first, int behind) {
    int held = 0;
    for (int p = first + group.lane(); p < behind && p <= rows[n].scan.first_eos; p += group.num_lanes()) {
      held += tokens[static_cast<int64_t>(n) * gen_length + p] != settings.mask_token_id;
    }
    held = group.team_sum(held);
    if (group.lane() == 0 && held > 0) group.add(&rows[n].decoded, held);
  });
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    BranchRow& row = rows[n];
    const int first_mask = row.scan.first_mask, first_eos = row.scan.first_eos, before = row.frontier;
    row.done = first_mask >= first_eos;
    row.frontier = row.done ? smaller(first_eos + 1, gen_length) : first_mask;
    row.window_start = row.done ? gen_length : first_mask - first_mask % row.block_size;
    row.window_end = row.done ? gen_length : smaller(row.window_start + row.block_size, first_eos);
    row.progress = row.window_start;
    row.scan.first_open = row.done ? gen_length : first_mask;
    if (advances) row.moved_since_refresh += larger(row.frontier - before, 0);
  }
  group.sync();
}

// Ends the request with a branch that holds an EOS and no MASK before it: the one that holds most, which is
// the one of the latest EOS. Else with a branch that holds no MASK. The last, and so largest, on a tie.
BBK_HD void finish_dream(const PolicyParams& params, const BranchRow* rows, Outcome* outcome) {
  if (outcome->finished) return;
  int ready = -1, complete = -1;
  for (int n = 0; n < params.num_branches; ++n) {
    const bool is_ready = rows[n].done && rows[n].scan.first_eos < params.gen_length;
    if (is_ready && (ready < 0 || rows[n].decoded >= rows[ready].decoded)) ready = n;
    if (rows[n].scan.first_mask == params.gen_length) complete = n;
  }
  if (ready >= 0) {
    *outcome = Outcome{true, ready, kStopEos};
  } else if (complete >= 0) {
    *outcome = Outcome{true, complete, kStopLength};
  }
}

// Group: rows that others computed for take over their predictions.
BBK_HD void take_predictions(const Group& group, const PolicyParams& params, const Request& request,
                             const BranchRow* rows) {
  const int64_t gen_length = params.gen_length, num_rows = params.num_requests * params.num_branches;
  for_each_stretch(group, params.num_branches, params.gen_length, [&](int n, int first, int behind) {
    const int64_t r = request.first_row + n, source = rows[n].source_row;
    if (source < 0 || source == r || source >= num_rows) return;
    for (int p = first + group.lane(); p < behind; p += group.num_lanes()) {
      params.state.top_token[r * gen_length + p] = params.state.top_token[source * gen_length + p];
      params.state.confidence[r * gen_length + p] = params.state.confidence[source * gen_length + p];
    }
  });
}

BBK_HD Candidates dream_candidates(const PolicyParams& params, const BranchRow& row, int n, int64_t r,
                                   const int32_t* tokens) {
  const int64_t gen_length = params.gen_length;
  return candidates_of(params, row, tokens + n * gen_length, params.state.confidence + r * gen_length);
}

// Group: after a full forward one token, the first MASK's, whatever its confidence. The map is emptied.
BBK_HD void commit_first(const Group& group, const PolicyParams& params, const Request& request,
                         uint32_t forwarded, int32_t* tokens, BranchRow* rows) {
  const int64_t gen_length = params.gen_length;
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    if ((forwarded >> n & 1) == 0) continue;
    const int64_t position = request.first_position + n * gen_length + rows[n].scan.first_mask;
    tokens[n * gen_length + rows[n].scan.first_mask] = params.state.top_token[position];
    params.events.committed[position] = 1;
    rows[n].committed_now = 1;
  }
  for_each_stretch(group, params.num_branches, params.gen_length, [&](int n, int first, int behind) {
    if ((forwarded >> n & 1) == 0) return;
    for (int p = first + group.lane(); p < behind; p += group.num_lanes()) {
      empty_line(params, (request.first_row + n) * gen_length + p);
    }
  });
  group.sync();
}

// Group: counts the candidates that reach the threshold, finds the highest ones, and notes what is likely.
BBK_HD void look_at_candidates(const Group& group, const PolicyParams& params, const Request& request,
                               uint32_t forwarded, const int32_t* tokens, BranchRow* rows) {
  const int64_t gen_length = params.gen_length;
  for_each_stretch(group, params.num_branches, params.gen_length, [&](int n, int first, int behind) {
    const int64_t r = request.first_row + n;
    const Candidates candidates = dream_candidates(params, rows[n], n, r, tokens);
    const int start = larger(first, candidates.start), end = smaller(behind, candidates.end);
    if ((forwarded >> n & 1) == 0 || start >= end) return;
    const int32_t* top_token = params.state.top_token + r * gen_length;
    int sure = 0;
    unsigned long long best = 0, best_of_all = 0;
    for (int p = first + group.lane(); p < end; p += group.num_lanes()) {
      if (p < start || !candidates.holds(p)) continue;
      const float confidence = candidates.confidence[p];
      sure += confidence >= params.settings.threshold.value;
      const unsigned long long key = best_key(order_key(confidence), p);
      best_of_all = larger(best_of_all, key);
      if (!ends_text(params.settings, top_token[p])) best = larger(best, key);
    }
    if (best_of_all == 0) return;
    if (sure > 0) group.add(&rows[n].committed_now, sure);
    group.raise_to(&rows[n].best_of_all, best_of_all);
    if (best != 0) group.raise_to(&rows[n].best, best);
  });
  const PredictionsView& predictions = params.predictions;
  for (int64_t i = group.rank(); i < params.num_predictions; i += group.size()) {
    const int64_t position = predictions.target[i] - request.first_position;
    if (predictions.target[i] < 0 || position < 0 || position >= params.num_branches * gen_length) continue;
    const int n = static_cast<int>(position / gen_length), p = static_cast<int>(position % gen_length);
    if ((forwarded >> n & 1) == 0 || tokens[position] != params.settings.mask_token_id) continue;
    if (p >= rows[n].window_start && p < rows[n].window_end) store_likely(params, predictions.target[i], i);
  }
  group.sync();
}

// Group: writes what reaches the threshold; where nothing does, the highest of those that are no EOS.
BBK_HD void commit_candidates(const Group& group, const PolicyParams& params, const Request& request,
                              uint32_t forwarded, int32_t* tokens, BranchRow* rows) {
  const int64_t gen_length = params.gen_length;
  for_each_stretch(group, params.num_branches, params.gen_length, [&](int n, int first, int behind) {
    const int64_t r = request.first_row + n;
    if ((forwarded >> n & 1) == 0) return;
    const Candidates candidates = dream_candidates(params, rows[n], n, r, tokens);
    const bool any_sure = rows[n].committed_now > 0;
    const int best = best_position(rows[n].best != 0 ? rows[n].best : rows[n].best_of_all);
    for (int p = first + group.lane(); p < behind; p += group.num_lanes()) {
      if (p < candidates.start || p >= candidates.end || !candidates.holds(p)) continue;
      if (any_sure ? !(candidates.confidence[p] >= params.settings.threshold.value) : p != best) continue;
      params.events.committed[r * gen_length + p] = 1;
      tokens[n * gen_length + p] = params.state.top_token[r * gen_length + p];
    }
  });
  group.sync();
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    if (rows[n].committed_now == 0 && rows[n].best_of_all != 0) rows[n].committed_now = 1;
  }
  group.sync();
}

// Teams: the pairs of rows that hold different tokens up to and with the first EOS of either.
BBK_HD void find_dream_conflicts(const Group& group, const PolicyParams& params, const int32_t* tokens,
                                 BranchRow* rows) {
  const int32_t mask = params.settings.mask_token_id;
  const int64_t gen_length = params.gen_length;
  for_each_stretch(group, params.num_branches, params.gen_length, [&](int d, int first, int behind) {
    const uint32_t allowed = rows[d].allowed;
    if (allowed == 0) return;
    behind = smaller(behind, rows[d].scan.first_eos + 1);
    uint32_t differing = 0;
    for (int p = first + group.lane(); p < behind; p += group.num_lanes()) {
      const int32_t token = tokens[d * gen_length + p];
      if (token == mask) continue;
      for (uint32_t left = allowed & ~differing; left != 0; left &= left - 1) {
        const int s = lowest_bit(left);
        const int32_t other = tokens[s * gen_length + p];
        if (other != mask && other != token && p <= rows[s].scan.first_eos) differing |= 1u << s;
      }
    }
    differing = group.team_or(differing);
    if (group.lane() == 0 && differing != 0) group.set_bits(&rows[d].differing, differing);
  });
}

// Group: all destinations at once, each at the MASKs of its own window. Every choice is made before a token
// changes. What is merged also stands as top token, where traces read it.
BBK_HD void merge_dream(const Group& group, const PolicyParams& params, const Request& request,
                        int32_t* tokens, BranchRow* rows) {
  const int32_t mask = params.settings.mask_token_id;
  const int64_t gen_length = params.gen_length;
  order_merge(group, params, rows);
  group.sync();
  find_dream_conflicts(group, params, tokens, rows);
  group.sync();
  for_each_stretch(group, params.num_branches, params.gen_length, [&](int d, int first, int behind) {
    const uint32_t sources = rows[d].allowed & ~rows[d].differing;
    if (sources == 0) return;
    int count = 0;
    for (int p = first + group.lane(); p < behind; p += group.num_lanes()) {
      if (p < rows[d].window_start || p >= rows[d].window_end || tokens[d * gen_length + p] != mask) continue;
      const int64_t at = (request.first_row + d) * gen_length + p;
      float highest = 0.0f;
      int32_t token = 0;
      int best = -1;
      for (uint32_t left = sources; left != 0; left &= left - 1) {
        const int s = lowest_bit(left);
        const int32_t held = tokens[s * gen_length + p];
        if (held == mask || p > rows[s].scan.first_eos) continue;
        const float value = find_entry(params, at, held).probability;
        // The smaller branch comes first here: only a later end goes before it.
        const bool in_front = best >= 0 && rows[s].window_end > rows[best].window_end;
        if (value > highest || (value == highest && value > 0.0f && in_front)) {
          highest = value;
          token = held;
          best = s;
        }
      }
      if (!(highest >= kTaken)) continue;
      params.events.merged[at] = 1;
      params.state.top_token[at] = token;
      params.state.confidence[at] = highest;
      ++count;
    }
    count = group.team_sum(count);
    if (group.lane() == 0 && count > 0) group.add(&rows[d].merged_now, count);
  });
  group.sync();
  for_each_stretch(group, params.num_branches, params.gen_length, [&](int d, int first, int behind) {
    if (rows[d].merged_now == 0) return;
    for (int p = first + group.lane(); p < behind; p += group.num_lanes()) {
      const int64_t at = (request.first_row + d) * gen_length + p;
      if (params.events.merged[at]) tokens[d * gen_length + p] = params.state.top_token[at];
    }
  });
  for (int n = group.rank(); n < params.num_branches; n += group.size()) rows[n].merged += rows[n].merged_now;
  group.sync();
}

// Group: branches that trail take over tokens, map and counter of the one that holds most.
BBK_HD Sync sync_dream(const Group& group, const PolicyParams& params, const Request& request,
                       int32_t* tokens, BranchRow* rows) {
  const int64_t gen_length = params.gen_length;
  Sync sync{0, 0};
  for (int n = 1; n < params.num_branches; ++n) {
    if (rows[n].decoded > rows[sync.leader].decoded) sync.leader = n;
  }
  for (int n = 0; n < params.num_branches; ++n) {
    const int64_t behind = static_cast<int64_t>(rows[sync.leader].decoded) - rows[n].decoded;
    if (!rows[n].done && behind > params.settings.sync_threshold) sync.trailing |= 1u << n;
  }
  group.sync();
  if (sync.trailing == 0) return sync;
  for (uint32_t left = sync.trailing; left != 0; left &= left - 1) {
    const int n = lowest_bit(left);
    for (int p = group.rank(); p < params.gen_length; p += group.size()) {
      tokens[n * gen_length + p] = tokens[sync.leader * gen_length + p];
      take_line(params, (request.first_row + n) * gen_length + p,
                (request.first_row + sync.leader) * gen_length + p);
    }
  }
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    if ((sync.trailing >> n & 1) == 0) continue;
    rows[n].moved_since_refresh = rows[sync.leader].moved_since_refresh;
    rows[n].synced += 1;
  }
  group.sync();
  return sync;
}

// Group: `policy_request` by this rule.
BBK_HD Outcome dream_request(const Group& group, const PolicyParams& params, int64_t index, int32_t* tokens,
                             RequestScratch* scratch) {
  const Request request = request_at(params, index);
  BranchRow* rows = scratch->rows;
  Outcome outcome = outcome_before(params, index);
  load_request(group, params, request, scratch);
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    rows[n].moved_since_refresh = params.state.moved_since_refresh[request.first_row + n];
    rows[n].best_of_all = 0;
    rows[n].frontier = 0;
  }
  group.sync();
  take_predictions(group, params, request, rows);
  realign(group, params, tokens, false, rows);

  const bool is_block = scratch->phase == kPhaseBlock;
  uint32_t forwarded = 0;
  for (int n = 0; n < params.num_branches; ++n) {
    if (rows[n].source_row >= 0 && !rows[n].done && !outcome.finished) forwarded |= 1u << n;
  }
  if (is_block) {
    look_at_candidates(group, params, request, forwarded, tokens, rows);
    commit_candidates(group, params, request, forwarded, tokens, rows);
  } else {
    commit_first(group, params, request, forwarded, tokens, rows);
  }
  realign(group, params, tokens, true, rows);
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    rows[n].committed += rows[n].committed_now;
    if (!is_block && (forwarded >> n & 1) != 0) rows[n].moved_since_refresh = 0;
  }
  finish_dream(params, rows, &outcome);
  group.sync();

  Sync sync{0, 0};
  if (is_block && !outcome.finished) {
    merge_dream(group, params, request, tokens, rows);
    realign(group, params, tokens, true, rows);
    sync = sync_dream(group, params, request, tokens, rows);
    if (sync.trailing != 0) realign(group, params, tokens, false, rows);
    finish_dream(params, rows, &outcome);
  }
  const Optional<int64_t>& interval = params.settings.refresh_interval;
  group.sync();
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    BranchRow& row = rows[n];
    row.needs_refresh =
        interval.given && row.moved_since_refresh >= interval.value && !row.done && !outcome.finished;
    params.state.moved_since_refresh[request.first_row + n] = row.moved_since_refresh;
  }
  group.sync();
  store_request(group, params, request, *scratch, outcome, sync.trailing, sync.leader);
  group.sync();
  return outcome;
}

}  // namespace bbk
