// Sharing and copy on write of cache pages. The tables are bound by latency, the contents by memory traffic:
// a page of 16 positions is 8 MB over all layers of an 8B model.
#include <cstring>
#include <vector>

#include "common/launch.cuh"
#include "decode/page_pool.cuh"

namespace bbk {
namespace {

constexpr int kThreads = 256;
constexpr int kPoolThreads = 1024;
constexpr int kCtasPerSm = 4;
constexpr int kLoadsInFlight = 4;       // per thread
constexpr int kTableColumns = 32;       // of the tables that a CTA moves: a full cache line a row
constexpr int64_t kMaxShared = 163000;  // bytes that hold them, where the device has as much for a CTA

__global__ void __launch_bounds__(kThreads)
    share_pages_kernel(const __grid_constant__ SharePagesParams params, int columns, bool in_shared) {
  extern __shared__ int32_t shared_entries[];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * params.num_rows * columns;
  int32_t* entries = in_shared ? shared_entries : params.workspace + first;  // [num_rows, columns]
  bool any = false;
  for (int row = threadIdx.x; row < params.num_rows; row += kThreads) any |= source_of(params, row) != row;
  if (!__syncthreads_or(any)) return;
  share_columns(Group(), params, static_cast<int>(blockIdx.x) * columns, columns, entries);
}

__global__ void __launch_bounds__(kThreads)
    choose_pages_kernel(const __grid_constant__ CopyPagesParams params) {
  __shared__ int length;
  choose_list(Group(), params, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), &length);
}

__global__ void __launch_bounds__(kPoolThreads)
    choose_from_pool_kernel(const __grid_constant__ CopyPagesParams params) {
  __shared__ PoolScratch scratch;
  choose_from_pool(Group(), params, &scratch);
}

template <typename T>
__device__ void copy_tile(const CopyTask& task) {
  const T* from = reinterpret_cast<const T*>(task.from);
  T* to = reinterpret_cast<T*>(task.to);
  const int64_t count = task.bytes / static_cast<int64_t>(sizeof(T));
  for (int64_t base = threadIdx.x; base < count; base += kThreads * kLoadsInFlight) {
    T values[kLoadsInFlight];
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) {
      if (base + j * kThreads < count) values[j] = from[base + j * kThreads];
    }
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) {
      if (base + j * kThreads < count) to[base + j * kThreads] = values[j];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    copy_pages_kernel(const __grid_constant__ CopyPagesParams params, int num_lists) {
  __shared__ int lengths[kMaxMoveLists];
  for (int i = threadIdx.x; i < num_lists; i += kThreads) lengths[i] = params.num_moves[i];
  __syncthreads();
  int64_t total = 0;
  for (int i = 0; i < num_lists; ++i) total += lengths[i];
  const CopyShape shape = copy_shape(params, sizeof(T) * kThreads * kLoadsInFlight);
  const int64_t tasks = total * shape.tasks_per_move;
  for (int64_t i = blockIdx.x; i < tasks; i += gridDim.x) {
    int at = static_cast<int>(i / shape.tasks_per_move), list = 0;
    for (; at >= lengths[list]; ++list) at -= lengths[list];
    const Move move = move_list(params, list, num_lists).moves[at];
    copy_tile<T>(copy_task(params, shape, move, i % shape.tasks_per_move));
  }
}

template <typename T>
bool fits(const CopyPagesParams& params) {
  const uintptr_t all = reinterpret_cast<uintptr_t>(params.kv_cache) | params.layer_stride |
                        params.side_stride | params.page_stride | params.chunk_bytes;
  return all % sizeof(T) == 0;
}

void check(const CopyPagesParams& params, const char* op) {
  check_at_least(op, "num_layers", params.num_layers, 0);
  check_at_least(op, "page_size", params.page_size, 1);
  check_at_least(op, "num_branches", params.num_branches, 1);
  if (!params.has_pool && params.num_branches > kMaxPageBranches) {
    refuse(op, "num_branches: expected at most " + std::to_string(kMaxPageBranches) + ", got " +
                   std::to_string(params.num_branches));
  }
}

void share_on_host(const SharePagesParams& params) {
  std::vector<int32_t> entries(static_cast<size_t>(params.num_rows) * params.pages_per_row);
  share_columns(Group(), params, 0, params.pages_per_row, entries.data());
}

void copy_on_host(const CopyPagesParams& params) {
  int length = 0;
  if (params.has_pool) {
    PoolScratch scratch;
    choose_from_pool(Group(), params, &scratch);
    length = scratch.num_moves;
  } else {
    choose_list(Group(), params, 0, 1, &length);
  }
  const MoveList list = move_list(params, 0, 1);
  const CopyShape shape = copy_shape(params, larger<int64_t>(params.chunk_bytes, 1));
  for (int i = 0; i < length; ++i) {
    for (int64_t task = 0; task < shape.tasks_per_move; ++task) {
      const CopyTask piece = copy_task(params, shape, list.moves[i], task);
      std::memcpy(piece.to, piece.from, static_cast<size_t>(piece.bytes));
    }
  }
}

}  // namespace

void share_pages(const SharePagesParams& params, const Launch& launch) {
  constexpr char kOp[] = "share_pages";
  check_at_least(kOp, "num_rows", params.num_rows, 0);
  check_at_least(kOp, "pages_per_row", params.pages_per_row, 0);
  if (params.num_rows == 0 || params.pages_per_row == 0) return;
  if (launch.device < 0) return share_on_host(params);
  const int64_t column_bytes = sizeof(int32_t) * static_cast<int64_t>(params.num_rows);
  const int64_t shared_limit = smaller<int64_t>(kMaxShared, max_shared_bytes(kOp, launch.device));
  const bool in_shared = column_bytes <= shared_limit;
  if (!in_shared && params.workspace == nullptr) {
    refuse(kOp, "num_rows: expected at most " + std::to_string(shared_limit / sizeof(int32_t)) + ", got " +
                    std::to_string(params.num_rows) + ", whose column of " + std::to_string(column_bytes) +
                    " bytes must lie in the shared memory of a CTA where there is no workspace");
  }
  const DeviceGuard guard(launch.device, kOp);
  const int columns =
      in_shared ? static_cast<int>(smaller<int64_t>(kTableColumns, shared_limit / column_bytes)) : 1;
  const dim3 grid(static_cast<unsigned>(ceil_div(params.pages_per_row, columns)));
  launch_kernel<share_pages_kernel>(kOp, launch, {grid, kThreads, in_shared ? columns * column_bytes : 0},
                                    params, columns, in_shared);
}

void copy_pages(const CopyPagesParams& params, const Launch& launch) {
  constexpr char kOp[] = "copy_pages";
  check(params, kOp);
  if (launch.device < 0) return copy_on_host(params);
  const int64_t columns = static_cast<int64_t>(params.num_requests) * params.pages_per_row;
  if (columns == 0) return;
  const DeviceGuard guard(launch.device, kOp);
  int num_lists = 1;
  if (params.has_pool) {
    launch_kernel<choose_from_pool_kernel>(kOp, launch, {dim3(1), kPoolThreads}, params);
  } else {
    num_lists = static_cast<int>(smaller<int64_t>(ceil_div<int64_t>(columns, kThreads), kMaxMoveLists));
    launch_kernel<choose_pages_kernel>(kOp, launch, {dim3(num_lists), kThreads}, params);
  }
  if (params.num_layers == 0 || params.chunk_bytes == 0) return;

  const dim3 grid(static_cast<unsigned>(num_sms(kOp, launch.device) * kCtasPerSm));
  const auto copy = [&](auto element) {
    launch_kernel<copy_pages_kernel<decltype(element)>>(kOp, launch, {grid, kThreads}, params, num_lists);
  };
  if (fits<uint4>(params)) return copy(uint4());
  if (fits<uint32_t>(params)) return copy(uint32_t());
  copy(uint16_t());
}

}  // namespace bbk
