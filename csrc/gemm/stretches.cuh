// Sums of e4m3 products over K: the tensor cores add up a stretch of it, and the sums of stretches are added
// in fp32. The order of these sums is the same whatever hides the additions.
#pragma once

#include "gemm/shape.cuh"

namespace bbk {

// Blocks of K whose products the tensor cores add up before the sum is added in fp32: they keep fewer bits.
constexpr int kBlocksOfAStretch = 2;
constexpr int kAheadStretches = 4;

// A stage of the pipeline, and the parity of the round through all stages.
template <class S>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == S::kStages) stage = 0, parity ^= 1;
  }
};

// Warpgroups that start their stretches one after the other, in a ring of named barriers: between begin() and
// end() as many times take() and then pass() by each of them.
template <class S>
struct Ring {
  static constexpr int kFirstBarrier = 8;
  int group;

  __device__ __forceinline__ void begin() const {
    if (group == S::kGroups - 1) pass();
  }
  __device__ __forceinline__ void take() const { named_barrier(kFirstBarrier + group, 256); }
  __device__ __forceinline__ void pass() const {
    named_barrier_arrive(kFirstBarrier + (group + 1) % S::kGroups, 256);
  }
  __device__ __forceinline__ void end() const {
    if (group == 0) take();
  }
};

// A consumer's way through the blocks of the pipeline.
template <class S>
struct Stretches {
  using Product = Wgmma<__nv_fp8_e4m3, S::kTokens>;
  using Sums = float[S::kTokens / 2];
  static_assert(kBlocksOfAStretch == 2);

  uint64_t a, b;   // descriptors of the first stage
  uint32_t full;   // its barrier
  uint32_t empty;  // the barrier that this lane tells of a stage that has been read, of the first stage; or 0
  Ring<S> ring;
  Turn<S> turn = {};
  int before = 0;  // the stage of the block before

  __device__ __forceinline__ Stretches(uint32_t stages, uint32_t full_barrier, uint32_t empty_of_lane,
                                       int group)
      : a(matrix_descriptor(stages + group * 64 * kSwizzledRowBytes)),
        b(matrix_descriptor(stages + S::kWeightBytes)),
        full(full_barrier),
        empty(empty_of_lane),
        ring{group} {
    // Computed once: the compiler would find them again in every turn of a loop.
    asm volatile("" : "+r"(empty));
    if constexpr (S::kOverlap == Overlap::kTurns) ring.begin();
  }

  __device__ __forceinline__ void end() const {
    if constexpr (S::kOverlap == Overlap::kTurns) ring.end();
  }

  // Adds the products of the next `count` blocks.
  __device__ __forceinline__ void add(Sums& sums, int count) {
    if constexpr (S::kOverlap == Overlap::kTurns) {
      add_each<true>(sums, count);
    } else if constexpr (S::kOverlap == Overlap::kAhead) {
      add_ahead(sums, count);
    } else {
      add_each<false>(sums, count);
    }
  }

 private:
  struct Operands {
    uint64_t a, b;
  };

  // Waits for the next block.
  __device__ __forceinline__ Operands next() const {
    // Descriptors count in 16 bytes.
    const uint64_t offset = static_cast<uint32_t>(turn.stage * (S::kStageBytes / 16));
    const Operands operands = {a + offset, b + offset};
    barrier_wait(full + 8 * turn.stage, turn.parity);
    return operands;
  }

  // Starts its products; `fresh`: they replace what was there.
  static __device__ __forceinline__ void start(Sums& stretch, const Operands& of, bool fresh) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSwizzledRowBytes / Product::kK; ++k) {
      // 32 elements of K are 2.
      Product::run(stretch, of.a + 2 * k, of.b + 2 * k, !fresh || k > 0);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void start(Sums& stretch, bool fresh) const { start(stretch, next(), fresh); }

  // Says that the stage of the block before has been read.
  __device__ __forceinline__ void release_before() const {
    if (empty == 0) return;
    if constexpr (S::kSources > 1) {
      barrier_arrive_remote(empty + 8 * before);
    } else {
      barrier_arrive(empty + 8 * before);
    }
  }

  __device__ __forceinline__ void advance() {
    before = turn.stage;
    turn.advance();
  }

  static __device__ __forceinline__ void add_stretch(Sums& sums, Sums& stretch) {
    keep_in_registers(stretch);
#pragma unroll
    for (int i = 0; i < S::kTokens / 2; ++i) sums[i] += stretch[i];
  }

  // In turns: while one warpgroup adds a stretch, the tensor cores compute that of the next in the ring. Else
  // they stand still while the only warpgroup adds, or all at once.
  template <bool kInTurns>
  __device__ __forceinline__ void add_each(Sums& sums, int count) {
    Sums stretch;
    if constexpr (S::kRotated) {
      // Without this an instruction that adds to them, or not, keeps them in registers from the tile before
      // on, and what rotates it needs these.
#pragma unroll
      for (int i = 0; i < S::kTokens / 2; ++i) stretch[i] = 0.0f;
    }
#pragma unroll 1
    for (int left = count; left > 0; left -= kBlocksOfAStretch) {
      const Operands first = next();
      if constexpr (kInTurns) ring.take();
      start(stretch, first, true);
      advance();
      if (left > 1) {
        start(stretch, false);
        // Products of the first block are done: its stage may be filled again. What is still on its way keeps
        // the tensor cores busy until the next in the ring has started.
        wgmma_wait<1>();
        if constexpr (kInTurns) ring.pass();
        release_before();
        advance();
      } else {
        if constexpr (kInTurns) ring.pass();
      }
      wgmma_wait<0>();
      release_before();
      add_stretch(sums, stretch);
    }
  }

  // While a stretch is added, the tensor cores compute the first block of the next. They stand still after
  // kAheadStretches alone: the assembler lets no products of one turn of a loop go on into the next when
  // their sums are read there.
  __device__ __forceinline__ void add_ahead(Sums& sums, int count) {
    constexpr int kBlocks = kAheadStretches * kBlocksOfAStretch;
    Sums even, odd;
    int i = 0;
#pragma unroll 1
    for (; i + kBlocks <= count; i += kBlocks) {
#pragma unroll
      for (int stretch = 0; stretch < kAheadStretches; stretch += 2) {
        start(even, true);
        if (stretch > 0) {
          wgmma_wait<1>();
          release_before();
          add_stretch(sums, odd);
        }
        advance();
        start(even, false);
        wgmma_wait<1>();
        release_before();
        advance();
        start(odd, true);
        wgmma_wait<1>();
        release_before();
        add_stretch(sums, even);
        advance();
        start(odd, false);
        wgmma_wait<1>();
        release_before();
        advance();
      }
      wgmma_wait<0>();
      release_before();
      add_stretch(sums, odd);
    }
    add_each<false>(sums, count - i);
  }
};

}  // namespace bbk
