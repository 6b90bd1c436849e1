#include "decode/pages.h"

#include "bind/bindings.h"

namespace py = pybind11;

namespace bbk {
namespace {

void launch_share_pages(uintptr_t page_table, int64_t page_table_stride, uintptr_t source_row, int num_rows,
                        int pages_per_row, int device, uintptr_t stream) {
  const SharePagesParams params{reinterpret_cast<int32_t*>(page_table), page_table_stride,
                                reinterpret_cast<const int32_t*>(source_row), num_rows, pages_per_row};
  share_pages(params, Launch{device, reinterpret_cast<cudaStream_t>(stream)});
}

void launch_copy_pages(uintptr_t kv_cache, int64_t layer_stride, int64_t side_stride, int64_t page_stride,
                       int64_t chunk_bytes, int num_layers, int page_size, uintptr_t page_table,
                       int64_t page_table_stride, uintptr_t write_start, uintptr_t write_end,
                       int num_requests, int num_branches, int pages_per_row, uintptr_t num_moves,
                       uintptr_t moves, int device, uintptr_t stream) {
  CopyPagesParams params{};
  params.kv_cache = reinterpret_cast<char*>(kv_cache);
  params.layer_stride = layer_stride;
  params.side_stride = side_stride;
  params.page_stride = page_stride;
  params.chunk_bytes = chunk_bytes;
  params.num_layers = num_layers;
  params.page_size = page_size;
  params.page_table = reinterpret_cast<int32_t*>(page_table);
  params.page_table_stride = page_table_stride;
  params.write_start = reinterpret_cast<const int32_t*>(write_start);
  params.write_end = reinterpret_cast<const int32_t*>(write_end);
  params.num_requests = num_requests;
  params.num_branches = num_branches;
  params.pages_per_row = pages_per_row;
  params.num_moves = reinterpret_cast<int32_t*>(num_moves);
  params.moves = reinterpret_cast<int32_t*>(moves);
  copy_pages(params, Launch{device, reinterpret_cast<cudaStream_t>(stream)});
}

}  // namespace

void bind_pages(py::module_& module) {
  module.def("share_pages", &launch_share_pages, py::arg("page_table"), py::arg("page_table_stride"),
             py::arg("source_row"), py::arg("num_rows"), py::arg("pages_per_row"), py::arg("device"),
             py::arg("stream"));
  module.def("copy_pages", &launch_copy_pages, py::arg("kv_cache"), py::arg("layer_stride"),
             py::arg("side_stride"), py::arg("page_stride"), py::arg("chunk_bytes"), py::arg("num_layers"),
             py::arg("page_size"), py::arg("page_table"), py::arg("page_table_stride"),
             py::arg("write_start"), py::arg("write_end"), py::arg("num_requests"), py::arg("num_branches"),
             py::arg("pages_per_row"), py::arg("num_moves"), py::arg("moves"), py::arg("device"),
             py::arg("stream"));
}

}  // namespace bbk
