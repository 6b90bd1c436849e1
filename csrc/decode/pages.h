#pragma once

#include "common/params.h"

namespace bbk {

constexpr int kMaxPageBranches = 32;
constexpr int kMaxMoveLists = 64;

// page_table[r] = page_table[source_row[r]] for all rows at once; a source of -1 or r leaves the row as it
// is.
struct SharePagesParams {
  int32_t* page_table;  // [num_rows, pages_per_row], written
  int64_t page_table_stride;
  const int32_t* source_row;  // [num_rows]
  // [num_rows * pages_per_row] scratch, for so many rows that a column has no room in shared memory, or null.
  int32_t* workspace;
  int32_t num_rows;
  int32_t pages_per_row;
};

// Copy on write, as blockbatch_kernels/reference/pages.py chooses the pages. The chunk of a page in one layer
// and side is `chunk_bytes` of dense memory; strides in bytes.
struct CopyPagesParams {
  char* kv_cache;  // [num_layers, 2, pages, chunk], written
  int64_t layer_stride;
  int64_t side_stride;
  int64_t page_stride;
  int64_t chunk_bytes;
  int32_t num_layers;
  int32_t page_size;
  int32_t* page_table;  // [num_requests * num_branches, pages_per_row], written
  int64_t page_table_stride;
  const int32_t* write_start;  // [num_requests * num_branches]
  const int32_t* write_end;
  // [num_requests * num_branches, write_positions_size] positions, ascending, of which [write_start,
  // write_end) are written; null: the positions [write_start, write_end) are.
  const int32_t* write_positions;
  int64_t write_positions_size;
  int32_t num_requests;
  int32_t num_branches;
  int32_t pages_per_row;
  // With a pool: ids of any allocator, of pages that any row may be given. Without, all is null.
  bool has_pool;
  const int32_t* free_pages;  // [num_free_pages]
  int32_t* counts;            // [2]: pages left, written, and pages that were not there, added to
  int32_t* workspace;  // [2 * num_pages + num_requests * num_branches * pages_per_row + num_free_pages]
  int32_t num_free_pages;
  int32_t num_pages;  // of kv_cache
  // Scratch: as many lists of moves as `num_move_lists` says, each with room for the moves of its columns.
  int32_t* num_moves;  // [kMaxMoveLists]
  int32_t* moves;      // [num_requests * num_branches * pages_per_row, 2]: source page, destination page
};

// device = -1 in `launch`: the tensors are in host memory and the calling thread does the work.
void share_pages(const SharePagesParams& params, const Launch& launch);

// Two launches: the first moves table entries, the second the contents.
void copy_pages(const CopyPagesParams& params, const Launch& launch);

}  // namespace bbk
