// Bound by latency: a few hundred tokens in the usual step, tens of thousands where whole rows are packed.
#include "common/launch.cuh"
#include "decode/pack.cuh"

namespace bbk {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackParams params) {
  __shared__ PackScratch scratch;
  pack_group(Group(), params, static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.x),
             static_cast<int>(gridDim.x), &scratch);
}

constexpr int kMaxGridY = 65535;

}  // namespace

void pack_windows(const PackParams& params, const Launch& launch) {
  constexpr char kOp[] = "pack_windows";
  check_at_least(kOp, "num_rows", params.num_rows, 1);
  check_at_least(kOp, "num_branches", params.num_branches, 1);
  check_at_least(kOp, "gen_length", params.gen_length, 1);
  check_at_least(kOp, "page_size", params.page_size, 1);
  if (params.num_rows > kMaxGridY) {
    refuse(kOp, "num_rows: expected at most " + std::to_string(kMaxGridY) + ", got " +
                    std::to_string(params.num_rows));
  }
  if (launch.device < 0) {
    PackScratch scratch;
    for (int row = 0; row < params.num_rows; ++row) pack_group(Group(), params, row, 0, 1, &scratch);
    return;
  }
  const DeviceGuard guard(launch.device, kOp);
  // A row is at most its pages long.
  const int64_t longest =
      smaller(params.capacity, static_cast<int64_t>(params.pages_per_row) * params.page_size);
  const unsigned columns = static_cast<unsigned>(larger<int64_t>(ceil_div<int64_t>(longest, kStretch), 1));
  launch_kernel<pack_kernel>(kOp, launch, {dim3(columns, params.num_rows), kThreads}, params);
}

}  // namespace bbk
