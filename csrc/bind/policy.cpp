#include "decode/policy.h"

#include <limits>
#include <stdexcept>
#include <string>

#include "bind/bindings.h"

namespace py = pybind11;

namespace bbk {
namespace {

// Tensors come as dictionaries from the names of their fields to addresses.
template <typename T>
T* address(const py::dict& tensors, const char* name) {
  return reinterpret_cast<T*>(tensors[name].cast<uintptr_t>());
}

BranchStateView state_view(const py::dict& tensors) {
  BranchStateView state{};
  state.prompt_length = address<const int32_t>(tensors, "prompt_length");
  state.block_size = address<const int32_t>(tensors, "block_size");
  state.tokens = address<int32_t>(tensors, "tokens");
  state.window_start = address<int32_t>(tensors, "window_start");
  state.window_end = address<int32_t>(tensors, "window_end");
  state.decoded = address<int32_t>(tensors, "decoded");
  state.progress = address<int32_t>(tensors, "progress");
  state.blocks_since_refresh = address<int32_t>(tensors, "blocks_since_refresh");
  state.steps_in_block = address<int32_t>(tensors, "steps_in_block");
  state.needs_refresh = address<uint8_t>(tensors, "needs_refresh");
  state.done = address<uint8_t>(tensors, "done");
  state.top_token = address<int32_t>(tensors, "top_token");
  state.confidence = address<float>(tensors, "confidence");
  state.committed = address<int32_t>(tensors, "committed");
  state.merged = address<int32_t>(tensors, "merged");
  state.synced = address<int32_t>(tensors, "synced");
  state.nfe = address<int32_t>(tensors, "nfe");
  state.finished = address<uint8_t>(tensors, "finished");
  state.winner = address<int32_t>(tensors, "winner");
  state.stop_reason = address<int32_t>(tensors, "stop_reason");
  return state;
}

StepPlanView plan_view(const py::dict& tensors) {
  return StepPlanView{address<int32_t>(tensors, "query_start"), address<int32_t>(tensors, "query_end"),
                      address<int32_t>(tensors, "source_row"), address<uint8_t>(tensors, "predict"),
                      address<int32_t>(tensors, "flags")};
}

// `settings` are the fields of PolicyParams, its enumerations as indices.
PolicySettings settings_from(const py::dict& settings) {
  PolicySettings result{};
  result.mask_token_id = settings["mask_token_id"].cast<int32_t>();
  const auto eos_token_ids = settings["eos_token_ids"].cast<py::sequence>();
  if (eos_token_ids.size() > kMaxEosTokens) {
    throw std::invalid_argument("eos_token_ids: expected at most " + std::to_string(kMaxEosTokens) +
                                " ids, got " + std::to_string(eos_token_ids.size()));
  }
  for (const auto& id : eos_token_ids) result.eos_token_ids[result.num_eos++] = id.cast<int32_t>();
  result.scheduled = settings["threshold"].is_none();
  if (result.scheduled) {
    result.steps_per_block = settings["steps_per_block"].cast<int32_t>();
  } else {
    result.threshold = settings["threshold"].cast<float>();
    result.has_tail = !settings["tail_threshold"].is_none();
    if (result.has_tail) result.tail_threshold = settings["tail_threshold"].cast<float>();
  }
  result.leap_radius = settings["leap_radius"].cast<int32_t>();
  result.leap_threshold = settings["leap_threshold"].cast<float>();
  result.merge_threshold = settings["merge_threshold"].cast<float>();
  result.sync_threshold = settings["sync_threshold"].cast<int64_t>();
  result.refresh_interval = settings["refresh_interval"].is_none()
                                ? std::numeric_limits<int64_t>::max()
                                : settings["refresh_interval"].cast<int64_t>();
  result.eos_exit = static_cast<EosExit>(settings["eos_exit"].cast<int>());
  result.query_span = static_cast<QuerySpan>(settings["query_span"].cast<int>());
  result.prediction_offset = settings["prediction_offset"].cast<int32_t>();
  return result;
}

Launch launch_on(int device, uintptr_t stream) {
  return Launch{device, reinterpret_cast<cudaStream_t>(stream)};
}

void launch_decode_policy(const py::dict& state, const py::dict& predictions, const py::dict& plan,
                          const py::dict& out_plan, const py::dict& events, const py::dict& settings,
                          uintptr_t counters, int64_t num_predictions, int64_t num_requests, int num_branches,
                          int gen_length, int device, uintptr_t stream) {
  PolicyParams params{};
  params.state = state_view(state);
  params.settings = settings_from(settings);
  params.predictions = PredictionsView{
      address<const int64_t>(predictions, "target"), address<const int32_t>(predictions, "top_token"),
      address<const float>(predictions, "confidence"), address<const float>(predictions, "probe_probability"),
      num_predictions};
  params.source_row = address<const int32_t>(plan, "source_row");
  params.flags = address<const int32_t>(plan, "flags");
  params.out_plan = plan_view(out_plan);
  params.events = PolicyEventsView{address<uint8_t>(events, "committed"), address<uint8_t>(events, "merged"),
                                   address<int32_t>(events, "sync_source")};
  params.counters = reinterpret_cast<int32_t*>(counters);
  params.num_requests = num_requests;
  params.num_branches = num_branches;
  params.gen_length = gen_length;
  decode_policy(params, launch_on(device, stream));
}

void launch_initial_plan(const py::dict& state, const py::dict& out_plan, const py::dict& settings,
                         uintptr_t counters, int64_t num_requests, int num_branches, int gen_length,
                         int device, uintptr_t stream) {
  PolicyParams params{};
  params.state = state_view(state);
  params.settings = settings_from(settings);
  params.out_plan = plan_view(out_plan);
  params.counters = reinterpret_cast<int32_t*>(counters);
  params.num_requests = num_requests;
  params.num_branches = num_branches;
  params.gen_length = gen_length;
  initial_plan(params, launch_on(device, stream));
}

}  // namespace

void bind_policy(py::module_& module) {
  module.def("decode_policy", &launch_decode_policy, py::arg("state"), py::arg("predictions"),
             py::arg("plan"), py::arg("out_plan"), py::arg("events"), py::arg("settings"),
             py::arg("counters"), py::arg("num_predictions"), py::arg("num_requests"),
             py::arg("num_branches"), py::arg("gen_length"), py::arg("device"), py::arg("stream"));
  module.def("initial_plan", &launch_initial_plan, py::arg("state"), py::arg("out_plan"), py::arg("settings"),
             py::arg("counters"), py::arg("num_requests"), py::arg("num_branches"), py::arg("gen_length"),
             py::arg("device"), py::arg("stream"));
}

}  // namespace bbk
