// Sums of e4m3 products over K: the tensor cores add up a stretch of it, and the sums of stretches are added
// in fp32. Between the end of a stretch and the start of the next they stand still, so little may happen
// there: no division, no address that is found anew.
#pragma once

#include "gemm/shape.cuh"

namespace bbk {

// Blocks of K whose products the tensor cores add up before the sum is added in fp32: they keep fewer bits.
constexpr int kBlocksOfAStretch = 2;

// A stage of the pipeline, and the parity of the round through all stages.
template <class S>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == S::kStages) stage = 0, parity ^= 1;
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
  Turn<S> turn = {};
  int before = 0;  // the stage of the block before

  __device__ __forceinline__ Stretches(uint32_t stages, uint32_t full_barrier, uint32_t empty_of_lane,
                                       int group)
      : a(matrix_descriptor(stages + group * 64 * kSwizzledRowBytes)),
        b(matrix_descriptor(stages + S::kWeightBytes)),
        full(full_barrier),
        empty(empty_of_lane) {
    // Computed once: the compiler would find it again in every turn of a loop.
    asm volatile("" : "+r"(empty));
  }

  // Adds the products of the next `count` blocks.
  __device__ __forceinline__ void add(Sums& sums, int count) {
    if constexpr (kAhead) {
      add_ahead(sums, count);
    } else {
      add_each(sums, count);
    }
  }

 private:
  // Other warpgroups compute while one adds, unless it is the only one. What that begins ahead has registers
  // of its own, and pays where there is much to add (H200, 64 rows of 12288 in a tile: 21.0 us instead
  // of 23.0 for 128 tokens, 23.9 instead of 25.3 for 256).
  static constexpr bool kAhead = S::kGroups == 1 && S::kTokens == 128;
  // Stretches of a turn of its loop, after which the tensor cores stand still: the assembler lets no products
  // of one turn go on in the next when their sums are read there. More of them spill registers.
  static constexpr int kAheadStretches = 4;

  // Waits for the next block and starts its products; `fresh`: they replace what was there.
  __device__ __forceinline__ void start(Sums& stretch, bool fresh) const {
    // Descriptors count in 16 bytes: 32 elements of K are 2.
    const uint64_t offset = static_cast<uint32_t>(turn.stage * (S::kStageBytes / 16));
    const uint64_t a_now = a + offset, b_now = b + offset;
    barrier_wait(full + 8 * turn.stage, turn.parity);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSwizzledRowBytes / Product::kK; ++k) {
      Product::run(stretch, a_now + 2 * k, b_now + 2 * k, !fresh || k > 0);
    }
    wgmma_commit();
  }

  // Says that the stage of the block before has been read: it may be filled again.
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

  __device__ __forceinline__ void add_each(Sums& sums, int count) {
    Sums stretch;
#pragma unroll 1
    for (int left = count; left > 0; left -= kBlocksOfAStretch) {
      start(stretch, true);
      advance();
      if (left > 1) {
        start(stretch, false);
        wgmma_wait<1>();  // products of the first block are done
        release_before();
        advance();
      }
      wgmma_wait<0>();
      release_before();
      add_stretch(sums, stretch);
    }
  }

  // While a stretch is added, the tensor cores compute the first block of the next. The order of the sums is
  // that of add_each.
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
    add_each(sums, count - i);
  }
};

}  // namespace bbk
