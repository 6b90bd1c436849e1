// How kernels pass rows between GPUs that reach each other's memory.
//
// Each rank pushes its part of a row into the inboxes of all others over NVLink, and puts together what lies
// in its own: every rank has all parts. Data says by itself that it is there: a word of an inbox that was not
// written reads as kNotThere, a NaN that no part holds. So nobody waits for a flag behind the data, and no
// fence is needed: every word is waited for by itself, and no other memory hangs on it. What was read is set
// back to kNotThere by the thread that read it. (Published as the "Lamport" all-reduce of TensorRT-LLM, with
// -0 in the place of the NaN and three buffers.)
//
// Two turns take turns. That is enough: a peer pushes its part of call n + 2 into what held call n only once
// its kernel of call n + 1 has ended, which waited for this rank's part of call n + 1. This rank pushed that
// behind the end of its own kernel of call n, and with it all of its reads and resets of that turn. Kernels
// of one rank's calls follow each other in a stream, also where they are launched early: each waits for its
// predecessor before it touches memory, and a grid's end makes its writes visible. Every rank makes the same
// calls in the same order.
//
// No rank waits for a block that cannot run: all blocks of such a grid are resident, with room beside them
// for the grids of the other lanes. A successor in the stream may take its place on the processors while the
// kernel waits (it loads its first weights meanwhile), unless another lane is at work: then it could take the
// room of that lane's kernel, for which another rank may be waiting.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "layer/peers.h"

namespace bbk {

// Four words, each by itself, past the cache of the processor.
__device__ __forceinline__ uint4 load_words(const char* place) {
  uint4 found;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
               : "l"(place)
               : "memory");
  return found;
}

__device__ __forceinline__ void store_words(char* place, const uint4& words) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(place), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

// Of a NaN with the sign another NaN.
__device__ __forceinline__ uint32_t sendable(uint32_t word) {
  return word == Peers::kNotThere ? Peers::kNotThere >> 1 : word;
}

__device__ __forceinline__ bool is_missing(const uint4& words) {
  return words.x == Peers::kNotThere || words.y == Peers::kNotThere || words.z == Peers::kNotThere ||
         words.w == Peers::kNotThere;
}

// So that the place waits for the next turn's.
__device__ __forceinline__ void reset_words(char* place) {
  store_words(place, make_uint4(Peers::kNotThere, Peers::kNotThere, Peers::kNotThere, Peers::kNotThere));
}

// In `receiver`'s inbox the first byte of what `sender` has to say in a turn.
__device__ __forceinline__ char* place_of(const Peers& peers, int turn, int sender, int receiver) {
  const int others = peers.inboxes.count - 1;
  const int source = sender - (sender > receiver ? 1 : 0);
  return reinterpret_cast<char*>(peers.inboxes.ids[receiver]) +
         (static_cast<int64_t>(turn) * others + source) * peers.source_bytes;
}

// Of this rank, behind its wait for its predecessors.
__device__ __forceinline__ int turn_of(const Peers& peers) { return __ldcg(peers.turn); }

// The rank to push to in step 1, 2, ...: each rank begins with another one.
__device__ __forceinline__ int receiver_of(const Peers& peers, int step) {
  const int receiver = peers.rank + step;
  return receiver < peers.inboxes.count ? receiver : receiver - peers.inboxes.count;
}

// At the end of every block, whose threads have all read the turn: the last block begins the next one.
__device__ __forceinline__ void end_turn(const Peers& peers, int turn) {
  if (threadIdx.x == 0 && atomicAdd(&peers.turn[1], 1) == static_cast<int>(gridDim.x) - 1) {
    peers.turn[1] = 0;
    peers.turn[0] = turn ^ 1;
  }
}

}  // namespace bbk
