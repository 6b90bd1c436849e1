// Fills the rings of keys and values from a cache in e4m3: a warpgroup of its own copies tiles as they are
// stored, turns them into halves, which the products take, and hands them over where the copy engine
// would. Every thread converts what it has copied itself, so that copies need no barrier.
#pragma once

#include "attention/sm90.cuh"
#include "common/e4m3.cuh"

namespace bbk {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// 16 bytes to shared memory.
__device__ __forceinline__ void copy_16_async(uint32_t target, const void* source) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n" ::"r"(target), "l"(source) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                             uint32_t d) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// The part of a thread in a tile: 16 elements of one key in each pass. Eight lanes that store at once hold
// two neighbouring keys of one slice, which the swizzle keeps in different banks.
template <int kHeadDim, class S>
struct FeederPlace {
  static constexpr int kChunks = kHeadDim / 16;
  static constexpr int kPassKeys = 128 / kChunks;
  static constexpr int kPasses = S::kStageKeys / kPassKeys;
  static_assert(kPassKeys % 8 == 0 && S::kStageKeys % kPassKeys == 0);

  int key;    // in the first pass
  int chunk;  // of the key's 16 elements

  __device__ __forceinline__ FeederPlace() {
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4, lane = threadIdx.x % 32;
    const int eight = lane / 8, place = lane % 8;
    key = warp * (kPassKeys / 4) + eight / S::kSlices * 2 + place / 4;
    chunk = eight % S::kSlices * 4 + place % 4;
  }

  // In a tile of 16-bit elements; the second half of the chunk lies at this ^ 16.
  __device__ __forceinline__ uint32_t target() const {
    return chunk / 4 * S::kSliceBytes + key * kSwizzledRowBytes + ((chunk % 4 * 2 ^ key % 8) << 4);
  }
};

// What a walk over the work gives: the next tile of keys, looked up well ahead of its use.
template <int kPasses>
struct FeederTile {
  int num_keys;    // 0: there is no further one
  int first_slot;  // the key k lies at (first_slot + k) % page_size of its page
  int kv_head;
  int pages[kPasses];  // of this thread's keys
};

// `Walk` has `FeederTile fetch()`, which is called by all threads of the warpgroup.
template <int kHeadDim, class S, class Walk>
class Feeder {
  using Place = FeederPlace<kHeadDim, S>;
  static constexpr int kPasses = Place::kPasses;
  static constexpr uint32_t kRawTileBytes = S::kStageKeys * kHeadDim;

 public:
  // raw: S::kRawBytes of shared memory, of this warpgroup alone.
  __device__ __forceinline__ Feeder(const AttentionParams& params, Walk& walk, uint32_t raw)
      : params_(params),
        walk_(walk),
        raw_(raw + threadIdx.x % 128 * 16),
        page_stride_(static_cast<uint32_t>(params.k_page_stride)),
        token_stride_(static_cast<uint32_t>(params.k_token_stride)) {
    ahead_ = walk_.fetch();
  }

  // Behind wait_for_predecessors(). Keys and values of three tiles are on their way.
  __device__ __forceinline__ void run(Ring<S>& keys, Ring<S>& values) {
    int number = start(0);
    int next = start(1);
    int later = start(2);
    for (int place = 0; number > 0; place = place == 2 ? 0 : place + 1) {
      wait_for_copies<2>();
      hand_over(2 * place, number, keys);
      hand_over(2 * place + 1, number, values);
      number = next;
      next = later;
      later = start(place);
    }
    wait_for_copies<0>();
  }

 private:
  __device__ __forceinline__ uint32_t raw_tile(int place) const { return raw_ + place * kRawTileBytes; }

  // Copies of the next tile's keys and values; returns how many there are.
  __device__ __forceinline__ int start(int place) {
    const int number = ahead_.num_keys;
    if (number > 0) {
      const uint32_t in_page = static_cast<uint32_t>(params_.page_size) - 1;
      const int64_t head = ahead_.kv_head * params_.k_head_stride + 16 * place_.chunk;
      const unsigned char* keys = static_cast<const unsigned char*>(params_.k_cache) + head;
      const unsigned char* values = static_cast<const unsigned char*>(params_.v_cache) + head;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int key = place_.key + i * Place::kPassKeys;
        if (key < number) {
          // Each step of this runs for every 16 bytes: no division, and products of 32 bits.
          const uint32_t slot = static_cast<uint32_t>(ahead_.first_slot + key) & in_page;
          const uint64_t page = static_cast<uint64_t>(static_cast<uint32_t>(ahead_.pages[i])) * page_stride_;
          const uint64_t offset = page + slot * token_stride_;
          copy_16_async(raw_tile(2 * place) + i * 2048, keys + offset);
          copy_16_async(raw_tile(2 * place + 1) + i * 2048, values + offset);
        }
      }
      ahead_ = walk_.fetch();
    }
    commit_copies();
    return number;
  }

  // Converts a tile that has arrived into the ring's next one. Keys behind the last are left as they are: the
  // products mask them.
  __device__ __forceinline__ void hand_over(int place, int number, Ring<S>& ring) const {
    barrier_wait(ring.empty(), ring.phase ^ 1);
    const uint32_t target = ring.tile() + place_.target();
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if (place_.key + i * Place::kPassKeys < number) {
        const uint4 x = load_shared(raw_tile(place) + i * 2048);
        const uint32_t row = target + i * Place::kPassKeys * kSwizzledRowBytes;
        const uint2 first = halves_of_e4m3(x.x), second = halves_of_e4m3(x.y);
        const uint2 third = halves_of_e4m3(x.z), fourth = halves_of_e4m3(x.w);
        store_shared(row, first.x, first.y, second.x, second.y);
        store_shared(row ^ 16, third.x, third.y, fourth.x, fourth.y);
      }
    }
    publish_stores();
    barrier_arrive(ring.full());
    ring.advance();
  }

  const AttentionParams& params_;
  Walk& walk_;
  const uint32_t raw_;
  const uint32_t page_stride_, token_stride_;
  const Place place_;
  FeederTile<kPasses> ahead_;
};

#endif

}  // namespace bbk
