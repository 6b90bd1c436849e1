// Launches of the policy: a CTA per request. One request needs one launch; for several, the plan needs to
// know whether any of them asks for a refresh, which a second launch reads from the state that the first one
// wrote.
#include <memory>

#include "common/launch.cuh"
#include "decode/policy_drafts.cuh"
#include "decode/policy_dream.cuh"
#include "decode/policy_plan.cuh"

namespace bbk {
namespace {

constexpr int kMinThreads = 128;
constexpr int kMaxThreads = 1024;
// Tokens of a request that are worked on in shared memory, at most and where the device has as much; longer
// ones stay in global memory.
constexpr int64_t kMaxTokenBytes = 156 * 1024;

__device__ void copy_tokens(const Group& group, int32_t* to, const int32_t* from, int64_t count) {
  for (int64_t i = group.rank(); i < count; i += group.size()) to[i] = from[i];
}

// Calls of either rule, with and without drafts, go through the same kernels, compiled for each.
__host__ __device__ const PolicyParams& all_rows(const PolicyParams& params) { return params; }
__host__ __device__ const PolicyParams& all_rows(const DraftParams& params) { return params.all; }
__host__ __device__ const PolicyParams& all_rows(const DreamParams& params) { return params.all; }

BBK_HD Outcome decide(const Group& group, const PolicyParams& params, int64_t index, int32_t* tokens,
                      RequestScratch* scratch) {
  return policy_request(group, params, index, tokens, scratch);
}
BBK_HD Outcome decide(const Group& group, const DraftParams& params, int64_t index, int32_t* tokens,
                      RequestScratch* scratch) {
  return policy_with_drafts(group, params, index, tokens, scratch);
}
BBK_HD Outcome decide(const Group& group, const DreamParams& params, int64_t index, int32_t* tokens,
                      RequestScratch* scratch) {
  return dream_request(group, params.all, index, tokens, scratch);
}

// The policy of request `index` in shared memory where its tokens fit, in place where not. Returns the tokens
// that the next plan is to read.
template <typename Params>
__device__ const int32_t* run_policy(const Group& group, const Params& given, int64_t index, bool in_shared,
                                     int32_t* shared_tokens, RequestScratch* scratch, Outcome* outcome) {
  const PolicyParams& params = all_rows(given);
  const int64_t size = static_cast<int64_t>(params.num_branches) * params.gen_length;
  int32_t* in_state = params.state.tokens + index * size;
  int32_t* tokens = in_shared ? shared_tokens : in_state;
  if (in_shared) copy_tokens(group, tokens, in_state, size);
  *outcome = decide(group, given, index, tokens, scratch);
  if (in_shared) copy_tokens(group, in_state, tokens, size);
  return tokens;
}

template <typename Params>
__global__ void __launch_bounds__(kMaxThreads)
    policy_and_plan_kernel(const __grid_constant__ Params given, bool in_shared) {
  extern __shared__ int32_t shared_tokens[];
  __shared__ RequestScratch scratch;
  const PolicyParams& params = all_rows(given);
  const Group group;
  Outcome outcome;
  const int32_t* tokens = run_policy(group, given, 0, in_shared, shared_tokens, &scratch, &outcome);
  bool refresh = false;
  for (int n = 0; n < params.num_branches; ++n) {
    refresh |= runs(scratch.rows[n], outcome.finished) && scratch.rows[n].needs_refresh;
  }
  const Phase phase = refresh ? kPhaseRefresh : kPhaseBlock;
  const RequestCounts counts = plan_request(group, params, 0, phase, tokens, outcome.finished, &scratch);
  if (group.rank() == 0) write_flags(params, phase, counts);
}

template <typename Params>
__global__ void __launch_bounds__(kMaxThreads)
    policy_kernel(const __grid_constant__ Params given, bool in_shared) {
  extern __shared__ int32_t shared_tokens[];
  __shared__ RequestScratch scratch;
  const Group group;
  if (blockIdx.x == 0 && group.rank() < kNumCounters) all_rows(given).counters[group.rank()] = 0;
  Outcome outcome;
  run_policy(group, given, blockIdx.x, in_shared, shared_tokens, &scratch, &outcome);
}

// The last CTA to come writes the flags, from sums of integers: the same in any order.
__device__ void add_counts(const PolicyParams& params, Phase phase, const RequestCounts& counts) {
  int32_t* sums = params.counters;
  atomicAdd(&sums[0], counts.running);
  atomicAdd(&sums[1], counts.query_tokens);
  atomicAdd(&sums[2], counts.predictions);
  atomicAdd(&sums[3], counts.stalled);
  __threadfence();
  if (atomicAdd(&sums[4], 1) != static_cast<int>(gridDim.x) - 1) return;
  __threadfence();
  write_flags(params, phase,
              RequestCounts{atomicAdd(&sums[0], 0), atomicAdd(&sums[1], 0), atomicAdd(&sums[2], 0),
                            atomicAdd(&sums[3], 0)});
}

__global__ void __launch_bounds__(kMaxThreads)
    plan_kernel(const __grid_constant__ PolicyParams params, bool is_init) {
  __shared__ RequestScratch scratch;
  __shared__ int sums[kMaxTeams];
  const Group group;
  const Request request = request_at(params, blockIdx.x);
  const int32_t* tokens = params.state.tokens + request.first_position;
  const bool finished = params.state.finished[request.index] != 0;
  load_rows(group, params, request, tokens, &scratch);
  Phase phase = kPhaseInit;
  if (!is_init) phase = any_refresh(group, params, sums) ? kPhaseRefresh : kPhaseBlock;
  group.sync();
  const RequestCounts counts = plan_request(group, params, request.index, phase, tokens, finished, &scratch);
  if (group.rank() == 0) add_counts(params, phase, counts);
}

void plan_on_host(const PolicyParams& params, bool is_init, RequestScratch* scratch) {
  const Group group;
  Phase phase = kPhaseInit;
  if (!is_init) phase = any_refresh(group, params, nullptr) ? kPhaseRefresh : kPhaseBlock;
  RequestCounts sums{0, 0, 0, 0};
  for (int64_t index = 0; index < params.num_requests; ++index) {
    const Request request = request_at(params, index);
    const int32_t* tokens = params.state.tokens + request.first_position;
    load_rows(group, params, request, tokens, scratch);
    const RequestCounts counts =
        plan_request(group, params, index, phase, tokens, params.state.finished[index] != 0, scratch);
    sums.running += counts.running;
    sums.query_tokens += counts.query_tokens;
    sums.predictions += counts.predictions;
    sums.stalled += counts.stalled;
  }
  write_flags(params, phase, sums);
}

// A thread per position of every row where that is possible.
int num_threads(const PolicyParams& params) {
  const int64_t positions = static_cast<int64_t>(params.num_branches) * params.gen_length;
  const int64_t threads = smaller<int64_t>(larger<int64_t>(positions, kMinThreads), kMaxThreads);
  return static_cast<int>(ceil_div<int64_t>(threads, kTeamSize) * kTeamSize);
}

void check(const PolicyParams& params, const char* op) {
  check_at_least(op, "num_branches", params.num_branches, 1);
  check_at_least(op, "gen_length", params.gen_length, 1);
  check_at_least(op, "num_requests", params.num_requests, 1);
  if (params.num_branches > kMaxBranches) {
    refuse(op, "num_branches: expected at most " + std::to_string(kMaxBranches) + ", got " +
                   std::to_string(params.num_branches));
  }
  if (is_scheduled(params.settings))
    check_at_least(op, "steps_per_block", params.settings.steps_per_block.value, 1);
  const int drafts = params.settings.drafts.count;
  if (drafts > 0 && params.num_branches != drafts + 1) {
    refuse(op, "drafts: expected one for each row of a request but the first, " +
                   std::to_string(params.num_branches - 1) + ", got " + std::to_string(drafts));
  }
}

void check_dream(const PolicyParams& params, const char* op) {
  check_at_least(op, "map_entries", params.map_entries, 1);
  if (is_scheduled(params.settings)) refuse(op, "threshold: expected a number, got None");
  if (!params.predictions.likely_token.given || !params.predictions.likely_probability.given) {
    refuse(op, "predictions.likely_token: expected a tensor, got None");
  }
}

void launch_plan(const PolicyParams& params, bool is_init, const Launch& launch, const char* op) {
  const dim3 grid(static_cast<unsigned>(params.num_requests));
  launch_kernel<plan_kernel>(op, launch, {grid, num_threads(params)}, params, is_init);
}

template <typename Params>
void run_on_host(const Params& given) {
  const PolicyParams& params = all_rows(given);
  const auto scratch = std::make_unique<RequestScratch>();
  const int64_t size = static_cast<int64_t>(params.num_branches) * params.gen_length;
  for (int64_t index = 0; index < params.num_requests; ++index) {
    decide(Group(), given, index, params.state.tokens + index * size, scratch.get());
  }
  plan_on_host(params, false, scratch.get());
}

template <typename Params>
void run(const Params& given, const Launch& launch, const char* op) {
  const PolicyParams& params = all_rows(given);
  if (launch.device < 0) return run_on_host(given);
  const DeviceGuard guard(launch.device, op);
  const int64_t token_bytes = static_cast<int64_t>(sizeof(int32_t)) * params.num_branches * params.gen_length;
  const int64_t beside_scratch =
      max_shared_bytes(op, launch.device) - static_cast<int64_t>(sizeof(RequestScratch));
  const bool in_shared = token_bytes <= smaller(kMaxTokenBytes, beside_scratch);
  const dim3 grid(static_cast<unsigned>(params.num_requests));
  const LaunchConfig config{grid, num_threads(params), in_shared ? token_bytes : 0};
  if (params.num_requests == 1) {
    return launch_kernel<policy_and_plan_kernel<Params>>(op, launch, config, given, in_shared);
  }
  launch_kernel<policy_kernel<Params>>(op, launch, config, given, in_shared);
  launch_plan(params, false, launch, op);
}

}  // namespace

void decode_policy(const PolicyParams& params, const Launch& launch) {
  constexpr char kOp[] = "decode_policy";
  check(params, kOp);
  if (params.settings.policy == kDreamPublished) {
    check_dream(params, kOp);
    return run(DreamParams{params}, launch, kOp);
  }
  if (params.settings.drafts.count > 0) return run(draft_params(params), launch, kOp);
  run(params, launch, kOp);
}

void initial_plan(const PolicyParams& params, const Launch& launch) {
  constexpr char kOp[] = "initial_plan";
  check(params, kOp);
  if (launch.device < 0) {
    const auto scratch = std::make_unique<RequestScratch>();
    plan_on_host(params, true, scratch.get());
    return;
  }
  const DeviceGuard guard(launch.device, kOp);
  check_cuda(cudaMemsetAsync(params.counters, 0, kNumCounters * sizeof(int32_t), launch.stream), kOp);
  launch_plan(params, true, launch, kOp);
}

}  // namespace bbk
