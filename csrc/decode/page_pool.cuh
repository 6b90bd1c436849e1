// Which page each row writes to, with pages of any allocator: what `_copy_in_pool` in
// blockbatch_kernels/reference/pages.py defines. One group does it all, since a page goes to one row alone.
#pragma once

#include "decode/pages.cuh"

namespace bbk {

struct PoolScratch {
  int sums[2][kMaxTeams];
  int num_moves;
};

// The parts of the workspace.
struct PoolLists {
  // Of each page its first place in the list of free pages, or one of the two marks below.
  int32_t* place;
  int32_t* keeper;   // of each page: minus the row that may keep it, or kNobody
  int32_t* leaving;  // [rows, columns]: whether the row is about to write its page, and then must leave it
  int32_t* free;     // the pages of the list that stand nowhere in the table, in its order
};

constexpr int32_t kNotInPool = INT_MAX;
constexpr int32_t kInUse = -1;
constexpr int32_t kNobody = INT_MIN;

BBK_HD int num_rows_of(const CopyPagesParams& params) { return params.num_requests * params.num_branches; }

BBK_HD PoolLists pool_lists(const CopyPagesParams& params) {
  int32_t* keeper = params.workspace + params.num_pages;
  int32_t* leaving = keeper + params.num_pages;
  const int64_t entries = static_cast<int64_t>(num_rows_of(params)) * params.pages_per_row;
  return PoolLists{params.workspace, keeper, leaving, leaving + entries};
}

BBK_HD int32_t* table_entry(const CopyPagesParams& params, int row, int column) {
  return params.page_table + row * params.page_table_stride + column;
}

BBK_HD bool is_page(const CopyPagesParams& params, int32_t page) {
  return page >= 0 && page < params.num_pages;
}

// Group: calls visit(i, how many before i) for every i below `number` that is wanted, and returns how many
// there are. The scratch is free again after the next barrier.
template <typename Wanted, typename Visit>
BBK_HD int visit_in_order(const Group& group, int number, PoolScratch* scratch, Wanted wanted, Visit visit) {
  int before = 0, turn = 0;
  for (int base = 0; base < number; base += group.size()) {
    const int i = base + group.rank();
    const bool is_wanted = i < number && wanted(i);
    int total = 0;
    const int at = before + group.count_below(is_wanted, scratch->sums[turn], &total);
    if (is_wanted) visit(i, at);
    before += total;
    turn ^= 1;
  }
  return before;
}

// Group
BBK_HD void find_places(const Group& group, const CopyPagesParams& params, const PoolLists& lists) {
  group.for_each(params.num_pages, [&](int page) {
    lists.place[page] = kNotInPool;
    lists.keeper[page] = 0;
  });
  group.sync();
  group.for_each(params.num_free_pages, [&](int i) {
    const int32_t page = params.free_pages[i];
    if (is_page(params, page)) group.lower_to(&lists.place[page], i);
  });
  group.sync();
  group.for_each(num_rows_of(params) * params.pages_per_row, [&](int i) {
    const int32_t page = *table_entry(params, i / params.pages_per_row, i % params.pages_per_row);
    if (is_page(params, page) && lists.place[page] != kNotInPool) lists.place[page] = kInUse;
  });
  group.sync();
}

// Group: which rows must leave their page. Row after row, one that has left a page no longer shares it; so
// where all that hold a page write it, the last of them stays, and where one only reads it all writers leave.
BBK_HD void find_leaving(const Group& group, const CopyPagesParams& params, const PoolLists& lists) {
  const int entries = num_rows_of(params) * params.pages_per_row;
  group.for_each(entries, [&](int i) {
    const int row = i / params.pages_per_row, column = i % params.pages_per_row;
    const int start = column * params.page_size;
    const bool writes = write_of(params, row).touches(start, start + params.page_size);
    lists.leaving[i] = writes;
    const int32_t page = *table_entry(params, row, column);
    if (is_page(params, page)) group.lower_to(&lists.keeper[page], writes ? -row : kNobody);
  });
  group.sync();
  group.for_each(entries, [&](int i) {
    if (lists.leaving[i] == 0) return;
    const int row = i / params.pages_per_row;
    const int32_t page = *table_entry(params, row, i % params.pages_per_row);
    const bool in_pool = is_page(params, page) && lists.place[page] != kNotInPool;
    lists.leaving[i] = !in_pool || lists.keeper[page] != -row;
  });
  group.sync();
}

// Group: chooses the pages of the whole table and writes them to it, and the moves to the first list.
BBK_HD void choose_from_pool(const Group& group, const CopyPagesParams& params, PoolScratch* scratch) {
  const PoolLists lists = pool_lists(params);
  Move* moves = reinterpret_cast<Move*>(params.moves);
  if (group.rank() == 0) scratch->num_moves = 0;
  find_places(group, params, lists);
  find_leaving(group, params, lists);
  const auto is_free = [&](int i) {
    const int32_t page = params.free_pages[i];
    return is_page(params, page) && lists.place[page] == i;
  };
  const int num_free = visit_in_order(group, params.num_free_pages, scratch, is_free,
                                      [&](int i, int before) { lists.free[before] = params.free_pages[i]; });
  group.sync();
  const int num_wanted = visit_in_order(
      group, num_rows_of(params) * params.pages_per_row, scratch,
      [&](int i) { return lists.leaving[i] != 0; },
      [&](int i, int before) {
        if (before >= num_free) return;
        const int row = i / params.pages_per_row, column = i % params.pages_per_row;
        const int start = column * params.page_size;
        int32_t* entry = table_entry(params, row, column);
        const int32_t old = *entry, page = lists.free[before];
        *entry = page;
        if (!is_page(params, old) || write_of(params, row).covers(start, start + params.page_size)) return;
        moves[group.add(&scratch->num_moves, 1)] = Move{old, page};
      });
  group.sync();
  if (group.rank() != 0) return;
  params.num_moves[0] = scratch->num_moves;
  const int num_given = smaller(num_wanted, num_free);
  params.counts[0] = num_free - num_given;
  params.counts[1] += num_wanted - num_given;
}

}  // namespace bbk
