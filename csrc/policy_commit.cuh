// Commit: which predictions become tokens; and which rows can end their request by it.
#pragma once

#include "policy_rows.cuh"

namespace bbk {

struct Candidates {
  const int32_t* tokens;    // of the row
  const float* confidence;  // of the row
  int32_t mask_token_id;
  int32_t start;  // the window
  int32_t end;

  BBK_HD bool holds(int position) const { return tokens[position] == mask_token_id; }
};

// Whether a candidate is within `radius` of one whose confidence reaches `threshold`.
BBK_HD bool near_anchor(const Candidates& candidates, int position, int64_t radius, float threshold) {
  const int first = static_cast<int>(larger<int64_t>(candidates.start, position - radius));
  const int behind = static_cast<int>(smaller<int64_t>(candidates.end, position + radius + 1));
  for (int p = first; p < behind; ++p) {
    if (candidates.holds(p) && candidates.confidence[p] >= threshold) return true;
  }
  return false;
}

// How many candidates come before this one by falling confidence; the first position leads a tie.
BBK_HD int rank_of(const Candidates& candidates, int position) {
  const uint32_t key = order_key(candidates.confidence[position]);
  int rank = 0;
  for (int p = candidates.start; p < candidates.end; ++p) {
    if (!candidates.holds(p)) continue;
    const uint32_t other = order_key(candidates.confidence[p]);
    rank += other > key || (other == key && p < position);
  }
  return rank;
}

BBK_HD int scheduled_number(const PolicySettings& settings, const BranchRow& row) {
  const int steps = settings.steps_per_block;
  // A block that has used up its steps (it holds a MASK that the model itself wrote) takes the rest at once.
  if (row.steps_in_block >= steps) return row.block_size;
  return row.block_size / steps + (row.steps_in_block < row.block_size % steps);
}

// One team: decides which candidates of the row are committed, notes them in `committed` [G] and writes them.
// Returns their number.
BBK_HD int commit(const Group& group, const PolicyParams& params, const BranchRow& row, int32_t* tokens,
                  const int32_t* top_token, const float* confidence, uint8_t* committed) {
  const PolicySettings& settings = params.settings;
  const int gen_length = params.gen_length;
  const bool forwarded = row.source_row >= 0;
  const Candidates candidates{tokens, confidence, settings.mask_token_id, larger(row.window_start, 0),
                              forwarded ? smaller(row.window_end, gen_length) : 0};

  int best = -1;
  int number = 0;
  if (settings.scheduled) {
    number = scheduled_number(settings, row);
  } else {
    uint32_t best_key = 0;
    for (int p = candidates.start + group.lane(); p < candidates.end; p += group.num_lanes()) {
      if (!candidates.holds(p)) continue;
      const uint32_t key = order_key(confidence[p]);
      if (key > best_key) {
        best_key = key;
        best = p;
      }
    }
    const uint32_t highest = group.team_max(best_key);
    best = group.team_min(highest > 0 && best_key == highest ? best : gen_length);
  }

  for (int p = group.lane(); p < gen_length; p += group.num_lanes()) {
    bool chosen = false;
    if (p >= candidates.start && p < candidates.end && candidates.holds(p)) {
      if (settings.scheduled) {
        chosen = rank_of(candidates, p) < number;
      } else {
        chosen = p == best || confidence[p] >= settings.threshold ||
                 (settings.leap_radius > 0 && confidence[p] >= settings.leap_threshold &&
                  near_anchor(candidates, p, settings.leap_radius, settings.threshold));
      }
    }
    committed[p] = chosen;
  }
  group.team_sync();  // the tokens were looked at around each position
  int count = 0;
  for (int p = group.lane(); p < gen_length; p += group.num_lanes()) {
    if (!committed[p]) continue;
    tokens[p] = top_token[p];
    ++count;
  }
  group.team_sync();
  return group.team_sum(count);
}

// Ends the request if a branch can finish; the highest score wins, the smallest branch on a tie.
BBK_HD void finish(const PolicyParams& params, const BranchRow* rows, int32_t reason, Outcome* outcome) {
  if (outcome->finished) return;
  uint32_t best = 0;
  for (int n = 0; n < params.num_branches; ++n) {
    if (!rows[n].can_finish || order_key(rows[n].score) <= best) continue;
    best = order_key(rows[n].score);
    outcome->winner = n;
    outcome->finished = true;
  }
  if (outcome->finished) outcome->stop_reason = reason;
}

BBK_HD void rate_prefix(const PolicyParams& params, const float* confidence, BranchRow* row) {
  row->can_finish = row->first_eos < params.gen_length && row->first_mask >= row->first_eos;
  if (row->can_finish) row->score = confidence[row->first_eos];
}

// Group: the probability of each row's EOS in this very forward, where it was not written just now.
BBK_HD void rate_window(const Group& group, const PolicyParams& params, const Request& request,
                        BranchRow* rows) {
  const PredictionsView& predictions = params.predictions;
  const int64_t gen_length = params.gen_length;
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    BranchRow& row = rows[n];
    if (!row.can_finish) continue;
    const int64_t position = (request.first_row + n) * gen_length + row.window_eos;
    row.score = params.events.committed[position] ? params.state.confidence[position] : 0.0f;
  }
  group.sync();
  for (int64_t i = group.rank(); i < predictions.size; i += group.size()) {
    for (int n = 0; n < params.num_branches; ++n) {
      BranchRow& row = rows[n];
      if (!row.can_finish || predictions.target[i] != row.source_row * gen_length + row.window_eos) continue;
      if (params.events.committed[(request.first_row + n) * gen_length + row.window_eos]) continue;
      row.score = predictions.probe_probability[i];
    }
  }
  group.sync();
}

