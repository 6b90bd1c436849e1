// Makes the plan of a step's attention: its tiles by one CTA, since the whole plan is a few hundred integers,
// and its units by another.
#include "attention/planner.cuh"
#include "common/launch.cuh"

namespace bbk {
namespace {

constexpr int kThreads = 512;
// A workspace up to this size lies in shared memory.
constexpr int64_t kMaxSharedBytes = 40 * 1024;

__global__ void __launch_bounds__(kThreads)
    attention_plan_kernel(const __grid_constant__ AttentionPlanParams params, bool in_shared_memory,
                          int64_t workspace_size) {
  extern __shared__ int shared_workspace[];
  __shared__ PlanScratch scratch;
  int* workspace = in_shared_memory ? shared_workspace : params.workspace + blockIdx.x * workspace_size;
  Planner planner(params, workspace, Group(), &scratch);
  if (blockIdx.x == 0) {
    planner.plan_tiles();
  } else {
    planner.plan_units();
  }
  // Kernels behind this one may read the plan without having waited for their predecessors.
  __threadfence();
}

int64_t workspace_of_cta(int num_rows, int max_segments, int max_pieces, int num_tokens, int block_tokens) {
  int64_t size = Workspace::size(num_rows, max_segments, max_pieces);
  if (block_tokens > 0) size += UnitPlanner::workspace(num_tokens, num_rows, block_tokens, max_segments);
  return size;
}

void check_plan(const AttentionPlanParams& params) {
  constexpr char kOp[] = "attention_plan";
  check_at_least(kOp, "num_rows", params.num_rows, 0);
  check_at_least(kOp, "pages_per_row", params.pages_per_row, 0);
  check_at_least(kOp, "page_size", params.page_size, 1);
  check_at_least(kOp, "num_tokens", params.num_tokens, 0);
  check_at_least(kOp, "tile_tokens", params.tile_tokens, 1);
  check_at_least(kOp, "segment_pages", params.segment_pages, 1);
  check_at_least(kOp, "max_segments", params.max_segments, 0);
  check_at_least(kOp, "max_pieces", params.max_pieces, 1);
  check_at_least(kOp, "min_segments", params.min_segments, 1);
  check_at_least(kOp, "num_branches", params.num_branches, 0);
  if (params.block_tokens > 0) {
    check_at_least(kOp, "processors", params.processors, 1);
    check_at_least(kOp, "num_kv_heads", params.num_kv_heads, 1);
  }
}

}  // namespace

int64_t attention_plan_workspace(int num_rows, int max_segments, int max_pieces, int num_tokens,
                                 int block_tokens) {
  const int ctas = block_tokens > 0 ? 2 : 1;
  return ctas * workspace_of_cta(num_rows, max_segments, max_pieces, num_tokens, block_tokens);
}

void attention_plan(const AttentionPlanParams& params, const Launch& launch) {
  constexpr char kOp[] = "attention_plan";
  check_plan(params);
  const DeviceGuard guard(launch.device, kOp);
  const int64_t size = workspace_of_cta(params.num_rows, params.max_segments, params.max_pieces,
                                        params.num_tokens, params.block_tokens);
  const bool in_shared_memory = 4 * size <= kMaxSharedBytes;
  const int ctas = params.block_tokens > 0 ? 2 : 1;
  const int64_t shared_bytes = in_shared_memory ? 4 * size : 0;
  launch_kernel<attention_plan_kernel>(kOp, launch, {dim3(ctas), kThreads, shared_bytes}, params,
                                       in_shared_memory, size);
}

void attention_plan_on_host(const AttentionPlanParams& params) {
  check_plan(params);
  PlanScratch scratch;
  Planner planner(params, params.workspace, Group(), &scratch);
  planner.plan_tiles();
  if (params.block_tokens > 0) planner.plan_units();
}

}  // namespace bbk
