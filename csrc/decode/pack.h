#pragma once

#include "common/params.h"
#include "decode/records.h"

namespace bbk {

// The query tokens of all rows of a plan back to back; R rows, G generated positions.
struct PackParams {
  const int32_t* prompt_tokens;  // [requests, max_prompt]
  const int32_t* prompt_length;  // [requests]
  const int32_t* tokens;         // [R, G]
  const int32_t* query_start;    // [R]
  const int32_t* query_end;      // [R]
  const uint8_t* predict;        // [R, G]
  // [R, G + 1] canvas positions, ascending, of which [query_start, query_end) are a row's queries; null: the
  // positions [query_start, query_end) are.
  const int32_t* query_position;
  const int32_t* page_table;  // [R, pages_per_row]
  int64_t page_table_stride;  // from a row to the next
  PackedQueriesView packed;   // written
  int64_t capacity;
  int64_t predict_capacity;
  int32_t num_rows;
  int32_t num_branches;
  int32_t gen_length;
  int32_t max_prompt;
  int32_t pages_per_row;
  int32_t page_size;
  int32_t prediction_offset;
};

// One launch. device = -1 in `launch`: the tensors are in host memory and the calling thread does the work.
// Tokens and predictions beyond the capacities are left out.
void pack_windows(const PackParams& params, const Launch& launch);

}  // namespace bbk
