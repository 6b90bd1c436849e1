// Threads that work on something together, so that one source serves the GPU and the host: on the device a
// group is a CTA and a team one of its warps; on the host both are the one calling thread, which finds itself
// to be rank 0 of 1 and every barrier passed. Code over groups is written in phases: each phase spreads its
// items over the ranks (or over the teams, when an item needs a reduction) and ends in a barrier.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "common/integers.h"

namespace bbk {

constexpr int kTeamSize = 32;
constexpr int kMaxTeams = 32;  // of a group: 1024 threads
constexpr unsigned kWholeTeam = 0xFFFFFFFFu;

struct Group {
#if defined(__CUDA_ARCH__)
  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ void sync() const { __syncthreads(); }

  __device__ int team() const { return rank() / kTeamSize; }
  __device__ int num_teams() const { return size() / kTeamSize; }
  __device__ int lane() const { return rank() % kTeamSize; }
  __device__ int num_lanes() const { return kTeamSize; }
  __device__ void team_sync() const { __syncwarp(); }

  // Reductions: every lane of the team calls them and gets the result.
  __device__ int team_min(int value) const { return __reduce_min_sync(kWholeTeam, value); }
  __device__ int team_sum(int value) const { return __reduce_add_sync(kWholeTeam, value); }
  __device__ uint32_t team_max(uint32_t value) const { return __reduce_max_sync(kWholeTeam, value); }
  __device__ uint32_t team_or(uint32_t value) const { return __reduce_or_sync(kWholeTeam, value); }
  // How many lower lanes have the flag set; `total` is how many lanes have.
  __device__ int team_count_below(bool flag, int* total) const {
    const unsigned flags = __ballot_sync(kWholeTeam, flag);
    *total = __popc(flags);
    return __popc(flags & ((1u << lane()) - 1));
  }

  // On memory of the group.
  __device__ int add(int* target, int value) const { return atomicAdd(target, value); }  // the value before
  __device__ void set_bits(uint32_t* target, uint32_t bits) const { atomicOr(target, bits); }
  __device__ void lower_to(int* target, int value) const { atomicMin(target, value); }
  __device__ void raise_to(unsigned long long* target, unsigned long long value) const {
    atomicMax(target, value);
  }

  // Sum over the group, the same for every rank. `scratch` [kMaxTeams] is free again after the next barrier.
  __device__ int sum(int value, int* scratch) const {
    const int of_team = team_sum(value);
    if (lane() == 0) scratch[team()] = of_team;
    sync();
    return team_sum(lane() < num_teams() ? scratch[lane()] : 0);
  }

  // How many lower ranks have the flag set; `total` is how many ranks have. `scratch` as above.
  __device__ int count_below(bool flag, int* scratch, int* total) const {
    const unsigned flags = __ballot_sync(kWholeTeam, flag);
    if (lane() == 0) scratch[team()] = __popc(flags);
    sync();
    const int of_team = lane() < num_teams() ? scratch[lane()] : 0;
    *total = team_sum(of_team);
    const int before = team_sum(lane() < team() ? of_team : 0);
    return before + __popc(flags & ((1u << lane()) - 1));
  }

  // The sum over lower ranks; `total` is that over all. `scratch` as above.
  __device__ int sum_below(int value, int* scratch, int* total) const {
    const int lane = threadIdx.x % kTeamSize, team = threadIdx.x / kTeamSize;
    int up_to_here = value;
#pragma unroll
    for (int step = 1; step < kTeamSize; step *= 2) {
      const int before = __shfl_up_sync(kWholeTeam, up_to_here, step);
      if (lane >= step) up_to_here += before;
    }
    if (lane == kTeamSize - 1) scratch[team] = up_to_here;
    sync();
    int before = 0;
    *total = 0;
    for (int other = 0; other < num_teams(); ++other) {
      if (other < team) before += scratch[other];
      *total += scratch[other];
    }
    return before + up_to_here - value;
  }

  // The lowest value of the group, the same for every rank; also a barrier. `scratch`: one integer.
  __device__ int lowest(int value, int* scratch) const {
    sync();
    if (rank() == 0) *scratch = INT_MAX;
    sync();
    value = team_min(value);
    if (lane() == 0) lower_to(scratch, value);
    sync();
    return *scratch;
  }
#else
  int rank() const { return 0; }
  int size() const { return 1; }
  void sync() const {}

  int team() const { return 0; }
  int num_teams() const { return 1; }
  int lane() const { return 0; }
  int num_lanes() const { return 1; }
  void team_sync() const {}

  int team_min(int value) const { return value; }
  int team_sum(int value) const { return value; }
  uint32_t team_max(uint32_t value) const { return value; }
  uint32_t team_or(uint32_t value) const { return value; }
  int team_count_below(bool flag, int* total) const {
    *total = flag ? 1 : 0;
    return 0;
  }

  int add(int* target, int value) const {
    *target += value;
    return *target - value;
  }
  void set_bits(uint32_t* target, uint32_t bits) const { *target |= bits; }
  void lower_to(int* target, int value) const { *target = value < *target ? value : *target; }
  void raise_to(unsigned long long* target, unsigned long long value) const {
    *target = value > *target ? value : *target;
  }

  int sum(int value, int*) const { return value; }
  int count_below(bool flag, int*, int* total) const {
    *total = flag ? 1 : 0;
    return 0;
  }
  int sum_below(int value, int*, int* total) const {
    *total = value;
    return 0;
  }
  int lowest(int value, int*) const { return value; }
#endif

  // Calls body(i) for every i below `number`, spread over the ranks.
  template <typename Body>
  __host__ __device__ void for_each(int number, Body body) const {
    for (int i = rank(); i < number; i += size()) body(i);
  }
};

// Calls visit(row, first, behind) for stretches of positions that together are all rows, a team per stretch.
// A position always falls to the same lane of the same team: what a lane wrote there it may read again
// without a barrier.
template <typename Visit>
BBK_HD void for_each_stretch(const Group& group, int num_rows, int length, Visit&& visit) {
  const int lanes = group.num_lanes();
  const int per_row = larger(group.num_teams() / num_rows, 1);
  const int stretch = ((length + per_row - 1) / per_row + lanes - 1) / lanes * lanes;
  for (int i = group.team(); i < num_rows * per_row; i += group.num_teams()) {
    const int first = i % per_row * stretch;
    if (first < length) visit(i / per_row, first, smaller(first + stretch, length));
  }
}

}  // namespace bbk
