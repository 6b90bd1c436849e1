// Drafts, as blockbatch_kernels/reference/drafts.py defines them: row 0 of a request is its only branch; the
// rows behind it hold what the next commit may write, and where it does, their forward is the branch's next.
#pragma once

#include "decode/policy.cuh"

namespace bbk {

// The parameters of a call with drafts: of all rows, and of the branches alone.
struct DraftParams {
  PolicyParams all;
  PolicyParams branch;
};

inline DraftParams draft_params(const PolicyParams& params) {
  DraftParams both{params, params};
  both.branch.num_branches = 1;
  return both;
}

// Rows of a full forward take over all predictions of the branch.
BBK_HD void follow_branch(const Group& group, const PolicyParams& params, const Request& request,
                          const BranchRow* rows) {
  const int64_t gen_length = params.gen_length;
  for (int n = 1; n < params.num_branches; ++n) {
    const int64_t r = request.first_row + n, source = rows[n].source_row;
    if (source < 0 || source == r) continue;
    for (int p = group.rank(); p < params.gen_length; p += group.size()) {
      params.state.top_token[r * gen_length + p] = params.state.top_token[source * gen_length + p];
      params.state.confidence[r * gen_length + p] = params.state.confidence[source * gen_length + p];
    }
  }
}

// Group: the first draft that was computed and holds the branch's tokens; 0: none. The same for every rank.
BBK_HD int find_match(const Group& group, const PolicyParams& params, const int32_t* tokens,
                      BranchRow* rows) {
  const int64_t gen_length = params.gen_length;
  for (int n = group.rank(); n < params.num_branches; n += group.size()) rows[n].differing = 0;
  group.sync();
  for_each_stretch(group, params.num_branches, params.gen_length, [&](int d, int first, int behind) {
    if (d == 0 || rows[d].source_row < 0) return;
    uint32_t differs = 0;
    for (int p = first + group.lane(); p < behind; p += group.num_lanes()) {
      differs |= tokens[d * gen_length + p] != tokens[p];
    }
    differs = group.team_or(differs);
    if (group.lane() == 0 && differs != 0) group.set_bits(&rows[d].differing, differs);
  });
  group.sync();
  int match = 0;
  for (int d = params.num_branches - 1; d > 0; --d) {
    if (rows[d].source_row >= 0 && rows[d].differing == 0) match = d;
  }
  group.sync();
  return match;
}

// Group: the branch's predictions at the MASKs of its window become those of a draft.
BBK_HD void adopt(const Group& group, const PolicyParams& params, const Request& request, int draft,
                  const int32_t* tokens, BranchRow* branch) {
  const int64_t from = (request.first_row + draft) * params.gen_length, to = request.first_position;
  const int end = smaller(branch->window_end, params.gen_length);
  for (int p = larger(branch->window_start, 0) + group.rank(); p < end; p += group.size()) {
    if (tokens[p] != params.settings.mask_token_id) continue;
    params.state.top_token[to + p] = params.state.top_token[from + p];
    params.state.confidence[to + p] = params.state.confidence[from + p];
  }
  if (group.rank() == 0) start_round(params, branch);
  group.sync();
}

// Group: the drafts of the next forward.
BBK_HD void write_drafts(const Group& group, const PolicyParams& params, const Request& request,
                         bool finished, int32_t* tokens, RequestScratch* scratch) {
  const PolicySettings& settings = params.settings;
  const int64_t gen_length = params.gen_length;
  BranchRow* rows = scratch->rows;
  const BranchRow& branch = rows[0];
  const int32_t* top_token = params.state.top_token + request.first_position;
  const float* confidence = params.state.confidence + request.first_position;
  const Candidates masks{tokens, confidence, settings.mask_token_id, larger(branch.window_start, 0),
                         smaller(branch.window_end, params.gen_length)};
  if (group.rank() == 0) {
    scratch->masks = 0;
    scratch->first_eos_rank = params.gen_length;
  }
  group.sync();
  for (int p = masks.start + group.rank(); p < masks.end; p += group.size()) {
    if (!masks.holds(p)) continue;
    group.add(&scratch->masks, 1);
    // An EOS ends the window earlier, behind which the branch keeps its K/V: no draft writes one.
    if (settings.eos_exit == kEosPrefix && is_eos(settings, top_token[p])) {
      group.lower_to(&scratch->first_eos_rank, rank_of(masks, p));
    }
  }
  group.sync();
  // A draft must leave a MASK, or its forward would be of no use.
  const int most = smaller(scratch->masks - 1, scratch->first_eos_rank);
  const bool possible = !finished && !branch.done && !branch.needs_refresh;
  for (int p = group.rank(); p < params.gen_length; p += group.size()) {
    const bool in_window = p >= masks.start && p < masks.end && masks.holds(p);
    const int rank = in_window ? rank_of(masks, p) : params.gen_length;
    for (int d = 1; d < params.num_branches; ++d) {
      const int length = settings.drafts.ids[d - 1];
      const bool written = possible && length <= most && rank < length;
      tokens[d * gen_length + p] = written ? top_token[p] : tokens[p];
    }
  }
  for (int d = 1 + group.rank(); d < params.num_branches; d += group.size()) {
    const bool exists = possible && settings.drafts.ids[d - 1] <= most;
    rows[d].done = !exists;
    rows[d].window_start = branch.window_start;
    rows[d].window_end = branch.window_end;
    rows[d].decoded = branch.decoded;
    rows[d].progress = branch.progress;
    // All that the next plan asks is whether there is one.
    rows[d].scan.first_open = exists ? branch.window_start : params.gen_length;
  }
  group.sync();
}

// Group: `policy_request` for a request with drafts.
BBK_HD Outcome policy_with_drafts(const Group& group, const DraftParams& both, int64_t index, int32_t* tokens,
                                  RequestScratch* scratch) {
  const PolicyParams& params = both.all;
  const Request request = request_at(params, index);
  BranchRow* rows = scratch->rows;
  Outcome outcome = outcome_before(params, index);
  load_request(group, params, request, scratch);
  group.sync();
  follow_branch(group, params, request, rows);
  const int window_end = rows[0].window_end;
  apply_rules(group, both.branch, request, tokens, &outcome, scratch);
  group.sync();
  int adopted = 0, number = 0;
  while (scratch->phase == kPhaseBlock && number < params.settings.drafts.count) {
    if (outcome.finished || rows[0].done) break;
    const int match = find_match(group, params, tokens, rows);
    if (match == 0) break;
    adopted = match;
    ++number;
    adopt(group, params, request, match, tokens, &rows[0]);
    apply_rules(group, both.branch, request, tokens, &outcome, scratch);
    group.sync();
  }
  // A draft computes its window whole and so may keep its pages, unless the window lost its end.
  const bool shrunk = rows[0].window_end != window_end;
  write_drafts(group, params, request, outcome.finished, tokens, scratch);
  store_request(group, params, request, *scratch, outcome, 0, 0);
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    if (n == 0 || shrunk) {
      params.events.sync_source[request.first_row + n] = static_cast<int32_t>(request.first_row + adopted);
    }
  }
  if (group.rank() == 0) params.state.adopted[request.first_row] += number;
  group.sync();
  return outcome;
}

}  // namespace bbk
