// What makes a plan: threads that run on a GPU, or as a group of one on the host, and little arithmetic.
#pragma once

#include <climits>

#include "attention/attention.h"

namespace bbk {

// The threads that make a plan together.
struct ThreadGroup {
  int* scratch;  // one integer that all of them see

  __host__ __device__ int rank() const {
#ifdef __CUDA_ARCH__
    return threadIdx.x;
#else
    return 0;
#endif
  }

  __host__ __device__ int size() const {
#ifdef __CUDA_ARCH__
    return blockDim.x;
#else
    return 1;
#endif
  }

  __host__ __device__ void sync() const {
#ifdef __CUDA_ARCH__
    __syncthreads();
#endif
  }

  // Calls body(i) for every i below `number`, spread over the threads.
  template <typename Body>
  __host__ __device__ void for_each(int number, Body body) const {
    for (int i = rank(); i < number; i += size()) body(i);
  }

  // The sum of the values of the threads of lower rank, and of all; also a sync().
  //
  // sums: an integer for each warp, which all threads see.
  __host__ __device__ int sum_before(int value, int* sums, int* total) const {
#ifdef __CUDA_ARCH__
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int up_to_here = value;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, up_to_here, step);
      if (lane >= step) up_to_here += before;
    }
    if (lane == 31) sums[warp] = up_to_here;
    __syncthreads();
    int before = 0;
    *total = 0;
    for (int other = 0; other < static_cast<int>(blockDim.x) / 32; ++other) {
      if (other < warp) before += sums[other];
      *total += sums[other];
    }
    return before + up_to_here - value;
#else
    *total = value;
    return 0;
#endif
  }

  // The smallest value of all threads; also a sync().
  __host__ __device__ int minimum(int value) const {
#ifdef __CUDA_ARCH__
    __syncthreads();
    if (threadIdx.x == 0) *scratch = INT_MAX;
    __syncthreads();
    value = __reduce_min_sync(0xffffffffu, value);
    if (threadIdx.x % 32 == 0) atomicMin(scratch, value);
    __syncthreads();
    return *scratch;
#else
    return value;
#endif
  }
};

__host__ __device__ inline int smaller(int a, int b) { return a < b ? a : b; }
__host__ __device__ inline int larger(int a, int b) { return a < b ? b : a; }
__host__ __device__ inline int quotient_up(int value, int divisor) { return (value + divisor - 1) / divisor; }

}  // namespace bbk
