// What a product of q, k and v does with its sums: round, rotate q and k, store.
#pragma once

#include "gemm/shape.cuh"
#include "layer/rope.cuh"

namespace bbk {

// A thread's share in the 64 rows of its warpgroup, which are 32 places of one head, each in both halves:
// eight of these places of every 32nd token; with kByWarp of every 8th among 32 tokens of its warp.
template <class S, bool kByWarp = false>
struct RotatedRows {
  using T = typename S::T;
  using Eight = Run<T, 8>;
  static constexpr int kTokens = 16 * S::kMaxPairs;  // that this CTA writes
  static constexpr int kTurns = (kTokens + 31) / 32;
  static_assert(!kByWarp || kTokens == 128, "as many tokens as threads");
  // Angles of few tokens are fetched before the product, so that nothing waits for them. Those of many would
  // take the registers of the sums, and are fetched together behind them.
  static constexpr bool kAnglesAhead = kTurns <= 2 && !kByWarp;

  int counted_head;  // through those of q, k and v; beyond the last one: nothing to write
  int first_place;   // of the warpgroup
  int position[kTurns];
  int slot[kTurns];
  Angles<8> angles[kTurns];

  __device__ __forceinline__ static int first_token(const GemmArgs& args) {
    const int of_share = S::kMulticast > 1 ? blockIdx.z * args.box_tokens : 0;
    return S::kSplitK > 1 ? of_share + static_cast<int>(blockIdx.y) * kTokens : of_share;
  }
  __device__ __forceinline__ static int token_of(int turn) {
    const int thread = threadIdx.x % 128;
    return kByWarp ? thread / 32 * 32 + thread % 32 / 4 + 8 * turn : thread / 4 + 32 * turn;
  }
  __device__ __forceinline__ static int column() { return threadIdx.x % 4 * 8; }
  __device__ __forceinline__ bool exists(const RopeKvWriteParams& rope) const {
    return counted_head < rope.num_heads + 2 * rope.num_kv_heads;
  }

  __device__ __forceinline__ void load_head(const RopeKvWriteParams& rope, int first_row, int group) {
    const int half = rope.head_dim / 2;
    const int first_pair = (first_row + group * 64) / 2;  // of places, one of each half
    counted_head = first_pair / half;
    first_place = first_pair % half;
  }

  // -1 for a slot outside of the cache, which has `slots`.
  __device__ __forceinline__ static int checked_slot(int64_t place, int64_t slots) {
    return place < slots ? static_cast<int>(max(place, int64_t{-1})) : -1;
  }

  // Everything but the sums; behind wait_for_predecessors().
  template <class Args>
  __device__ __forceinline__ void load(const Args& args, int first_row, int group) {
    const RopeKvWriteParams& rope = args.rope;
    load_head(rope, first_row, group);
    const int64_t slots = rope.num_pages * rope.page_size;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int token = first_token(args) + token_of(turn);
      const bool exists = token_of(turn) < args.box_tokens && token < args.num_tokens;
      position[turn] = exists ? rope.positions[token] : -1;
      slot[turn] = checked_slot(exists ? rope.slots[token] : -1, slots);
    }
    if (kAnglesAhead) load_all_angles(rope);
  }

