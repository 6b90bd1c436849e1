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

// Group: which predictions can still matter. One can only where the row holds MASK or EOS at the moment it is
// asked for. Sync moves tokens between branches but never adds a MASK or EOS that no branch of the request
// held before, so positions where no branch holds one need no LM head.
BBK_HD void plan_predictions(const Group& group, const PolicyParams& params, const Request& request,
                             const int32_t* tokens, int prompt_length, RequestScratch* scratch) {
  uint8_t* predict = params.out_plan.predict + request.first_position;
  int count = 0;
  for (int p = group.rank(); p < params.gen_length; p += group.size()) {
    bool open = false;
    for (int n = 0; n < params.num_branches; ++n) {
      const int32_t token = tokens[static_cast<int64_t>(n) * params.gen_length + p];
      open |= token == params.settings.mask_token_id || is_eos(params.settings, token);
    }
    const int query = p + prompt_length - params.settings.prediction_offset;
    for (int n = 0; n < params.num_branches; ++n) {
      const BranchRow& row = scratch->rows[n];
      const bool predicted = open && query >= row.query_start && query < row.query_end;
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

  if (phase == kPhaseRefresh) {
    bool asking = false;
    for (int n = 0; n < num_branches; ++n) asking |= runs(rows[n], finished) && rows[n].needs_refresh;
    // A request that does not ask for it waits.
    find_distinct_rows(group, params, request, tokens, finished || !asking, rows);
  }
  for (int n = group.rank(); n < num_branches; n += group.size()) {
    const int64_t r = request.first_row + n;
    if (phase == kPhaseInit) rows[n].source_row = static_cast<int32_t>(request.first_row);
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
  plan_predictions(group, params, request, tokens, prompt_length, scratch);
  group.sync();

  RequestCounts counts{finished ? 0 : 1, 0, scratch->predictions, 0};
  for (int n = 0; n < num_branches; ++n) {
    counts.query_tokens += rows[n].query_end - rows[n].query_start;
    counts.stalled += rows[n].decoded > params.gen_length;
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
