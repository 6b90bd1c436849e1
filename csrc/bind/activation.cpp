#include "layer/activation.h"

#include "bind/bindings.h"

namespace py = pybind11;

namespace bbk {
namespace {

void launch_swiglu(uintptr_t gate_up, uintptr_t out, int64_t num_tokens, int64_t intermediate_size,
                   int64_t gate_up_row_stride, int64_t out_row_stride, int dtype, int device,
                   uintptr_t stream) {
  const SwigluParams params{reinterpret_cast<const void*>(gate_up),
                            reinterpret_cast<void*>(out),
                            num_tokens,
                            intermediate_size,
                            gate_up_row_stride,
                            out_row_stride,
                            static_cast<DType>(dtype)};
  swiglu(params, Launch{device, reinterpret_cast<cudaStream_t>(stream)});
}

}  // namespace

void bind_activation(py::module_& module) {
  module.def("swiglu", &launch_swiglu, py::arg("gate_up"), py::arg("out"), py::arg("num_tokens"),
             py::arg("intermediate_size"), py::arg("gate_up_row_stride"), py::arg("out_row_stride"),
             py::arg("dtype"), py::arg("device"), py::arg("stream"));
}

}  // namespace bbk