// Teams: store the source row's predictions, commit, scan, clip.
BBK_HD void commit_rows(const Group& group, const PolicyParams& params, const Request& request,
                        int32_t* tokens, const Outcome& outcome, RequestScratch* scratch) {
  const int64_t gen_length = params.gen_length;
  const int64_t num_rows = params.num_requests * params.num_branches;
  const int phase = scratch->phase;
  for (int n = group.team(); n < params.num_branches; n += group.num_teams()) {
    BranchRow& row = scratch->rows[n];
    const int64_t r = request.first_row + n;
    int32_t* top_token = params.state.top_token + r * gen_length;
    float* confidence = params.state.confidence + r * gen_length;
    const int64_t source = row.source_row;
    if (source >= 0 && source != r && source < num_rows) {  // equal rows of a full forward are computed once
      for (int p = group.lane(); p < gen_length; p += group.num_lanes()) {
        top_token[p] = params.state.top_token[source * gen_length + p];
        confidence[p] = params.state.confidence[source * gen_length + p];
      }
      group.team_sync();
    }
    int32_t* row_tokens = tokens + n * gen_length;
    const int count = commit(group, params, row, row_tokens, top_token, confidence,
                             params.events.committed + r * gen_length);
    scan_row(group, params, row_tokens, &row);
    if (group.lane() != 0) continue;
    const bool forwarded = source >= 0;
    row.decoded += count;
    row.committed += count;
    row.steps_in_block += forwarded;
    clip_window(params, &row);
    if (forwarded && (phase == kPhaseRefresh || phase == kPhaseInit)) {
      row.blocks_since_refresh = 0;
      row.needs_refresh = 0;
    }
    if (params.settings.eos_exit == kEosPrefix) {
      rate_prefix(params, confidence, &row);
    } else if (params.settings.eos_exit == kEosWindow) {
      row.can_finish = forwarded && phase == kPhaseBlock && !row.done && !outcome.finished &&
                       row.window_eos < row.window_end && !is_open(row);
    }
  }
}

}  // namespace bbk
