// Packing of one stretch of one row, executed by one group. A group finds out itself how many tokens and
// predictions stand before its own: it counts what is wanted in the rows before, which takes a few loads from
// L2 and spares a second launch or a chain of waiting groups.
#pragma once

#include "common/group.cuh"
#include "decode/pack.h"

namespace bbk {

constexpr int kStretch = 1024;  // packed tokens of a row that one group handles

BBK_HD int row_length(const PackParams& params, int row) {
  return larger(params.query_end[row] - params.query_start[row], 0);
}

// Canvas position of the query `index` of a row.
BBK_HD int position_of(const PackParams& params, int row, int index) {
  const int place = params.query_start[row] + index;
  if (params.query_position == nullptr) return place;
  return params.query_position[static_cast<int64_t>(row) * (params.gen_length + 1) + place];
}

// The position that a query predicts, from the canvas position of the query.
BBK_HD int target_shift(const PackParams& params, int row) {
  return params.prediction_offset - params.prompt_length[row / params.num_branches];
}

// Generated positions [first, behind) among which the first `num_queries` queries of a row predict, and no
// others of the row.
struct Targets {
  int first;
  int behind;
};

BBK_HD Targets targets_of(const PackParams& params, int row, int num_queries) {
  const int shift = target_shift(params, row);
  if (params.query_position == nullptr) {
    const int first = params.query_start[row] + shift;
    return Targets{larger(first, 0), smaller(first + num_queries, params.gen_length)};
  }
  if (num_queries >= row_length(params, row)) return Targets{0, num_queries > 0 ? params.gen_length : 0};
  return Targets{0, larger(smaller(position_of(params, row, num_queries) + shift, params.gen_length), 0)};
}

struct PackScratch {
  int sums[4][kMaxTeams];
};

// What stands before a stretch, and in all.
struct PackOffsets {
  int tokens_before;  // of the row
  int num_tokens;
  int predictions_before;  // of the stretch
  int num_predictions;
};

constexpr int kCountStep = 16;  // predict flags that are counted with one load

// Wanted positions in [first, behind) of a row's flags, where [start, start + kCountStep) is looked at.
BBK_HD int count_flags(const uint8_t* flags, int start, int first, int behind) {
  const int from = larger(start, first), to = smaller(start + kCountStep, behind);
  if (from >= to) return 0;
#if defined(__CUDA_ARCH__)
  if (to - from == kCountStep && reinterpret_cast<uintptr_t>(flags + start) % 16 == 0) {
    const uint4 bytes = *reinterpret_cast<const uint4*>(flags + start);
    return __popc(bytes.x) + __popc(bytes.y) + __popc(bytes.z) + __popc(bytes.w);  // bytes of 0 and 1
  }
#endif
  int count = 0;
  for (int p = from; p < to; ++p) count += flags[p] != 0;
  return count;
}

BBK_HD PackOffsets count_before(const Group& group, const PackParams& params, int row, int stretch_start,
                                PackScratch* scratch) {
  PackOffsets local{0, 0, 0, 0};
  for (int r = group.rank(); r < params.num_rows; r += group.size()) {
    const int length = row_length(params, r);
    local.num_tokens += length;
    if (r < row) local.tokens_before += length;
  }
  // As many ranks share a row as there are to spare.
  int sharing = 1;
  while (sharing < kTeamSize && 2 * sharing * params.num_rows <= group.size()) sharing *= 2;
  for (int r = group.rank() / sharing; r < params.num_rows; r += group.size() / sharing) {
    const int length = row_length(params, r);
    const Targets targets = targets_of(params, r, length);
    const uint8_t* flags = params.predict + static_cast<int64_t>(r) * params.gen_length;
    int own_behind = r < row ? targets.behind : 0;
    if (r == row) own_behind = targets_of(params, r, smaller(stretch_start, length)).behind;
    const int aligned = targets.first / kCountStep * kCountStep;
    for (int start = aligned + group.rank() % sharing * kCountStep; start < targets.behind;
         start += sharing * kCountStep) {
      const int count = count_flags(flags, start, targets.first, targets.behind);
      local.num_predictions += count;
      local.predictions_before +=
          own_behind == targets.behind ? count : count_flags(flags, start, targets.first, own_behind);
    }
  }
  return PackOffsets{group.sum(local.tokens_before, scratch->sums[0]),
                     group.sum(local.num_tokens, scratch->sums[1]),
                     group.sum(local.predictions_before, scratch->sums[2]),
                     group.sum(local.num_predictions, scratch->sums[3])};
}

// Writes the packed token `index` of a row: its canvas position is `position`.
BBK_HD void pack_token(const PackParams& params, int row, int position, int64_t index) {
  const int request = row / params.num_branches;
  const int generated = position - params.prompt_length[request];
  int token = 0;
  if (generated >= 0) {
    token = params.tokens[static_cast<int64_t>(row) * params.gen_length +
                          smaller(generated, params.gen_length - 1)];
  } else if (params.max_prompt > 0) {
    const int in_prompt = larger(smaller(position, params.max_prompt - 1), 0);
    token = params.prompt_tokens[static_cast<int64_t>(request) * params.max_prompt + in_prompt];
  }
  const int column = position / params.page_size;
  int64_t slot = -1;
  if (position >= 0 && column < params.pages_per_row) {
    const int64_t page = params.page_table[row * params.page_table_stride + column];
    slot = page * params.page_size + position % params.page_size;
  }
  params.packed.input_ids[index] = token;
  params.packed.positions[index] = position;
  params.packed.row_index[index] = row;
  params.packed.slot_mapping[index] = slot;
}

BBK_HD void pad(const PackParams& params, const PackOffsets& offsets, int64_t rank, int64_t size) {
  for (int64_t i = offsets.num_tokens + rank; i < params.capacity; i += size) {
    params.packed.input_ids[i] = 0;
    params.packed.positions[i] = 0;
    params.packed.row_index[i] = -1;
    params.packed.slot_mapping[i] = -1;
  }
  for (int64_t i = offsets.num_predictions + rank; i < params.predict_capacity; i += size) {
    params.packed.predict_index[i] = 0;
    params.packed.predict_target[i] = -1;
  }
}

// Group: the tokens [stretch_start, stretch_end) of a row's queries and the predictions among them.
BBK_HD void pack_stretch(const Group& group, const PackParams& params, int row, int stretch_start,
                         int stretch_end, const PackOffsets& offsets, PackScratch* scratch) {
  const int shift = target_shift(params, row);
  int64_t rank = offsets.predictions_before;
  int turn = 0;
  for (int base = stretch_start; base < stretch_end; base += group.size()) {
    const int i = base + group.rank();
    const int64_t index = static_cast<int64_t>(offsets.tokens_before) + i;
    const int position = i < stretch_end ? position_of(params, row, i) : 0;
    const int target = position + shift;
    const int64_t flat_target = static_cast<int64_t>(row) * params.gen_length + target;
    const bool wanted =
        i < stretch_end && target >= 0 && target < params.gen_length && params.predict[flat_target] != 0;
    if (i < stretch_end && index < params.capacity) pack_token(params, row, position, index);
    int total = 0;
    // Two turns never share scratch memory, so one barrier a turn is enough.
    const int64_t at = rank + group.count_below(wanted, scratch->sums[turn], &total);
    if (wanted && at < params.predict_capacity) {
      // What found no room among the tokens must not be looked up there.
      const bool has_room = index < params.capacity;
      params.packed.predict_index[at] = has_room ? index : 0;
      params.packed.predict_target[at] = has_room ? flat_target : -1;
    }
    rank += total;
    turn ^= 1;
  }
}

// Group (column, row) of a grid of num_columns x num_rows groups: every num_columns-th stretch of a row.
BBK_HD void pack_group(const Group& group, const PackParams& params, int row, int column, int num_columns,
                       PackScratch* scratch) {
  const int length = row_length(params, row);
  const int step = num_columns * kStretch;
  int start = column * kStretch;
  PackOffsets offsets = count_before(group, params, row, smaller(start, length), scratch);
  if (column == 0 && group.rank() == 0) {
    params.packed.cu_seqlens_q[row] = offsets.tokens_before;
    if (row == params.num_rows - 1) params.packed.cu_seqlens_q[params.num_rows] = offsets.num_tokens;
  }
  const int64_t group_index = static_cast<int64_t>(row) * num_columns + column;
  pad(params, offsets, group_index * group.size() + group.rank(),
      static_cast<int64_t>(params.num_rows) * num_columns * group.size());
  while (start < length) {
    group.sync();
    pack_stretch(group, params, row, start, smaller(start + kStretch, length), offsets, scratch);
    start += step;
    if (start >= length) break;
    group.sync();
    offsets = count_before(group, params, row, start, scratch);
  }
}

}  // namespace bbk
