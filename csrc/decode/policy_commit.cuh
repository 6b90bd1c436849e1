// Commit: which predictions become tokens; and which rows can end their request by it.
#pragma once

#include "decode/policy_rows.cuh"

namespace bbk {

struct Candidates {
  const int32_t* tokens;    // of the row
  const float* confidence;  // of the row
  int32_t mask_token_id;
  int32_t start;  // the window
  int32_t end;

  BBK_HD bool holds(int position) const { return tokens[position] == mask_token_id; }
};

// Whether a confidence suffices at a position by itself.
BBK_HD bool is_sure(const PolicySettings& settings, const BranchRow& row, float confidence, int position) {
  const bool in_tail = settings.tail_threshold.given && position > row.first_unsure;
  return confidence >= (in_tail ? settings.tail_threshold : settings.threshold).value;
}

// Whether a candidate is within LocalLeap's radius of one that is sure.
BBK_HD bool near_anchor(const PolicySettings& settings, const BranchRow& row, const Candidates& candidates,
                        int position) {
  const int64_t radius = settings.leap_radius;
  const int first = static_cast<int>(larger<int64_t>(candidates.start, position - radius));
  const int behind = static_cast<int>(smaller<int64_t>(candidates.end, position + radius + 1));
  for (int p = first; p < behind; ++p) {
    if (candidates.holds(p) && is_sure(settings, row, candidates.confidence[p], p)) return true;
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
  const int steps = settings.steps_per_block.value;
  // A block that has used up its steps (it holds a MASK that the model itself wrote) takes the rest at once.
  if (row.steps_in_block >= steps) return row.block_size;
  return row.block_size / steps + (row.steps_in_block < row.block_size % steps);
}

// Orders candidates by confidence, then the earlier position first.
BBK_HD unsigned long long best_key(uint32_t key, int position) {
  return static_cast<unsigned long long>(key) << 32 | ~static_cast<uint32_t>(position);
}

BBK_HD int best_position(unsigned long long best) {
  return best == 0 ? -1 : static_cast<int>(~static_cast<uint32_t>(best));
}

BBK_HD Candidates candidates_of(const PolicyParams& params, const BranchRow& row, const int32_t* tokens,
                                const float* confidence) {
  const bool forwarded = row.source_row >= 0;
  return Candidates{tokens, confidence, params.settings.mask_token_id, larger(row.window_start, 0),
                    forwarded ? smaller(row.window_end, params.gen_length) : 0};
}

BBK_HD bool is_chosen(const PolicySettings& settings, const BranchRow& row, const Candidates& candidates,
                      int position) {
  if (is_scheduled(settings)) return rank_of(candidates, position) < scheduled_number(settings, row);
  const float confidence = candidates.confidence[position];
  return position == best_position(row.best) || is_sure(settings, row, confidence, position) ||
         (settings.leap_radius > 0 && confidence >= settings.leap_threshold &&
          near_anchor(settings, row, candidates, position));
}

// Teams: take over the source row's predictions, find each row's highest candidate and its first unsure one.
BBK_HD void find_best(const Group& group, const PolicyParams& params, const Request& request,
                      const int32_t* tokens, BranchRow* rows) {
  const int64_t gen_length = params.gen_length, num_rows = params.num_requests * params.num_branches;
  for_each_stretch(group, params.num_branches, params.gen_length, [&](int n, int first, int behind) {
    const int64_t r = request.first_row + n, source = rows[n].source_row;
    int32_t* top_token = params.state.top_token + r * gen_length;
    float* confidence = params.state.confidence + r * gen_length;
    if (source >= 0 && source != r && source < num_rows) {  // equal rows of a full forward are computed once
      for (int p = first + group.lane(); p < behind; p += group.num_lanes()) {
        top_token[p] = params.state.top_token[source * gen_length + p];
        confidence[p] = params.state.confidence[source * gen_length + p];
      }
    }
    const Candidates candidates = candidates_of(params, rows[n], tokens + n * gen_length, confidence);
    if (is_scheduled(params.settings) || candidates.start >= behind || candidates.end <= first) return;
    uint32_t highest = 0;
    int position = params.gen_length, unsure = params.gen_length;
    for (int p = first + group.lane(); p < behind; p += group.num_lanes()) {
      if (p < candidates.start || p >= candidates.end) continue;
      if (!candidates.holds(p)) continue;
      if (!(confidence[p] >= params.settings.threshold.value)) unsure = smaller(unsure, p);
      const uint32_t key = order_key(confidence[p]);
      if (key <= highest) continue;
      highest = key;
      position = p;
    }
    const uint32_t of_team = group.team_max(highest);
    if (of_team == 0) return;
    position = group.team_min(highest == of_team ? position : params.gen_length);
    if (group.lane() == 0) group.raise_to(&rows[n].best, best_key(of_team, position));
    if (!params.settings.tail_threshold.given) return;
    unsure = group.team_min(unsure);
    if (group.lane() == 0) group.lower_to(&rows[n].first_unsure, unsure);
  });
}

// Teams: write the chosen candidates' tokens, note them in the events, scan the rows.
BBK_HD void commit_and_scan(const Group& group, const PolicyParams& params, const Request& request,
                            int32_t* all_tokens, BranchRow* rows) {
  const PolicySettings& settings = params.settings;
  const int64_t gen_length = params.gen_length;
  const auto row_candidates = [&](int n) {
    return candidates_of(params, rows[n], all_tokens + n * gen_length,
                         params.state.confidence + (request.first_row + n) * gen_length);
  };
  uint8_t* all_committed = params.events.committed + request.first_position;
  // Where a choice looks at other positions, no token may change before all are made.
  const bool looks_around = is_scheduled(settings) || settings.leap_radius > 0;
  if (looks_around) {
    for_each_stretch(group, params.num_branches, params.gen_length, [&](int n, int first, int behind) {
      const Candidates candidates = row_candidates(n);
      for (int p = first + group.lane(); p < behind; p += group.num_lanes()) {
        if (p < candidates.start || p >= candidates.end || !candidates.holds(p)) continue;
        if (is_chosen(settings, rows[n], candidates, p)) all_committed[n * gen_length + p] = 1;
      }
    });
    group.sync();
  }
  for_each_stretch(group, params.num_branches, params.gen_length, [&](int n, int first, int behind) {
    const Candidates candidates = row_candidates(n);
    int32_t* tokens = all_tokens + n * gen_length;
    uint8_t* committed = all_committed + n * gen_length;
    const int32_t* top_token = params.state.top_token + (request.first_row + n) * gen_length;
    // The K/V of a row that took part is that of its tokens: what differed was among the queries.
    const bool notes_cached = settings.query_span == kSpanOpen && rows[n].source_row >= 0;
    int32_t* cached_token = params.state.cached_token + (request.first_row + n) * gen_length;
    RowScan scan = empty_scan(params.gen_length);
    int count = 0;
    for (int p = first + group.lane(); p < behind; p += group.num_lanes()) {
      int32_t token = tokens[p];
      if (notes_cached) cached_token[p] = token;
      if (p >= candidates.start && p < candidates.end && token == settings.mask_token_id &&
          (looks_around ? committed[p] != 0 : is_chosen(settings, rows[n], candidates, p))) {
        committed[p] = 1;
        tokens[p] = token = top_token[p];
        ++count;
      }
      note_token(settings, token, p, rows[n].window_start, &scan);
    }
    add_scan(group, scan, &rows[n].scan);
    count = group.team_sum(count);
    if (group.lane() == 0 && count > 0) group.add(&rows[n].committed_now, count);
  });
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
  row->can_finish = row->scan.first_eos < params.gen_length && row->scan.first_mask >= row->scan.first_eos;
  if (row->can_finish) row->score = confidence[row->scan.first_eos];
}

// Group: the probability of each row's EOS in this very forward: its confidence where it was written just
// now, else what the probe of the position says.
BBK_HD void rate_window(const Group& group, const PolicyParams& params, const Request& request,
                        BranchRow* rows) {
  const PredictionsView& predictions = params.predictions;
  const int64_t gen_length = params.gen_length;
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    BranchRow& row = rows[n];
    if (!row.can_finish) continue;
    const int64_t position = (request.first_row + n) * gen_length + row.scan.window_eos;
    row.score = params.events.committed[position] ? params.state.confidence[position] : 0.0f;
  }
  group.sync();
  const int64_t size = predictions.probe_probability.given ? params.num_predictions : 0;
  for (int64_t i = group.rank(); i < size; i += group.size()) {
    for (int n = 0; n < params.num_branches; ++n) {
      BranchRow& row = rows[n];
      if (!row.can_finish || predictions.target[i] != row.source_row * gen_length + row.scan.window_eos)
        continue;
      if (params.events.committed[(request.first_row + n) * gen_length + row.scan.window_eos]) continue;
      row.score = predictions.probe_probability.value[i];
    }
  }
  group.sync();
}

// Group: everything up to the question whether the request ends here.
BBK_HD void commit_request(const Group& group, const PolicyParams& params, const Request& request,
                           int32_t* tokens, const Outcome& outcome, RequestScratch* scratch) {
  BranchRow* rows = scratch->rows;
  const int phase = scratch->phase;
  find_best(group, params, request, tokens, rows);
  group.sync();
  commit_and_scan(group, params, request, tokens, rows);
  group.sync();
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    BranchRow& row = rows[n];
    const bool forwarded = row.source_row >= 0;
    row.decoded += row.committed_now;
    row.committed += row.committed_now;
    row.steps_in_block += forwarded;
    clip_window(params, &row);
    if (forwarded && (phase == kPhaseRefresh || phase == kPhaseInit)) {
      row.blocks_since_refresh = 0;
      row.needs_refresh = 0;
    }
    if (params.settings.eos_exit == kEosPrefix) {
      rate_prefix(params, params.state.confidence + (request.first_row + n) * params.gen_length, &row);
    } else if (params.settings.eos_exit == kEosWindow) {
      row.can_finish = forwarded && phase == kPhaseBlock && !row.done && !outcome.finished &&
                       row.scan.window_eos < row.window_end && !is_open(row);
    }
  }
  group.sync();
  if (params.settings.eos_exit == kEosWindow) rate_window(group, params, request, rows);
}

}  // namespace bbk
