#include "attention/attention.h"

#include <algorithm>

#include "bind/bindings.h"

namespace py = pybind11;

namespace bbk {
namespace {

// `plan` has the tensors of an AttentionPlan, all contiguous, `shape` is the AttentionShape it is for.
void call_attention_plan(Call& call, const TensorView& page_table, const TensorView& cu_seqlens_q,
                         const TensorView& seqlens_k, const Record& plan, const TensorView& workspace,
                         const Record& shape, int page_size, int num_tokens) {
  AttentionPlanParams params{};
  params.page_table = page_table.data<const int32_t>();
  params.cu_seqlens_q = cu_seqlens_q.contiguous().data<const int32_t>();
  params.seqlens_k = seqlens_k.contiguous().data<const int32_t>();
  plan.read(BBK_KEY("tiles"), &params.tiles);
  plan.read(BBK_KEY("query_order"), &params.query_order);
  plan.read(BBK_KEY("pieces"), &params.pieces);
  plan.read(BBK_KEY("token_row"), &params.token_row);
  plan.read(BBK_KEY("counts"), &params.counts);
  plan.read(BBK_KEY("units"), &params.units);
  plan.read(BBK_KEY("stretches"), &params.stretches);
  plan.read(BBK_KEY("arrivals"), &params.arrivals);
  params.workspace = workspace.contiguous().data<int32_t>();
  params.page_table_stride = page_table.row_stride();
  params.num_rows = page_table.int_size(0);
  params.pages_per_row = page_table.int_size(1);
  params.page_size = page_size;
  params.num_tokens = num_tokens;
  shape.read(BBK_KEY("tile_tokens"), &params.tile_tokens);
  shape.read(BBK_KEY("segment_pages"), &params.segment_pages);
  shape.read(BBK_KEY("max_segments"), &params.max_segments);
  shape.read(BBK_KEY("max_pieces"), &params.max_pieces);
  params.max_tiles = plan.get<TensorView>(BBK_KEY("tiles")).int_size(0);
  shape.read(BBK_KEY("target_tiles"), &params.target_tiles);
  shape.read(BBK_KEY("min_segments"), &params.min_segments);
  shape.read(BBK_KEY("block_tokens"), &params.block_tokens);
  shape.read(BBK_KEY("processors"), &params.processors);
  params.max_units = plan.get<TensorView>(BBK_KEY("units")).int_size(0);
  shape.read(BBK_KEY("num_kv_heads"), &params.num_kv_heads);
  shape.read(BBK_KEY("max_slack"), &params.max_slack);
  shape.read(BBK_KEY("num_branches"), &params.num_branches);
  const Launch launch = call.launch();
  if (launch.device < 0) {
    attention_plan_on_host(params);
  } else {
    attention_plan(params, launch);
  }
}

// Partial results of all pieces: of each query and head a sum, its elements, and behind them all a logarithm.
int64_t num_partials(const TensorView& q, const TensorView& pieces) {
  return pieces.size(0) > 1 ? pieces.size(0) * q.size(0) * q.size(1) : 0;
}

void call_varlen_attention(Call& call, const TensorView& q, const TensorView& k_cache,
                           const TensorView& v_cache, const TensorView& k_scale, const TensorView& v_scale,
                           const TensorView& out, const TensorView& partials, const TensorView& page_table,
                           const TensorView& seqlens_k, const TensorView& tiles,
                           const TensorView& query_order, const TensorView& pieces,
                           const TensorView& token_row, const TensorView& counts, const TensorView& units,
                           const TensorView& stretches, const TensorView& arrivals, int tile_tokens,
                           float softmax_scale, bool programmatic) {
  AttentionParams params{};
  params.k_scale = k_scale.contiguous().data_or_null<const float>();
  params.v_scale = v_scale.contiguous().data_or_null<const float>();
  params.dtype = float_dtype({&q, &out});
  check_caches(params.k_scale != nullptr, q, {&k_cache, &v_cache});
  params.q = q.data<const void>();
  params.k_cache = k_cache.data<const void>();
  params.v_cache = v_cache.data<const void>();
  params.out = out.contiguous().data<void>();
  params.partial_out = partials.contiguous().data<float>();
  params.partial_lse = params.partial_out + num_partials(q, pieces) * q.size(2);
  params.page_table = page_table.data<const int32_t>();
  params.seqlens_k = seqlens_k.contiguous().data<const int32_t>();
  params.tiles = tiles.contiguous().data<const int32_t>();
  params.query_order = query_order.contiguous().data<const int32_t>();
  params.pieces = pieces.contiguous().data<const int32_t>();
  params.token_row = token_row.contiguous().data<const int32_t>();
  params.counts = counts.contiguous().data<const int32_t>();
  params.units = units.contiguous().data<const int32_t>();
  params.stretches = stretches.contiguous().data<const int32_t>();
  params.arrivals = arrivals.contiguous().data<int32_t>();
  params.page_table_stride = page_table.row_stride();
  params.q_token_stride = q.stride(0);
  params.q_head_stride = q.stride(1);
  params.k_page_stride = k_cache.stride(0);
  params.k_token_stride = k_cache.stride(1);
  params.k_head_stride = k_cache.stride(2);
  params.v_page_stride = v_cache.stride(0);
  params.v_token_stride = v_cache.stride(1);
  params.v_head_stride = v_cache.stride(2);
  params.num_rows = page_table.int_size(0);
  params.num_pages = k_cache.int_size(0);
  params.num_tokens = q.int_size(0);
  params.num_heads = q.int_size(1);
  params.num_kv_heads = k_cache.int_size(2);
  params.head_dim = q.int_size(2);
  params.page_size = k_cache.int_size(1);
  params.pages_per_row = page_table.int_size(1);
  params.tile_tokens = tile_tokens;
  params.max_tiles = tiles.int_size(0);
  params.max_pieces = pieces.int_size(0);
  params.max_units = units.int_size(0);
  params.num_processors = stretches.int_size(0);
  params.softmax_scale = softmax_scale;
  params.programmatic = programmatic;
  varlen_attention(params, call.launch_on_gpu());
}

// Floats of `partials`; which kernel runs is decided in the call.
int64_t attention_partials(const TensorView& q, const TensorView& pieces, const TensorView& stretches) {
  return std::max(num_partials(q, pieces) * (q.size(2) + 1),
                  attention_even_partials(stretches.int_size(0), q.int_size(2), q.dtype));
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("attention_plan_workspace", &attention_plan_workspace, py::arg("num_rows"),
             py::arg("max_segments"), py::arg("max_pieces"), py::arg("num_tokens"), py::arg("block_tokens"));
  module.def("attention_partials", &attention_partials, py::arg("q"), py::arg("pieces"),
             py::arg("stretches"));
  define<&call_attention_plan>(
      module, "attention_plan",
      {"page_table", "cu_seqlens_q", "seqlens_k", "plan", "workspace", "shape", "page_size", "num_tokens"});
  define<&call_varlen_attention>(
      module, "varlen_attention",
      {"q",          "k_cache",   "v_cache",  "k_scale",     "v_scale",       "out",         "partials",
       "page_table", "seqlens_k", "tiles",    "query_order", "pieces",        "token_row",   "counts",
       "units",      "stretches", "arrivals", "tile_tokens", "softmax_scale", "programmatic"});
}

}  // namespace bbk
