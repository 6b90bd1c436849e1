#include "decode/pack.h"

#include "bind/bindings.h"

namespace py = pybind11;

namespace bbk {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void launch_pack_windows(uintptr_t prompt_tokens, uintptr_t prompt_length, uintptr_t tokens,
                         uintptr_t query_start, uintptr_t query_end, uintptr_t predict, uintptr_t page_table,
                         int64_t page_table_stride, uintptr_t input_ids, uintptr_t positions,
                         uintptr_t row_index, uintptr_t cu_seqlens_q, uintptr_t slot_mapping,
                         uintptr_t predict_index, uintptr_t predict_target, int64_t capacity,
                         int64_t predict_capacity, int num_rows, int num_branches, int gen_length,
                         int max_prompt, int pages_per_row, int page_size, int prediction_offset, int device,
                         uintptr_t stream) {
  PackParams params{};
  params.prompt_tokens = pointer<const int32_t>(prompt_tokens);
  params.prompt_length = pointer<const int32_t>(prompt_length);
  params.tokens = pointer<const int32_t>(tokens);
  params.query_start = pointer<const int32_t>(query_start);
  params.query_end = pointer<const int32_t>(query_end);
  params.predict = pointer<const uint8_t>(predict);
  params.page_table = pointer<const int32_t>(page_table);
  params.page_table_stride = page_table_stride;
  params.input_ids = pointer<int32_t>(input_ids);
  params.positions = pointer<int32_t>(positions);
  params.row_index = pointer<int32_t>(row_index);
  params.cu_seqlens_q = pointer<int32_t>(cu_seqlens_q);
  params.slot_mapping = pointer<int64_t>(slot_mapping);
  params.predict_index = pointer<int64_t>(predict_index);
  params.predict_target = pointer<int64_t>(predict_target);
  params.capacity = capacity;
  params.predict_capacity = predict_capacity;
  params.num_rows = num_rows;
  params.num_branches = num_branches;
  params.gen_length = gen_length;
  params.max_prompt = max_prompt;
  params.pages_per_row = pages_per_row;
  params.page_size = page_size;
  params.prediction_offset = prediction_offset;
  pack_windows(params, Launch{device, reinterpret_cast<cudaStream_t>(stream)});
}

}  // namespace

void bind_pack(py::module_& module) {
  module.def("pack_windows", &launch_pack_windows, py::arg("prompt_tokens"), py::arg("prompt_length"),
             py::arg("tokens"), py::arg("query_start"), py::arg("query_end"), py::arg("predict"),
             py::arg("page_table"), py::arg("page_table_stride"), py::arg("input_ids"), py::arg("positions"),
             py::arg("row_index"), py::arg("cu_seqlens_q"), py::arg("slot_mapping"), py::arg("predict_index"),
             py::arg("predict_target"), py::arg("capacity"), py::arg("predict_capacity"), py::arg("num_rows"),
             py::arg("num_branches"), py::arg("gen_length"), py::arg("max_prompt"), py::arg("pages_per_row"),
             py::arg("page_size"), py::arg("prediction_offset"), py::arg("device"), py::arg("stream"));
}

}  // namespace bbk
