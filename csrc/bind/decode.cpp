#include "bind/bindings.h"
#include "decode/pack.h"
#include "decode/pages.h"
#include "decode/policy.h"

namespace py = pybind11;

namespace bbk {
namespace {

BBK_READER(BranchStateView, BBK_BRANCH_STATE)
BBK_READER(StepPlanView, BBK_STEP_PLAN)
BBK_READER(PredictionsView, BBK_PREDICTIONS)
BBK_READER(PolicyEventsView, BBK_POLICY_EVENTS)
BBK_READER(PackedQueriesView, BBK_PACKED_QUERIES)
BBK_READER(PolicySettings, BBK_POLICY_SETTINGS)

// Of a BranchState.
struct StateSizes {
  int num_requests;
  int num_rows;
  int num_branches;
  int gen_length;
};

StateSizes sizes_of(const Record& state) {
  const auto tokens = state.get<TensorView>(BBK_KEY("tokens"));
  const auto prompt_length = state.get<TensorView>(BBK_KEY("prompt_length"));
  StateSizes sizes{prompt_length.int_size(0), tokens.int_size(0), 0, tokens.int_size(1)};
  if (sizes.num_requests > 0) sizes.num_branches = sizes.num_rows / sizes.num_requests;
  return sizes;
}

void call_pack_windows(Call& call, const Record& state, const Record& plan, const TensorView& page_table,
                       const Record& packed, int page_size, int prediction_offset, bool scattered) {
  const StateSizes sizes = sizes_of(state);
  PackParams params{};
  state.read(BBK_KEY("prompt_tokens"), &params.prompt_tokens);
  state.read(BBK_KEY("prompt_length"), &params.prompt_length);
  state.read(BBK_KEY("tokens"), &params.tokens);
  plan.read(BBK_KEY("query_start"), &params.query_start);
  plan.read(BBK_KEY("query_end"), &params.query_end);
  plan.read(BBK_KEY("predict"), &params.predict);
  if (scattered) plan.read(BBK_KEY("query_position"), &params.query_position);
  params.page_table = page_table.data<const int32_t>();
  params.page_table_stride = page_table.row_stride();
  read_record(packed, &params.packed);
  params.capacity = packed.get<TensorView>(BBK_KEY("input_ids")).size(0);
  params.predict_capacity = packed.get<TensorView>(BBK_KEY("predict_index")).size(0);
  params.num_rows = sizes.num_rows;
  params.num_branches = sizes.num_branches;
  params.gen_length = sizes.gen_length;
  params.max_prompt = state.get<TensorView>(BBK_KEY("prompt_tokens")).int_size(1);
  params.pages_per_row = page_table.int_size(1);
  params.page_size = page_size;
  params.prediction_offset = prediction_offset;
  pack_windows(params, call.launch());
}

void call_share_pages(Call& call, const TensorView& page_table, const TensorView& source_row,
                      const TensorView& workspace) {
  SharePagesParams params{};
  params.page_table = page_table.data<int32_t>();
  params.page_table_stride = page_table.row_stride();
  params.source_row = source_row.contiguous().data<const int32_t>();
  params.workspace = workspace.contiguous().data_or_null<int32_t>();
  params.num_rows = page_table.int_size(0);
  params.pages_per_row = page_table.int_size(1);
  share_pages(params, call.launch());
}

// A page's chunk of kv_cache [layers, 2, pages, page_size, kv_heads, head_dim] must be dense.
void call_copy_pages(Call& call, const TensorView& kv_cache, const TensorView& page_table,
                     const TensorView& write_start, const TensorView& write_end, const TensorView& num_moves,
                     const TensorView& moves, const TensorView& write_positions, const TensorView& free_pages,
                     const TensorView& counts, const TensorView& workspace, int num_branches) {
  const int64_t bytes = size_of(kv_cache.dtype);
  CopyPagesParams params{};
  params.kv_cache = static_cast<char*>(kv_cache.data<void>());
  params.layer_stride = kv_cache.stride(0) * bytes;
  params.side_stride = kv_cache.stride(1) * bytes;
  params.page_stride = kv_cache.stride(2) * bytes;
  params.chunk_bytes = kv_cache.size(3) * kv_cache.size(4) * kv_cache.size(5) * bytes;
  params.num_layers = kv_cache.int_size(0);
  params.page_size = kv_cache.int_size(3);
  params.page_table = page_table.data<int32_t>();
  params.page_table_stride = page_table.row_stride();
  params.write_start = write_start.contiguous().data<const int32_t>();
  params.write_end = write_end.contiguous().data<const int32_t>();
  if (!write_positions.is_none()) {
    params.write_positions = write_positions.contiguous().data<const int32_t>();
    params.write_positions_size = write_positions.size(1);
  }
  params.num_requests = num_branches > 0 ? page_table.int_size(0) / num_branches : 0;
  params.num_branches = num_branches;
  params.pages_per_row = page_table.int_size(1);
  if (!free_pages.is_none()) {
    params.has_pool = true;
    params.free_pages = free_pages.contiguous().data<const int32_t>();
    params.counts = counts.contiguous().data<int32_t>();
    params.workspace = workspace.contiguous().data<int32_t>();
    params.num_free_pages = free_pages.int_size(0);
  }
  params.num_pages = kv_cache.int_size(2);
  params.num_moves = num_moves.contiguous().data<int32_t>();
  params.moves = moves.contiguous().data<int32_t>();
  copy_pages(params, call.launch());
}

PolicyParams policy_params(const Record& state, const Record& out_plan, const Record& settings,
                           const TensorView& counters) {
  const StateSizes sizes = sizes_of(state);
  PolicyParams params{};
  read_record(state, &params.state);
  read_record(out_plan, &params.out_plan);
  read_record(settings, &params.settings);
  params.counters = counters.contiguous().data<int32_t>();
  params.num_requests = sizes.num_requests;
  params.num_branches = sizes.num_branches;
  params.gen_length = sizes.gen_length;
  params.map_entries = state.get<TensorView>(BBK_KEY("map_token")).int_size(2);
  return params;
}

void call_decode_policy(Call& call, const Record& state, const Record& predictions, const Record& plan,
                        const Record& out_plan, const Record& events, const Record& settings,
                        const TensorView& counters) {
  PolicyParams params = policy_params(state, out_plan, settings, counters);
  read_record(predictions, &params.predictions);
  params.num_predictions = predictions.get<TensorView>(BBK_KEY("target")).size(0);
  plan.read(BBK_KEY("source_row"), &params.source_row);
  plan.read(BBK_KEY("flags"), &params.flags);
  read_record(events, &params.events);
  decode_policy(params, call.launch());
}

void call_initial_plan(Call& call, const Record& state, const Record& out_plan, const Record& settings,
                       const TensorView& counters) {
  initial_plan(policy_params(state, out_plan, settings, counters), call.launch());
}

#define BBK_FIELD_NAME(type, name) #name,

template <size_t kCount>
py::tuple tuple_of(const char* const (&names)[kCount]) {
  py::tuple result(kCount);
  for (size_t i = 0; i < kCount; ++i) result[i] = names[i];
  return result;
}

// The fields that are read of each record, and the names of enumerations: to compare with structs.py.
py::dict record_fields() {
  py::dict fields;
#define BBK_ADD(record, LIST)                           \
  {                                                     \
    const char* const names[] = {LIST(BBK_FIELD_NAME)}; \
    fields[record] = tuple_of(names);                   \
  }
  BBK_ADD("BranchState", BBK_BRANCH_STATE)
  BBK_ADD("StepPlan", BBK_STEP_PLAN)
  BBK_ADD("Predictions", BBK_PREDICTIONS)
  BBK_ADD("PolicyEvents", BBK_POLICY_EVENTS)
  BBK_ADD("PackedQueries", BBK_PACKED_QUERIES)
  BBK_ADD("PolicyParams", BBK_POLICY_SETTINGS)
#undef BBK_ADD
  fields["eos_exit"] = tuple_of(EnumNames<EosExit>::kNames);
  fields["query_span"] = tuple_of(EnumNames<QuerySpan>::kNames);
  fields["policy"] = tuple_of(EnumNames<Policy>::kNames);
  fields["refresh_scope"] = tuple_of(EnumNames<RefreshScope>::kNames);
  return fields;
}

}  // namespace

void bind_decode(py::module_& module) {
  module.attr("RECORD_FIELDS") = record_fields();
  module.attr("NUM_COUNTERS") = kNumCounters;
  module.attr("MAX_MOVE_LISTS") = kMaxMoveLists;
  define<&call_pack_windows>(
      module, "pack_windows",
      {"state", "plan", "page_table", "packed", "page_size", "prediction_offset", "scattered"});
  define<&call_share_pages>(module, "share_pages", {"page_table", "source_row", "workspace"});
  define<&call_copy_pages>(module, "copy_pages",
                           {"kv_cache", "page_table", "write_start", "write_end", "num_moves", "moves",
                            "write_positions", "free_pages", "counts", "workspace", "num_branches"});
  define<&call_decode_policy>(
      module, "decode_policy",
      {"state", "predictions", "plan", "out_plan=out[0]", "events=out[1]", "params", "counters"});
  define<&call_initial_plan>(module, "initial_plan", {"state", "out_plan=out", "params", "counters"});
}

}  // namespace bbk
