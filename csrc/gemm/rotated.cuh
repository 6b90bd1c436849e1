// What a product of q, k and v does with its sums: round, rotate q and k, store.
#pragma once

#include "gemm/shape.cuh"
#include "layer/rope.cuh"

namespace bbk {

// A thread's share in the 64 rows of its warpgroup, which are 32 places of one head, each in both halves:
// eight of these places of every 32nd token.
template <class S>
struct RotatedRows {
  using T = typename S::T;
  using Eight = Run<T, 8>;
  static constexpr int kTurns = (S::kTokens + 31) / 32;
  // Angles of few tokens are fetched before the product, so that nothing waits for them. Those of many would
  // take the registers of the sums, and are fetched together behind them.
  static constexpr bool kAnglesAhead = kTurns <= 2;

  int counted_head;  // through those of q, k and v; beyond the last one: nothing to write
  int first_place;   // of the warpgroup
  int position[kTurns];
  int slot[kTurns];
  Angles<8> angles[kTurns];

  __device__ __forceinline__ static int first_token(const RotatedGemmArgs& args) {
    return S::kMulticast > 1 ? blockIdx.z * args.box_tokens : 0;
  }
  __device__ __forceinline__ static int token_of(int turn) { return threadIdx.x % 128 / 4 + 32 * turn; }
  __device__ __forceinline__ static int column() { return threadIdx.x % 4 * 8; }

  // Everything but the sums; behind wait_for_predecessors().
  __device__ __forceinline__ void load(const RotatedGemmArgs& args, int first_row, int group) {
    const RopeKvWriteParams& rope = args.rope;
    const int half = rope.head_dim / 2;
    const int first_pair = (first_row + group * 64) / 2;  // of places, one of each half
    counted_head = first_pair / half;
    first_place = first_pair % half;
    const int64_t slots = rope.num_pages * rope.page_size;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int token = first_token(args) + token_of(turn);
      const bool exists = token_of(turn) < args.box_tokens && token < args.num_tokens;
      position[turn] = exists ? rope.positions[token] : -1;
      const int64_t place = exists ? rope.slots[token] : -1;
      slot[turn] = place < slots ? static_cast<int>(max(place, int64_t{-1})) : -1;
    }
    if (kAnglesAhead) load_all_angles(rope);
  }

  __device__ __forceinline__ void load_all_angles(const RopeKvWriteParams& rope) {
    if (counted_head >= rope.num_heads + rope.num_kv_heads) return;  // v is not rotated
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      angles[turn] = load_angles<8>(rope, position[turn], first_place + column());
    }
  }

  // Through shared memory, so that neighbouring places leave together.
  __device__ __forceinline__ void write(const float (&sums)[S::kTokens / 2], unsigned char* staging,
                                        const RotatedGemmArgs& args, int group) {
    const RopeKvWriteParams& rope = args.rope;
    const bool exists = counted_head < rope.num_heads + 2 * rope.num_kv_heads;
    const int warp = threadIdx.x % 128 / 32;
    const int lane = threadIdx.x % 32;
    const int matrix = lane / 8;
    const T* bias = static_cast<const T*>(args.bias);
    float bias_low = 0.0f, bias_high = 0.0f;
    if (bias != nullptr && exists) {
      const T* place = bias + counted_head * rope.head_dim + first_place + warp * 8 + lane / 4;
      bias_low = to_float(place[0]);
      bias_high = to_float(place[rope.head_dim / 2]);
    }
#pragma unroll
    for (int j = 0; j < S::kTokens / 8; j += 2) {
      const float* d = &sums[4 * j];
      const int token = 8 * (j + matrix / 2) + lane % 8;
      const int half_column = warp * 8 + 32 * (matrix % 2);
      store_four_matrices_transposed(
          shared_address(staging) + (token * S::kStagingPitch + half_column) * 2,
          pack_pair<T>(d[0] + bias_low, d[1] + bias_low), pack_pair<T>(d[2] + bias_high, d[3] + bias_high),
          pack_pair<T>(d[4] + bias_low, d[5] + bias_low), pack_pair<T>(d[6] + bias_high, d[7] + bias_high));
    }
    if (!kAnglesAhead) load_all_angles(rope);
    named_barrier(2 + group, 128);
    if (!exists) return;
    const RopeHead head = rope_head(rope, counted_head);
    const int num_tokens = min(args.num_tokens - first_token(args), args.box_tokens);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int token = token_of(turn);
      if (token >= num_tokens) break;
      const T* staged = reinterpret_cast<const T*>(staging) + token * S::kStagingPitch + column();
      Eight first = *reinterpret_cast<const Eight*>(staged);
      Eight second = *reinterpret_cast<const Eight*>(staged + 32);
      if (!head.is_v) rotate(first, second, angles[turn]);
      write_halves<false>(rope, first_token(args) + token, slot[turn], head, first_place + column(), first,
                          second);
    }
  }
};

}  // namespace bbk
