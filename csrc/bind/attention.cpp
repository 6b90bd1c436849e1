#include "attention/attention.h"

#include <pybind11/stl.h>

#include <array>

#include "bind/bindings.h"

namespace py = pybind11;

namespace bbk {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// device -1: all addresses are host memory, and the plan is made there.
void launch_plan(uintptr_t page_table, uintptr_t cu_seqlens_q, uintptr_t seqlens_k, uintptr_t tiles,
                 uintptr_t query_order, uintptr_t pieces, uintptr_t token_row, uintptr_t counts,
                 uintptr_t units, uintptr_t stretches, uintptr_t arrivals, uintptr_t workspace,
                 int64_t page_table_stride, int num_rows, int pages_per_row, int page_size, int num_tokens,
                 int tile_tokens, int segment_pages, int max_segments, int max_pieces, int max_tiles,
                 int target_tiles, int min_segments, int block_tokens, int processors, int max_units,
                 int num_kv_heads, int max_slack, int device, uintptr_t stream) {
  const AttentionPlanParams params{pointer<const int32_t>(page_table),
                                   pointer<const int32_t>(cu_seqlens_q),
                                   pointer<const int32_t>(seqlens_k),
                                   pointer<int32_t>(tiles),
                                   pointer<int32_t>(query_order),
                                   pointer<int32_t>(pieces),
                                   pointer<int32_t>(token_row),
                                   pointer<int32_t>(counts),
                                   pointer<int32_t>(units),
                                   pointer<int32_t>(stretches),
                                   pointer<int32_t>(arrivals),
                                   pointer<int32_t>(workspace),
                                   page_table_stride,
                                   num_rows,
                                   pages_per_row,
                                   page_size,
                                   num_tokens,
                                   tile_tokens,
                                   segment_pages,
                                   max_segments,
                                   max_pieces,
                                   max_tiles,
                                   target_tiles,
                                   min_segments,
                                   block_tokens,
                                   processors,
                                   max_units,
                                   num_kv_heads,
                                   max_slack};
  if (device < 0) {
    attention_plan_on_host(params);
  } else {
    attention_plan(params, Launch{device, reinterpret_cast<cudaStream_t>(stream)});
  }
}

void launch_attention(uintptr_t q, uintptr_t k_cache, uintptr_t v_cache, uintptr_t out, uintptr_t partial_out,
                      uintptr_t partial_lse, uintptr_t page_table, uintptr_t seqlens_k, uintptr_t tiles,
                      uintptr_t query_order, uintptr_t pieces, uintptr_t token_row, uintptr_t counts,
                      uintptr_t units, uintptr_t stretches, uintptr_t arrivals, int64_t page_table_stride,
                      const std::array<int64_t, 2>& q_strides, const std::array<int64_t, 3>& k_strides,
                      const std::array<int64_t, 3>& v_strides, int num_rows, int num_pages, int num_tokens,
                      int num_heads, int num_kv_heads, int head_dim, int page_size, int pages_per_row,
                      int tile_tokens, int max_tiles, int max_pieces, int max_units, int num_processors,
                      float softmax_scale, int dtype, bool programmatic, int device, uintptr_t stream) {
  const AttentionParams params{pointer<const void>(q),
                               pointer<const void>(k_cache),
                               pointer<const void>(v_cache),
                               pointer<void>(out),
                               pointer<float>(partial_out),
                               pointer<float>(partial_lse),
                               pointer<const int32_t>(page_table),
                               pointer<const int32_t>(seqlens_k),
                               pointer<const int32_t>(tiles),
                               pointer<const int32_t>(query_order),
                               pointer<const int32_t>(pieces),
                               pointer<const int32_t>(token_row),
                               pointer<const int32_t>(counts),
                               pointer<const int32_t>(units),
                               pointer<const int32_t>(stretches),
                               pointer<int32_t>(arrivals),
                               page_table_stride,
                               q_strides[0],
                               q_strides[1],
                               k_strides[0],
                               k_strides[1],
                               k_strides[2],
                               v_strides[0],
                               v_strides[1],
                               v_strides[2],
                               num_rows,
                               num_pages,
                               num_tokens,
                               num_heads,
                               num_kv_heads,
                               head_dim,
                               page_size,
                               pages_per_row,
                               tile_tokens,
                               max_tiles,
                               max_pieces,
                               max_units,
                               num_processors,
                               softmax_scale,
                               static_cast<DType>(dtype),
                               programmatic};
  varlen_attention(params, Launch{device, reinterpret_cast<cudaStream_t>(stream)});
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("attention_plan_workspace", &attention_plan_workspace, py::arg("num_rows"),
             py::arg("max_segments"), py::arg("max_pieces"), py::arg("num_tokens"), py::arg("block_tokens"));
  module.def(
      "attention_even_partials",
      [](int num_processors, int head_dim, int dtype) {
        return attention_even_partials(num_processors, head_dim, static_cast<DType>(dtype));
      },
      py::arg("num_processors"), py::arg("head_dim"), py::arg("dtype"));
  module.def("attention_plan", &launch_plan, py::arg("page_table"), py::arg("cu_seqlens_q"),
             py::arg("seqlens_k"), py::arg("tiles"), py::arg("query_order"), py::arg("pieces"),
             py::arg("token_row"), py::arg("counts"), py::arg("units"), py::arg("stretches"),
             py::arg("arrivals"), py::arg("workspace"), py::arg("page_table_stride"), py::arg("num_rows"),
             py::arg("pages_per_row"), py::arg("page_size"), py::arg("num_tokens"), py::arg("tile_tokens"),
             py::arg("segment_pages"), py::arg("max_segments"), py::arg("max_pieces"), py::arg("max_tiles"),
             py::arg("target_tiles"), py::arg("min_segments"), py::arg("block_tokens"), py::arg("processors"),
             py::arg("max_units"), py::arg("num_kv_heads"), py::arg("max_slack"), py::arg("device"),
             py::arg("stream"));
  module.def("varlen_attention", &launch_attention, py::arg("q"), py::arg("k_cache"), py::arg("v_cache"),
             py::arg("out"), py::arg("partial_out"), py::arg("partial_lse"), py::arg("page_table"),
             py::arg("seqlens_k"), py::arg("tiles"), py::arg("query_order"), py::arg("pieces"),
             py::arg("token_row"), py::arg("counts"), py::arg("units"), py::arg("stretches"),
             py::arg("arrivals"), py::arg("page_table_stride"), py::arg("q_strides"), py::arg("k_strides"),
             py::arg("v_strides"), py::arg("num_rows"), py::arg("num_pages"), py::arg("num_tokens"),
             py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("page_size"),
             py::arg("pages_per_row"), py::arg("tile_tokens"), py::arg("max_tiles"), py::arg("max_pieces"),
             py::arg("max_units"), py::arg("num_processors"), py::arg("softmax_scale"), py::arg("dtype"),
             py::arg("programmatic"), py::arg("device"), py::arg("stream"));
}

}  // namespace bbk
