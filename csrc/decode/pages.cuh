// The tables: sharing, which page each row writes to, and which pages must be copied for it.
#pragma once

#include "common/group.cuh"
#include "decode/pages.h"

namespace bbk {

BBK_HD int source_of(const SharePagesParams& params, int row) {
  const int source = params.source_row[row];
  return source >= 0 && source < params.num_rows ? source : row;
}

// Group: `columns` columns of the whole table from `first` on. It holds what is to be written in `entries`
// [num_rows, columns] first, so that all rows read the table as it was.
BBK_HD void share_columns(const Group& group, const SharePagesParams& params, int first, int columns,
                          int32_t* entries) {
  for (int pass = 0; pass < 2; ++pass) {
    for (int i = group.rank(); i < params.num_rows * columns; i += group.size()) {
      const int row = i / columns, column = first + i % columns;
      const int source = source_of(params, row);
      if (source == row || column >= params.pages_per_row) continue;
      if (pass == 0) entries[i] = params.page_table[source * params.page_table_stride + column];
      if (pass == 1) params.page_table[row * params.page_table_stride + column] = entries[i];
    }
    group.sync();
  }
}

struct Move {
  int32_t source;
  int32_t destination;
};

// The columns of all requests, cut into as many parts as there are lists; a list has room for all moves of
// its columns.
struct MoveList {
  int64_t first_column;
  int64_t behind;
  Move* moves;
};

BBK_HD MoveList move_list(const CopyPagesParams& params, int index, int num_lists) {
  const int64_t columns = static_cast<int64_t>(params.num_requests) * params.pages_per_row;
  const int64_t per_list = (columns + num_lists - 1) / num_lists;
  const int64_t first = smaller(index * per_list, columns);
  Move* moves = reinterpret_cast<Move*>(params.moves);
  return MoveList{first, smaller(first + per_list, columns), moves + first * params.num_branches};
}

// Positions that a row is about to write: [start, end), or those in its list from place `start` to `end`.
struct Write {
  int start;
  int end;
  const int32_t* list;  // ascending, or null

  // The first place in the list whose position is not below `position`.
  BBK_HD int find(int position) const {
    int low = start, high = end;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (list[middle] < position) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
  BBK_HD bool touches(int first, int behind) const {
    if (start >= end) return false;
    if (list == nullptr) return start < behind && end > first;
    const int place = find(first);
    return place < end && list[place] < behind;
  }
  BBK_HD bool covers(int first, int behind) const {
    if (list == nullptr) return start <= first && end >= behind;
    return find(behind) - find(first) == behind - first;
  }
};

BBK_HD Write write_of(const CopyPagesParams& params, int64_t row) {
  const int32_t* list = params.write_positions;
  if (list != nullptr) list += row * params.write_positions_size;
  return Write{params.write_start[row], params.write_end[row], list};
}

// One thread: chooses the pages of one column of a request, branch after branch, and writes them to the
// table. The moves go to `moves` [num_branches]; returns their number.
BBK_HD int choose_pages(const CopyPagesParams& params, int request, int column, Move* moves) {
  const int num_branches = params.num_branches;
  const int64_t first_row = static_cast<int64_t>(request) * num_branches;
  const int start = column * params.page_size, end = start + params.page_size;
  bool touched = false;
  for (int n = 0; n < num_branches; ++n) touched |= write_of(params, first_row + n).touches(start, end);
  if (!touched) return 0;

  int32_t* entries = params.page_table + first_row * params.page_table_stride + column;
  const auto page_of = [&](int choice) {
    return static_cast<int32_t>((first_row + choice) * params.pages_per_row + column);
  };
  int choices[kMaxPageBranches];  // which of its column's pages each row uses; -1: none
  for (int n = 0; n < num_branches; ++n) {
    const int32_t page = entries[n * params.page_table_stride];
    choices[n] = page < 0 ? -1 : page / params.pages_per_row - static_cast<int>(first_row);
  }
  int count = 0;
  for (int n = 0; n < num_branches; ++n) {
    const Write write = write_of(params, first_row + n);
    if (!write.touches(start, end)) continue;
    const int own = choices[n];
    uint32_t used = 0;
    int users = 0;
    for (int other = 0; other < num_branches; ++other) {
      users += choices[other] == own;
      if (choices[other] >= 0 && choices[other] < num_branches) used |= 1u << choices[other];
    }
    if (own >= 0 && users <= 1) continue;
    choices[n] = lowest_bit(~used);  // fewer than num_branches pages are in use when a row must leave its own
    if (own >= 0 && !write.covers(start, end)) moves[count++] = Move{page_of(own), page_of(choices[n])};
    entries[n * params.page_table_stride] = page_of(choices[n]);
  }
  return count;
}

// Group: the columns of a list. Every target was unused and every source is still in use, so the order of the
// moves does not matter, and neither does that of the list.
BBK_HD void choose_list(const Group& group, const CopyPagesParams& params, int index, int num_lists,
                        int* length) {
  const MoveList list = move_list(params, index, num_lists);
  if (group.rank() == 0) *length = 0;
  group.sync();
  for (int64_t i = list.first_column + group.rank(); i < list.behind; i += group.size()) {
    Move moves[kMaxPageBranches];
    const int count = choose_pages(params, static_cast<int>(i / params.pages_per_row),
                                   static_cast<int>(i % params.pages_per_row), moves);
    if (count == 0) continue;
    const int first = group.add(length, count);
    for (int k = 0; k < count; ++k) list.moves[first + k] = moves[k];
  }
  group.sync();
  if (group.rank() == 0) params.num_moves[index] = *length;
}

// Contents

// A piece of a page's chunk in one layer and side that a group copies at once.
struct CopyTask {
  const char* from;
  char* to;
  int64_t bytes;
};

struct CopyShape {
  int64_t tile_bytes;
  int64_t tiles_per_chunk;
  int64_t tasks_per_move;
};

BBK_HD CopyShape copy_shape(const CopyPagesParams& params, int64_t tile_bytes) {
  const int64_t tiles = (params.chunk_bytes + tile_bytes - 1) / tile_bytes;
  return CopyShape{tile_bytes, tiles, 2 * params.num_layers * tiles};
}

BBK_HD CopyTask copy_task(const CopyPagesParams& params, const CopyShape& shape, const Move& move,
                          int64_t task) {
  const int64_t offset = task % shape.tiles_per_chunk * shape.tile_bytes;
  const int64_t plane = task / shape.tiles_per_chunk;  // layer * 2 + side
  char* base = params.kv_cache + plane / 2 * params.layer_stride + plane % 2 * params.side_stride + offset;
  return CopyTask{base + move.source * params.page_stride, base + move.destination * params.page_stride,
                  smaller(shape.tile_bytes, params.chunk_bytes - offset)};
}

}  // namespace bbk
