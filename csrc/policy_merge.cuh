// Merge: a row takes tokens that rows behind it hold, where it would predict them itself.
#pragma once

#include "policy_rows.cuh"

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

// Group: finds the pairs of rows that hold different tokens somewhere both count.
BBK_HD void find_conflicts(const Group& group, const PolicyParams& params, const int32_t* tokens,
                           BranchRow* rows) {
  const int32_t mask = params.settings.mask_token_id;
  const bool ends_at_eos = params.settings.eos_exit == kEosPrefix;
  for_each_position(group, params.gen_length, [&](int p, bool valid) {
    for (int d = 0; d < params.num_branches; ++d) {
      if (rows[d].allowed == 0) continue;
      uint32_t differing = 0;
      const int32_t token = valid ? tokens[static_cast<int64_t>(d) * params.gen_length + p] : mask;
      if (token != mask && !(ends_at_eos && p >= rows[d].first_eos)) {
        for (uint32_t left = rows[d].allowed; left != 0; left &= left - 1) {
          const int s = lowest_bit(left);
          const int32_t other = tokens[static_cast<int64_t>(s) * params.gen_length + p];
          if (other != mask && other != token && !(ends_at_eos && p >= rows[s].first_eos)) {
            differing |= 1u << s;
          }
        }
      }
      differing = group.team_or(differing);
      if (group.lane() == 0 && differing != 0) group.set_bits(&rows[d].differing, differing);
    }
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

// Group: all destinations at once. A thread holds all rows of its positions, so every merge reads the state
// before merging.
BBK_HD void merge(const Group& group, const PolicyParams& params, const Request& request, int32_t* tokens,
                  BranchRow* rows, bool possible) {
  const int32_t mask = params.settings.mask_token_id;
  const int32_t* top_token = params.state.top_token + request.first_position;
  const float* confidence = params.state.confidence + request.first_position;
  uint8_t* merged = params.events.merged + request.first_position;
  for (int p = group.rank(); p < params.gen_length; p += group.size()) {
    uint32_t chosen = 0;
    for (int d = 0; possible && d < params.num_branches; ++d) {
      const int64_t at = static_cast<int64_t>(d) * params.gen_length + p;
      if ((rows[d].allowed & ~rows[d].differing) == 0 || tokens[at] != mask) continue;
      if (!(confidence[at] > params.settings.merge_threshold)) continue;
      if (merges(params, rows, tokens, d, p, top_token[at])) chosen |= 1u << d;
    }
    for (int d = 0; d < params.num_branches; ++d) {
      const int64_t at = static_cast<int64_t>(d) * params.gen_length + p;
      const bool is_chosen = chosen >> d & 1;
      merged[at] = is_chosen;
      if (!is_chosen) continue;
      tokens[at] = top_token[at];
      group.add(&rows[d].merged_now, 1);
    }
  }
}

}  // namespace bbk
