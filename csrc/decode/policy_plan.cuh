// The plan of the next forward, as blockbatch_kernels/reference/plan.py fixes it. Requests are planned each
// on its own, but for one question: a request that needs a refresh makes the whole batch wait for it.
#pragma once

#include "decode/policy.cuh"

namespace bbk {

// What one request adds to the plan's flags.
struct RequestCounts {
  int running;
  int query_tokens;
  int predictions;
  int stalled;
};

BBK_HD bool runs(const BranchRow& row, bool finished) { return !finished && !row.done; }

// Group: whether any request of the batch asks for a refresh; the same for every rank.
BBK_HD bool any_refresh(const Group& group, const PolicyParams& params, int* scratch) {
  const BranchStateView& state = params.state;
  const int64_t num_rows = params.num_requests * params.num_branches;
  int asking = 0;
  for (int64_t r = group.rank(); r < num_rows; r += group.size()) {
    if (state.needs_refresh[r] && !state.done[r]) asking |= !state.finished[r / params.num_branches];
  }
  return group.sum(asking, scratch) > 0;
}

// Group: what the plan needs to know of the rows, read from the state.
BBK_HD void load_rows(const Group& group, const PolicyParams& params, const Request& request,
                      const int32_t* tokens, RequestScratch* scratch) {
  const BranchStateView& state = params.state;
  const int gen_length = params.gen_length;
  if (group.rank() == 0) {
    scratch->predictions = 0;
    scratch->prompt_length = state.prompt_length[request.index];
  }
  for (int n = group.team(); n < params.num_branches; n += group.num_teams()) {
    const int64_t r = request.first_row + n;
    const int start = larger(state.window_start[r], 0), end = smaller(state.window_end[r], gen_length);
    int first_open = gen_length;
    for (int p = start + group.lane(); p < end; p += group.num_lanes()) {
      if (tokens[static_cast<int64_t>(n) * gen_length + p] == params.settings.mask_token_id) {
        first_open = smaller(first_open, p);
      }
    }
    first_open = group.team_min(first_open);
    if (group.lane() != 0) continue;
    BranchRow& row = scratch->rows[n];
    row.window_start = state.window_start[r];
    row.window_end = state.window_end[r];
    row.decoded = state.decoded[r];
    row.needs_refresh = state.needs_refresh[r];
    row.done = state.done[r];
    row.scan.first_open = first_open;
  }
}

// Group: sets source_row of the running rows to the first of them that holds the same tokens.
BBK_HD void find_distinct_rows(const Group& group, const PolicyParams& params, const Request& request,
                               const int32_t* tokens, bool finished, BranchRow* rows) {
  const int num_branches = params.num_branches;
  uint32_t members = 0;
  for (int n = 0; n < num_branches; ++n) members |= runs(rows[n], finished) ? 1u << n : 0u;
  for (int n = group.rank(); n < num_branches; n += group.size()) rows[n].differing = 0;
  group.sync();
  const int64_t gen_length = params.gen_length;
  for_each_stretch(group, num_branches, params.gen_length, [&](int d, int first, int behind) {
    uint32_t differing = 0;
    const uint32_t earlier = members >> d & 1 ? members & ((1u << d) - 1) : 0;
    for (int p = first + group.lane(); p < behind; p += group.num_lanes()) {
      for (uint32_t left = earlier & ~differing; left != 0; left &= left - 1) {
        const int s = lowest_bit(left);
        if (tokens[s * gen_length + p] != tokens[d * gen_length + p]) differing |= 1u << s;
      }
    }
    differing = group.team_or(differing);
    if (group.lane() == 0 && differing != 0) group.set_bits(&rows[d].differing, differing);
  });
  group.sync();
  for (int n = group.rank(); n < num_branches; n += group.size()) {
    const uint32_t equal = members & ~rows[n].differing & ((1u << n) - 1);
    const int source = equal != 0 ? lowest_bit(equal) : n;
    rows[n].source_row = members >> n & 1 ? static_cast<int32_t>(request.first_row + source) : -1;
  }
}

BBK_HD void plan_full_forward(const PolicyParams& params, Phase phase, int prompt_length, int64_t r,
                              BranchRow* row) {
  row->query_start = row->query_end = 0;
  if (row->source_row != r) return;
  row->query_end = prompt_length + params.gen_length;
  const bool keeps_prompt = phase == kPhaseRefresh && params.settings.refresh_scope == kScopeGeneration;
  if (keeps_prompt) row->query_start = prompt_length - params.settings.prediction_offset;
}

BBK_HD void plan_block_denoise(const PolicyParams& params, bool active, int prompt_length, int64_t r,
                               BranchRow* row) {
  row->source_row = active ? static_cast<int32_t>(r) : -1;
  const int canvas = prompt_length + params.gen_length;
  const int shift = prompt_length - params.settings.prediction_offset;
  row->query_start = params.settings.query_span == kSpanCanvas ? 0 : shift + row->window_start;
  row->query_end = params.settings.query_span == kSpanWindow ? shift + row->window_end : canvas;
  if (!active) row->query_start = row->query_end = 0;
}

// The queries of a row that are not a stretch: those that predict a MASK of its window, and every token whose
// K/V was computed from another. Place c is the canvas position in front of generated position c; there are
// gen_length + 1 of them.
struct OpenQueries {
  const int32_t* tokens;        // of the row
  const int32_t* cached_token;  // of the row
  int32_t mask_token_id;
  int start;  // the window
  int end;
  int offset;

