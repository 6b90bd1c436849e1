// What the attention kernels share: the order of the work, and how a plan's tiles are read.
#pragma once

#include "attention.h"
#include "common.cuh"

namespace bbk {

// Partial results carry their log-sum-exp in base 2.
constexpr float kLog2e = 1.4426950408889634f;

// One (tile, kv head) of the plan, or a part of its rows where they are more than a CTA holds. Row i stands
// for query head `kv_head * group + i % group` of the token query_order[piece, first + i / group].
struct AttentionItem {
  int kv_head;
  int piece;
  int first;
  int row;        // whose pages are read
  int first_row;  // of the tile's rows
  int num_rows;   // nothing to do if 0
  int key_start;
  int key_end;
};

// CTAs walk over the items to and fro, so that one with a long item early gets a late and so a short one.
// -1: none in this round.
__device__ __forceinline__ int item_of_round(int round, int num_items) {
  const int place = round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int item = round * gridDim.x + place;
  return item < num_items ? item : -1;
}

__host__ __device__ inline int parts_of_tile(const AttentionParams& params, int rows_per_item) {
  const int rows = params.tile_tokens * (params.num_heads / params.num_kv_heads);
  return (rows + rows_per_item - 1) / rows_per_item;
}

__device__ __forceinline__ AttentionItem read_item(const AttentionParams& params, int item,
                                                   int rows_per_item) {
  const int parts = parts_of_tile(params, rows_per_item);
  const int part = item / params.num_kv_heads % parts;
  const int4 tile = reinterpret_cast<const int4*>(params.tiles)[item / params.num_kv_heads / parts];
  AttentionItem out;
  out.kv_head = item % params.num_kv_heads;
  out.piece = tile.x;
  out.first = tile.y;
  out.row = tile.w;
  out.first_row = part * rows_per_item;
  const int rows = tile.z * (params.num_heads / params.num_kv_heads) - out.first_row;
  out.key_start = params.pieces[2 * out.piece];
  // The table's own end guards against lengths that it cannot hold.
  const int length = min(params.seqlens_k[out.row], params.pages_per_row * params.page_size);
  out.key_end = min(params.pieces[2 * out.piece + 1], length);
  out.num_rows = out.key_end > out.key_start ? max(0, min(rows, rows_per_item)) : 0;
  return out;
}

// Packed token and query head of an item's row.
__device__ __forceinline__ int2 token_and_head(const AttentionParams& params, const AttentionItem& item,
                                               int row) {
  const int group = params.num_heads / params.num_kv_heads;
  const int place = item.first_row + row;
  const int token =
      params.query_order[static_cast<int64_t>(item.piece) * params.num_tokens + item.first + place / group];
  return make_int2(token, item.kv_head * group + place % group);
}

// Whether the row of a token reaches into one piece alone: then there is nothing to combine.
__device__ __forceinline__ bool single_piece(const AttentionParams& params, int token) {
  return params.counts[1] == 1 || params.pieces[2] >= params.seqlens_k[params.token_row[token]];
}

// Tokens that belong to no row, or to one without keys.
template <typename T>
__device__ __forceinline__ void zero_padding(const AttentionParams& params) {
  const int64_t size = static_cast<int64_t>(params.num_heads) * params.head_dim;
  for (int token = blockIdx.x; token < params.num_tokens; token += gridDim.x) {
    if (params.token_row[token] >= 0) continue;
    T* out = static_cast<T*>(params.out) + token * size;
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) out[i] = from_float<T>(0.0f);
  }
}

// CTAs of a persistent kernel: as many as run at once, but no more than items.
template <typename Kernel>
int persistent_grid(Kernel kernel, int threads, size_t shared_bytes, const AttentionParams& params,
                    int rows_per_item, int device, const char* op) {
  // The kernel's limit is raised on every call: it costs a microsecond of host time and holds per device.
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared_bytes)),
             op);
  int per_processor = 0;
  int processors = 0;
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared_bytes),
             op);
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), op);
  const int64_t items =
      static_cast<int64_t>(params.max_tiles) * params.num_kv_heads * parts_of_tile(params, rows_per_item);
  const int64_t resident = static_cast<int64_t>(max(per_processor, 1)) * processors;
  return static_cast<int>(items < resident ? max(items, int64_t{1}) : resident);
}

// attention_mma.cu: bf16 and fp16 with a head_dim of 64 or 128 on the tensor cores.
bool attention_mma_serves(const AttentionParams& params);
void attention_mma(const AttentionParams& params, const Launch& launch);

// attention_plain.cu: any dtype and alignment, head_dim up to 256, fp32 arithmetic.
void attention_plain(const AttentionParams& params, const Launch& launch);

}  // namespace bbk
