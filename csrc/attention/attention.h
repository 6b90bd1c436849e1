// Attention of packed queries over paged keys: the plan that cuts a step into work, and the work itself.
#pragma once

#include "common/params.h"

namespace bbk {

// blockbatch_kernels/reference/attention_plan.py defines the plan, tuning.AttentionShape its bounds.
struct AttentionPlanParams {
  const int32_t* page_table;    // [num_rows, pages_per_row]
  const int32_t* cu_seqlens_q;  // [num_rows + 1]
  const int32_t* seqlens_k;     // [num_rows]
  int32_t* tiles;               // [max_tiles, 4], written like all below
  int32_t* query_order;         // [max_pieces, num_tokens]
  int32_t* pieces;              // [max_pieces, 2]
  int32_t* token_row;           // [num_tokens]
  int32_t* counts;              // [2]
  int32_t* units;               // [max_units, 22], nothing without block_tokens
  int32_t* stretches;           // [processors, 4]
  int32_t* arrivals;            // [2 * processors]
  int32_t* workspace;           // [attention_plan_workspace(...)], any content
  int64_t page_table_stride;    // from a row's first page to the next row's
  int num_rows;
  int pages_per_row;
  int page_size;
  int num_tokens;
  int tile_tokens;
  int segment_pages;
  int max_segments;
  int max_pieces;
  int max_tiles;
  int target_tiles;
  int min_segments;
  int block_tokens;  // 0: no units
  int processors;
  int max_units;
  int num_kv_heads;
  int max_slack;
  int num_branches;  // rows of a request, which alone are compared; 0: all rows
};

// Number of 32-bit integers that a plan needs as workspace.
int64_t attention_plan_workspace(int num_rows, int max_segments, int max_pieces, int num_tokens,
                                 int block_tokens);

void attention_plan(const AttentionPlanParams& params, const Launch& launch);

// The same code on the host: all pointers are host memory.
void attention_plan_on_host(const AttentionPlanParams& params);

constexpr int kStageKeys = 64;  // of the kernels that take tiles
constexpr int kUnitKeys = 128;  // at most, of a unit

// The keys of a stage, for the tokens of a tile that read them. A tile holds two blocks of tokens.
struct AttentionUnit {
  int32_t tile_begin;  // units of the tile
  int32_t tile_end;
  int32_t first_token[2];  // of each block
  int32_t num_tokens[2];
  int32_t num_keys;
  int32_t first_slot;  // in the first page
  uint64_t tokens[2];  // of each block, a bit for every token that reads the keys
  int32_t pages[8];    // of each copy
  int32_t read_once;   // no other tile reads the keys
  int32_t reserved;
};

// out[t, h] = softmax(softmax_scale * q[t, h] . K) V over all keys of the token's row. Strides count
// elements; the last stride of every tensor is 1.
struct AttentionParams {
  const void* q;        // [num_tokens, num_heads, head_dim]
  const void* k_cache;  // [pages, page_size, num_kv_heads, head_dim]
  const void* v_cache;
  const float* k_scale;  // [num_kv_heads]: the caches hold e4m3, to be multiplied by these; null: they do not
  const float* v_scale;
  void* out;  // [num_tokens, num_heads, head_dim], contiguous, written
  // [max_pieces, num_tokens, num_heads, head_dim], unused with one piece; or attention_even_partials(...)
  float* partial_out;
  float* partial_lse;          // [max_pieces, num_tokens, num_heads], base 2 logarithms
  const int32_t* page_table;   // [rows, pages_per_row]
  const int32_t* seqlens_k;    // [rows]
  const int32_t* tiles;        // the plan
  const int32_t* query_order;  // [max_pieces, num_tokens]
  const int32_t* pieces;       // [max_pieces, 2]
  const int32_t* token_row;    // [num_tokens]
  const int32_t* counts;       // [2]
  const int32_t* units;        // [max_units, 22]: a record with their number, then the units
  const int32_t* stretches;    // [num_processors, 4]
  int32_t* arrivals;           // [2 * num_processors], zero before and after
  int64_t page_table_stride;
  int64_t q_token_stride;
  int64_t q_head_stride;
  int64_t k_page_stride;
  int64_t k_token_stride;
  int64_t k_head_stride;
  int64_t v_page_stride;
  int64_t v_token_stride;
  int64_t v_head_stride;
  int num_rows;
  int num_pages;
  int num_tokens;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int page_size;
  int pages_per_row;
  int tile_tokens;
  int max_tiles;
  int max_pieces;
  int max_units;       // records of `units`; 0: the plan has none
  int num_processors;  // that share the units
  float softmax_scale;
  DType dtype;        // of q, of out, and of the caches unless they hold e4m3
  bool programmatic;  // wait on the device for the kernel before, instead of being launched after it
};

// Number of floats of partial_out for the kernel that takes units; 0 where it does not serve.
constexpr int64_t attention_even_partials(int num_processors, int head_dim, DType dtype) {
  if (dtype == DType::kFloat32 || (head_dim != 64 && head_dim != 128)) return 0;
  return static_cast<int64_t>(num_processors) * (head_dim + 8) * 128;
}

// Throws std::invalid_argument for a head_dim above 256 and for a softmax_scale that is not positive.
void varlen_attention(const AttentionParams& params, const Launch& launch);

}  // namespace bbk
