// Merge: a row takes tokens that rows behind it hold, where it would predict them itself.
#pragma once

#include "decode/policy_rows.cuh"

namespace bbk {

// Ranks: whom each row may take tokens from. Destinations go from the window that ends last to the one that
// ends first, the smaller branch first on a tie; sources stand behind them.
BBK_HD void order_merge(const Group& group, const PolicyParams& params, BranchRow* rows) {
  for (int d = group.rank(); d < params.num_branches; d += group.size()) {
    uint32_t allowed = 0;
    for (int s = 0; s < params.num_branches; ++s) {
      const bool behind =
          rows[s].window_end < rows[d].window_end || (rows[s].window_end == rows[d].window_end && s > d);
      if (behind && !rows[s].done) allowed |= 1u << s;
    }
    rows[d].allowed = rows[d].done ? 0 : allowed;
  }
}

// Teams: find the pairs of rows that hold different tokens somewhere both count.
BBK_HD void find_conflicts(const Group& group, const PolicyParams& params, const int32_t* tokens,
                           BranchRow* rows) {
  const int32_t mask = params.settings.mask_token_id;
  const bool ends_at_eos = params.settings.eos_exit == kEosPrefix;
  const int64_t gen_length = params.gen_length;
  for_each_stretch(group, params.num_branches, params.gen_length, [&](int d, int first, int behind) {
    const uint32_t allowed = rows[d].allowed;
    if (allowed == 0) return;
    if (ends_at_eos) behind = smaller(behind, rows[d].scan.first_eos);
    uint32_t differing = 0;
    for (int p = first + group.lane(); p < behind; p += group.num_lanes()) {
      const int32_t token = tokens[d * gen_length + p];
      if (token == mask) continue;
      for (uint32_t left = allowed & ~differing; left != 0; left &= left - 1) {
        const int s = lowest_bit(left);
        const int32_t other = tokens[s * gen_length + p];
        if (other == mask || other == token || (ends_at_eos && p >= rows[s].scan.first_eos)) continue;
        differing |= 1u << s;
      }
    }
    differing = group.team_or(differing);
    if (group.lane() == 0 && differing != 0) group.set_bits(&rows[d].differing, differing);
  });
}

// Above a merge threshold of one half only the destination's own top token can pass.
BBK_HD bool merges(const PolicyParams& params, const BranchRow* rows, const int32_t* tokens, int destination,
                   int position, int32_t top_token) {
  bool covered = false, agreed = false;
  for (uint32_t left = rows[destination].allowed & ~rows[destination].differing; left != 0;
       left &= left - 1) {
    const int s = lowest_bit(left);
    const int32_t held = tokens[static_cast<int64_t>(s) * params.gen_length + position];
    covered |= position >= rows[s].window_start && position < rows[s].window_end;
    agreed |= held != params.settings.mask_token_id && held == top_token;
  }
  return covered && agreed;
}

// Group: all destinations at once. Every choice is made before a token changes, so every merge reads the
// state before merging. Rows that took tokens are scanned again.
BBK_HD void merge(const Group& group, const PolicyParams& params, const Request& request, int32_t* tokens,
                  BranchRow* rows) {
  const PolicySettings& settings = params.settings;
  const int64_t gen_length = params.gen_length;
  const int32_t* top_token = params.state.top_token + request.first_position;
  const float* confidence = params.state.confidence + request.first_position;
  uint8_t* merged = params.events.merged + request.first_position;
  for_each_stretch(group, params.num_branches, params.gen_length, [&](int d, int first, int behind) {
    if ((rows[d].allowed & ~rows[d].differing) == 0) return;
    int count = 0;
    for (int p = first + group.lane(); p < behind; p += group.num_lanes()) {
      const int64_t at = d * gen_length + p;
      if (tokens[at] != settings.mask_token_id) continue;
      const int32_t top = top_token[at];
      if (!(confidence[at] > settings.merge_threshold) || !merges(params, rows, tokens, d, p, top)) continue;
      merged[at] = 1;
      ++count;
    }
    count = group.team_sum(count);
    if (group.lane() == 0 && count > 0) group.add(&rows[d].merged_now, count);
  });
  group.sync();
  for_each_stretch(group, params.num_branches, params.gen_length, [&](int d, int first, int behind) {
    if (rows[d].merged_now == 0) return;
    RowScan scan = empty_scan(params.gen_length);
    for (int p = first + group.lane(); p < behind; p += group.num_lanes()) {
      const int64_t at = d * gen_length + p;
      if (merged[at]) tokens[at] = top_token[at];
      note_token(settings, tokens[at], p, rows[d].window_start, &scan);
    }
    add_scan(group, scan, &rows[d].rescan);
  });
}

}  // namespace bbk
