#include "layer/norm.h"

#include "bind/bindings.h"

namespace py = pybind11;

namespace bbk {
namespace {

void launch_rms_norm(uintptr_t x, uintptr_t weight, uintptr_t residual, uintptr_t out, int64_t num_tokens,
                     int64_t dim, int64_t x_row_stride, int64_t residual_row_stride, int64_t out_row_stride,
                     float eps, int dtype, bool programmatic, int device, uintptr_t stream) {
  const RmsNormParams params{reinterpret_cast<const void*>(x),
                             reinterpret_cast<const void*>(weight),
                             reinterpret_cast<void*>(residual),
                             reinterpret_cast<void*>(out),
                             num_tokens,
                             dim,
                             x_row_stride,
                             residual_row_stride,
                             out_row_stride,
                             eps,
                             static_cast<DType>(dtype)};
  rms_norm(params, programmatic, Launch{device, reinterpret_cast<cudaStream_t>(stream)});
}

}  // namespace

void bind_norm(py::module_& module) {
  module.def("rms_norm", &launch_rms_norm, py::arg("x"), py::arg("weight"), py::arg("residual"),
             py::arg("out"), py::arg("num_tokens"), py::arg("dim"), py::arg("x_row_stride"),
             py::arg("residual_row_stride"), py::arg("out_row_stride"), py::arg("eps"), py::arg("dtype"),
             py::arg("programmatic"), py::arg("device"), py::arg("stream"));
}

}  // namespace bbk
