// What the attention kernels share: the order of the work, and how a plan's tiles are read.
#pragma once

#include "attention/attention.h"
#include "common/elements.cuh"
#include "common/launch.cuh"

namespace bbk {

// Partial results carry their log-sum-exp in base 2.
constexpr float kLog2e = 1.4426950408889634f;

// What a persistent kernel works on at a time: one (tile, kv head) of the plan, or a part of its rows where
// they are more than a CTA holds. Row i stands for query head `kv_head * group + i % group` of the token
// query_order[piece, first + i / group].
struct WorkTile {
  int kv_head;
  int piece;
  int first;
  int row;        // whose pages are read
  int first_row;  // of the tile's rows
  int num_rows;   // nothing to do if 0
  int key_start;
  int key_end;
};

// The places where work tiles are worked on, CTAs or parts of them, walk over them to and fro, so that one
// with a long work tile early gets a late and so a short one. -1: none in this round.
__device__ __forceinline__ int work_tile_of_round(int round, int num_work_tiles, int place, int num_places) {
  const int index = round * num_places + (round % 2 ? num_places - 1 - place : place);
  return index < num_work_tiles ? index : -1;
}

__host__ __device__ inline int parts_of_tile(const AttentionParams& params, int rows_per_work_tile) {
  const int rows = params.tile_tokens * (params.num_heads / params.num_kv_heads);
  return (rows + rows_per_work_tile - 1) / rows_per_work_tile;
}

__device__ __forceinline__ WorkTile read_work_tile(const AttentionParams& params, int index,
                                                   int rows_per_work_tile) {
  const int parts = parts_of_tile(params, rows_per_work_tile);
  const int part = index / params.num_kv_heads % parts;
  const int4 tile = reinterpret_cast<const int4*>(params.tiles)[index / params.num_kv_heads / parts];
  WorkTile out;
  out.kv_head = index % params.num_kv_heads;
  out.piece = tile.x;
  out.first = tile.y;
  out.row = tile.w;
  out.first_row = part * rows_per_work_tile;
  const int rows = tile.z * (params.num_heads / params.num_kv_heads) - out.first_row;
  out.key_start = params.pieces[2 * out.piece];
  // The table's own end guards against lengths that it cannot hold.
  const int length = min(params.seqlens_k[out.row], params.pages_per_row * params.page_size);
  out.key_end = min(params.pieces[2 * out.piece + 1], length);
  out.num_rows = out.key_end > out.key_start ? max(0, min(rows, rows_per_work_tile)) : 0;
  return out;
}

// Packed token and query head of a work tile's row.
__device__ __forceinline__ int2 token_and_head(const AttentionParams& params, const WorkTile& work, int row) {
  const int group = params.num_heads / params.num_kv_heads;
  const int place = work.first_row + row;
  const int token =
      params.query_order[static_cast<int64_t>(work.piece) * params.num_tokens + work.first + place / group];
  return make_int2(token, work.kv_head * group + place % group);
}

// Whether the row of a token reaches into one piece alone: then there is nothing to combine.
__device__ __forceinline__ bool single_piece(const AttentionParams& params, int token) {
  return params.counts[1] == 1 || params.pieces[2] >= params.seqlens_k[params.token_row[token]];
}

// Tokens that belong to no row, or to one without keys. Run by num_threads threads of every CTA.
template <typename T>
__device__ __forceinline__ void zero_padding(const AttentionParams& params, int thread, int num_threads) {
  const int64_t size = static_cast<int64_t>(params.num_heads) * params.head_dim;
  for (int token = blockIdx.x; token < params.num_tokens; token += gridDim.x) {
    if (params.token_row[token] >= 0) continue;
    T* out = static_cast<T*>(params.out) + token * size;
    for (int64_t i = thread; i < size; i += num_threads) out[i] = from_float<T>(0.0f);
  }
}

// The plan and the page table have mostly left L2 since the layer before; the first lookups of a work tile
// depend on each other, and would each wait for memory. Hints alone, so that it may run before
// wait_for_predecessors().
__device__ __forceinline__ void prefetch_plan(const AttentionParams& params) {
  constexpr int64_t kLine = 128;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * kLine;
  const auto prefetch = [&](const void* array, int64_t bytes) {
    for (int64_t i = thread * kLine; i < bytes; i += step) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(array) + i));
    }
  };
  prefetch(params.counts, 8);
  prefetch(params.tiles, 16 * static_cast<int64_t>(params.max_tiles));
  prefetch(params.pieces, 8 * params.max_pieces);
  prefetch(params.seqlens_k, 4 * params.num_rows);
  prefetch(params.page_table, 4 * ((params.num_rows - 1) * params.page_table_stride + params.pages_per_row));
  prefetch(params.query_order, 4 * static_cast<int64_t>(params.num_tokens));  // of the first piece
  prefetch(params.token_row, 4 * params.num_tokens);
}

// The grid of a persistent kernel: as many CTAs as run at once, but no more than work tiles.
template <auto kKernel>
dim3 persistent_grid(const char* op, const Launch& launch, const AttentionParams& params, int threads,
                     int shared_bytes, int rows_per_work_tile) {
  const int64_t work_tiles = static_cast<int64_t>(params.max_tiles) * params.num_kv_heads *
                             parts_of_tile(params, rows_per_work_tile);
  const int64_t resident = resident_ctas<kKernel>(op, launch.device, threads, shared_bytes);
  return dim3(static_cast<unsigned>(work_tiles < 1 ? 1 : work_tiles < resident ? work_tiles : resident));
}

// Keys that one copy moves: the largest power of two that divides a page, up to 64.
__host__ __device__ constexpr int box_keys(int page_size) {
  int keys = 1;
  while (keys < kStageKeys && page_size % (2 * keys) == 0) keys *= 2;
  return keys;
}

// sm90.cu: what attention_mma takes, with pages of a multiple of 8 keys, on a GPU of sm_90.
bool attention_sm90_serves(const AttentionParams& params, const Launch& launch);
void attention_sm90(const AttentionParams& params, const Launch& launch);

// stream_k.cu: the same, from the plan's units, without partial results of pieces.
void attention_stream_k(const AttentionParams& params, const Launch& launch);

// mma.cu: bf16 and fp16 with a head_dim of 64 or 128 on the tensor cores.
bool attention_mma_serves(const AttentionParams& params);
void attention_mma(const AttentionParams& params, const Launch& launch);

// plain.cu: any dtype and alignment, head_dim up to 256, fp32 arithmetic.
void attention_plain(const AttentionParams& params, const Launch& launch);

}  // namespace bbk