  BBK_HD bool predicts(int position) const {
    return position >= start && position < end && tokens[position] == mask_token_id;
  }
  BBK_HD bool is_stale(int position) const {
    return position >= 0 && tokens[position] != mask_token_id && tokens[position] != cached_token[position];
  }
  BBK_HD bool holds(int place) const { return is_stale(place - 1) || predicts(place - 1 + offset); }
};

BBK_HD OpenQueries open_queries(const PolicyParams& params, const Request& request, const BranchRow& row,
                                int n, const int32_t* tokens) {
  const int64_t first = static_cast<int64_t>(n) * params.gen_length;
  return OpenQueries{tokens + first,
                     params.state.cached_token + request.first_position + first,
                     params.settings.mask_token_id,
                     larger(row.window_start, 0),
                     smaller(row.window_end, params.gen_length),
                     params.settings.prediction_offset};
}

// Teams: list the queries of the rows that take part, and count them. What stands behind them is zero.
BBK_HD void list_open_queries(const Group& group, const PolicyParams& params, const Request& request,
                              bool is_open_step, const int32_t* tokens, int prompt_length, BranchRow* rows) {
  const int places = params.gen_length + 1;
  for (int n = group.team(); n < params.num_branches; n += group.num_teams()) {
    const int64_t r = request.first_row + n;
    int32_t* positions = params.out_plan.query_position + r * places;
    const bool takes_part = is_open_step && rows[n].source_row >= 0;
    const OpenQueries queries = open_queries(params, request, rows[n], n, tokens);
    int count = 0;
    for (int base = 0; takes_part && base < places; base += group.num_lanes()) {
      const int place = base + group.lane();
      const bool is_query = place < places && queries.holds(place);
      int found = 0;
      const int before = group.team_count_below(is_query, &found);
      if (is_query) positions[count + before] = prompt_length - 1 + place;
      count += found;
    }
    for (int i = count + group.lane(); i < places; i += group.num_lanes()) positions[i] = 0;
    if (is_open_step && group.lane() == 0) {
      rows[n].query_start = 0;
      rows[n].query_end = count;
      params.out_plan.query_start[r] = 0;
      params.out_plan.query_end[r] = count;
    }
  }
}

// Group: the first MASK of each row, whatever its window.
BBK_HD void find_first_masks(const Group& group, const PolicyParams& params, const int32_t* tokens,
                             BranchRow* rows) {
  for (int n = group.rank(); n < params.num_branches; n += group.size()) {
    rows[n].scan.first_mask = params.gen_length;
  }
  group.sync();
  for_each_stretch(group, params.num_branches, params.gen_length, [&](int n, int first, int behind) {
    int first_mask = params.gen_length;
    for (int p = first + group.lane(); p < behind; p += group.num_lanes()) {
      const int32_t token = tokens[static_cast<int64_t>(n) * params.gen_length + p];
      if (token == params.settings.mask_token_id) first_mask = smaller(first_mask, p);
    }
    first_mask = group.team_min(first_mask);
    if (group.lane() == 0) group.lower_to(&rows[n].scan.first_mask, first_mask);
  });
  group.sync();
}

// Group: which predictions can still matter. One can only where the row holds MASK or EOS at the moment it is
// asked for. Sync moves tokens between branches but never adds a MASK or EOS that no branch of the request
// held before, so positions where no branch holds one need no LM head.
//
// A draft, whose tokens no row takes over, predicts at its own MASKs alone. So does a row of the rule for
// Dream, whose map goes with its tokens; in a full forward at the first of them.
BBK_HD void plan_predictions(const Group& group, const PolicyParams& params, const Request& request,
                             Phase phase, bool is_open_step, const int32_t* tokens, int prompt_length,
                             RequestScratch* scratch) {
  const bool has_drafts = params.settings.drafts.count > 0;
  const bool is_dream = params.settings.policy == kDreamPublished;
  if (is_dream && phase != kPhaseBlock) find_first_masks(group, params, tokens, scratch->rows);
  const auto can_change = [&](int32_t token) {
    return token == params.settings.mask_token_id || is_eos(params.settings, token);
  };
  uint8_t* predict = params.out_plan.predict + request.first_position;
  int count = 0;
  for (int p = group.rank(); p < params.gen_length; p += group.size()) {
    bool open = false;
    for (int n = 0; n < params.num_branches; ++n) {
      open |= can_change(tokens[static_cast<int64_t>(n) * params.gen_length + p]);
    }
    const int query = p + prompt_length - params.settings.prediction_offset;
    for (int n = 0; n < params.num_branches; ++n) {
      const BranchRow& row = scratch->rows[n];
      bool predicted = open;
      if (has_drafts) predicted = can_change(tokens[static_cast<int64_t>(n) * params.gen_length + p]);
      if (is_dream) {
        const int32_t token = tokens[static_cast<int64_t>(n) * params.gen_length + p];
        predicted =
            token == params.settings.mask_token_id && (phase == kPhaseBlock || p == row.scan.first_mask);
      }
      if (is_open_step) {
        const OpenQueries queries = open_queries(params, request, row, n, tokens);
        predicted = predicted && row.source_row >= 0 && p >= queries.start && p < queries.end &&
                    queries.holds(p + 1 - queries.offset);
      } else {
        predicted = predicted && query >= row.query_start && query < row.query_end;
      }
      predict[static_cast<int64_t>(n) * params.gen_length + p] = predicted;
      count += predicted;
    }
  }
  count = group.team_sum(count);
  if (group.lane() == 0 && count > 0) group.add(&scratch->predictions, count);
}

// Group: writes the request's rows of the plan; `scratch` holds its rows. Returns its counts to every thread.
BBK_HD RequestCounts plan_request(const Group& group, const PolicyParams& params, int64_t index, Phase phase,
                                  const int32_t* tokens, bool finished, RequestScratch* scratch) {
  const Request request = request_at(params, index);
  const int num_branches = params.num_branches;
  const int prompt_length = scratch->prompt_length;
  BranchRow* rows = scratch->rows;

  const bool has_drafts = params.settings.drafts.count > 0;
  const bool is_open_step = phase == kPhaseBlock && params.settings.query_span == kSpanOpen;
  bool asking = false;
  if (phase == kPhaseRefresh) {
    for (int n = 0; n < num_branches; ++n) asking |= runs(rows[n], finished) && rows[n].needs_refresh;
    // A request that does not ask for it waits.
    if (!has_drafts) find_distinct_rows(group, params, request, tokens, finished || !asking, rows);
  }
  for (int n = group.rank(); n < num_branches; n += group.size()) {
    const int64_t r = request.first_row + n;
    if (phase == kPhaseInit) rows[n].source_row = static_cast<int32_t>(request.first_row);
    // Drafts go on from the result of a full forward.
    if (phase == kPhaseRefresh && has_drafts) {
      rows[n].source_row = asking ? static_cast<int32_t>(request.first_row) : -1;
    }
    if (phase == kPhaseBlock) {
      plan_block_denoise(params, runs(rows[n], finished) && is_open(rows[n]), prompt_length, r, &rows[n]);
    } else {
      plan_full_forward(params, phase, prompt_length, r, &rows[n]);
    }
    params.out_plan.query_start[r] = rows[n].query_start;
    params.out_plan.query_end[r] = rows[n].query_end;
    params.out_plan.source_row[r] = rows[n].source_row;
  }
  group.sync();
  list_open_queries(group, params, request, is_open_step, tokens, prompt_length, rows);
  plan_predictions(group, params, request, phase, is_open_step, tokens, prompt_length, scratch);
  group.sync();

  const bool is_broken = params.state.non_finite[index] > 0;
  RequestCounts counts{finished ? 0 : 1, 0, scratch->predictions, 0};
  for (int n = 0; n < num_branches; ++n) {
    counts.query_tokens += rows[n].query_end - rows[n].query_start;
    counts.stalled += is_broken || rows[n].decoded > params.gen_length;
  }
  return counts;
}

BBK_HD void write_flags(const PolicyParams& params, Phase phase, const RequestCounts& counts) {
  params.out_plan.flags[0] = counts.running;
  params.out_plan.flags[1] = phase;
  params.out_plan.flags[2] = counts.query_tokens;
  params.out_plan.flags[3] = counts.predictions;
  params.out_plan.flags[4] = counts.stalled;
}

}  // namespace bbk