  __device__ __forceinline__ void load_all_angles(const RopeKvWriteParams& rope) {
    if (counted_head >= rope.num_heads + rope.num_kv_heads) {  // v is not rotated
      // Of the tile before they would stay in registers.
      if constexpr (kByWarp) {
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) angles[turn] = {};
      }
      return;
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      angles[turn] = load_angles<8>(rope, position[turn], first_place + column());
    }
  }

  // What belongs to the row of the weight whose sums are a thread's lower ones; what belongs to the upper
  // ones lies half a head further on.
  template <typename Element>
  __device__ __forceinline__ const Element* of_row(const Element* rows, const RopeKvWriteParams& rope) const {
    const int warp = threadIdx.x % 128 / 32;
    const int lane = threadIdx.x % 32;
    return rows + counted_head * rope.head_dim + first_place + warp * 8 + lane / 4;
  }

  // Of a thread's two rows.
  template <class Args>
  __device__ __forceinline__ float2 bias(const Args& args) const {
    const T* bias = static_cast<const T*>(args.bias);
    if (bias == nullptr || !exists(args.rope)) return make_float2(0.0f, 0.0f);
    const T* place = of_row(bias, args.rope);
    return make_float2(to_float(place[0]), to_float(place[args.rope.head_dim / 2]));
  }

  template <int kPart = 0, class Args>
  __device__ __forceinline__ void write(const float (&sums)[S::kTokens / 2], unsigned char* staging,
                                        const Args& args, int group) {
    write_from<kPart, false>(sums, staging, args, group, make_float2(0.0f, 0.0f), first_token(args));
  }

  // Through shared memory, so that neighbouring places leave together. kHasBias: it is given.
  template <int kPart, bool kHasBias, class Args>
  __device__ __forceinline__ void write_from(const float (&sums)[S::kTokens / 2], unsigned char* staging,
                                             const Args& args, int group, float2 bias, int first_token) {
    const RopeKvWriteParams& rope = args.rope;
    constexpr int kFirst = 2 * S::template kPartBegin<kPart>;
    const bool is_there = exists(rope);
    const int warp = threadIdx.x % 128 / 32;
    const int lane = threadIdx.x % 32;
    const int matrix = lane / 8;
    if (const T* all = static_cast<const T*>(args.bias); !kHasBias && all != nullptr && is_there) {
      const T* place = all + counted_head * rope.head_dim + first_place + warp * 8 + lane / 4;
      bias.x = to_float(place[0]);
      bias.y = to_float(place[rope.head_dim / 2]);
    }
#pragma unroll
    for (int j = 0; j < kTokens / 8; j += 2) {
      const float* d = &sums[4 * (kFirst + j)];
      const int token = 8 * (j + matrix / 2) + lane % 8;
      const int half_column = warp * 8 + 32 * (matrix % 2);
      store_four_matrices_transposed(
          shared_address(staging) + (token * S::kStagingPitch + half_column) * 2,
          pack_pair<T>(d[0] + bias.x, d[1] + bias.x), pack_pair<T>(d[2] + bias.y, d[3] + bias.y),
          pack_pair<T>(d[4] + bias.x, d[5] + bias.x), pack_pair<T>(d[6] + bias.y, d[7] + bias.y));
    }
    if (!kAnglesAhead) load_all_angles(rope);
    if constexpr (S::kAnyCache) {
      const RopeHead head = rope_head(rope, counted_head);
      if (rope.k_scale != nullptr && !head.is_q) {
        const float scale = exists(rope) ? cache_scale<true>(rope, head) : 1.0f;
        named_barrier(2 + group, 128);
        if (!is_power_of_two(scale)) return write_turns_divided(staging, args, first_token, scale);
        return write_turns<true>(staging, args, first_token, __frcp_rn(scale));
      }
    }
    named_barrier(2 + group, 128);
    write_turns<false>(staging, args, first_token, 1.0f);
  }

  // What is staged, rotated, to where it goes; kInverse: into a cache in e4m3, by the inverse of its scale.
  template <bool kInverse, class Args>
  __device__ __forceinline__ void write_turns(const unsigned char* staging, const Args& args, int first_token,
                                              float scale) {
    const RopeKvWriteParams& rope = args.rope;
    if (!exists(rope)) return;
    const RopeHead head = rope_head(rope, counted_head);
    const int num_tokens = min(args.num_tokens - first_token, args.box_tokens);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int token = token_of(turn);
      if (token >= num_tokens) break;
      const T* staged = reinterpret_cast<const T*>(staging) + token * S::kStagingPitch + column();
      Eight first = *reinterpret_cast<const Eight*>(staged);
      Eight second = *reinterpret_cast<const Eight*>(staged + 32);
      if (!head.is_v) rotate(first, second, angles[turn]);
      write_halves<kInverse, kInverse>(rope, first_token + token, slot[turn], head, first_place + column(),
                                       first, second, scale);
    }
  }

  // The same of k or v by a scale that is no power of two. Divisions are many instructions: one copy of them
  // serves all turns, which leave what they rotate where it was staged.
  template <class Args>
  __device__ __forceinline__ void write_turns_divided(unsigned char* staging, const Args& args,
                                                      int first_token, float scale) {
    const RopeKvWriteParams& rope = args.rope;
    if (!exists(rope)) return;
    const RopeHead head = rope_head(rope, counted_head);
    const int num_tokens = min(args.num_tokens - first_token, args.box_tokens);
    const auto staged = [&](int turn) {
      return reinterpret_cast<T*>(staging) + token_of(turn) * S::kStagingPitch + column();
    };
    if (!head.is_v) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        if (token_of(turn) >= num_tokens) break;
        Eight first = *reinterpret_cast<const Eight*>(staged(turn));
        Eight second = *reinterpret_cast<const Eight*>(staged(turn) + 32);
        rotate(first, second, angles[turn]);
        *reinterpret_cast<Eight*>(staged(turn)) = first;
        *reinterpret_cast<Eight*>(staged(turn) + 32) = second;
      }
    }
#pragma unroll 1
    for (int turn = 0; turn < kTurns; ++turn) {
      if (token_of(turn) >= num_tokens) break;
      int own_slot = slot[0];
#pragma unroll
      for (int other = 1; other < kTurns; ++other) own_slot = turn == other ? slot[other] : own_slot;
      write_halves<true>(rope, first_token + token_of(turn), own_slot, head, first_place + column(),
                         *reinterpret_cast<const Eight*>(staged(turn)),
                         *reinterpret_cast<const Eight*>(staged(turn) + 32), scale);
    }
  }
};

}  // namespace bbk
