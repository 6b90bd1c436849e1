#include "gemm/gemm.h"

#include "bind/bindings.h"

namespace py = pybind11;

namespace bbk {
namespace {

void launch_gemm(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, int64_t num_tokens,
                 int64_t in_features, int64_t out_features, int64_t x_row_stride, int64_t weight_row_stride,
                 int64_t out_row_stride, int64_t up_distance, bool gated, int dtype, int tile_tokens,
                 int tile_rows, int split_k, int multicast, bool static_weight, bool programmatic, int device,
                 uintptr_t stream) {
  const GemmParams params{reinterpret_cast<const void*>(x),
                          reinterpret_cast<const void*>(weight),
                          reinterpret_cast<const void*>(bias),
                          reinterpret_cast<void*>(out),
                          num_tokens,
                          in_features,
                          out_features,
                          x_row_stride,
                          weight_row_stride,
                          out_row_stride,
                          up_distance,
                          gated,
                          static_cast<DType>(dtype)};
  gemm(params, GemmTile{tile_tokens, tile_rows, split_k, multicast}, static_weight, programmatic,
       Launch{device, reinterpret_cast<cudaStream_t>(stream)});
}

}  // namespace

void bind_gemm(py::module_& module) {
  module.def("gemm", &launch_gemm, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("out"),
             py::arg("num_tokens"), py::arg("in_features"), py::arg("out_features"), py::arg("x_row_stride"),
             py::arg("weight_row_stride"), py::arg("out_row_stride"), py::arg("up_distance"),
             py::arg("gated"), py::arg("dtype"), py::arg("tile_tokens"), py::arg("tile_rows"),
             py::arg("split_k"), py::arg("multicast"), py::arg("static_weight"), py::arg("programmatic"),
             py::arg("device"), py::arg("stream"));
  module.def("gemm_is_available", &gemm_is_available, py::arg("device"));
}

}  // namespace bbk
