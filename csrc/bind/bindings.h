// Each file here adds the operators of one room to the Python module. A new operator is
//   1. its header in the room: a struct of parameters and an entry point;
//   2. here a function `void call_op(Call& call, const TensorView& x, ..., float eps, ...)` that fills the
//      struct by name (`params.x = x.data<const void>()`), with sizes and strides from the views, and calls
//      the entry point with call.launch() or, without a version for the host, call.launch_on_gpu();
//   3. `define<&call_op>(module, "op", {"x", ..., "eps", ...})` in the room's function below;
//   4. in blockbatch_kernels/cuda a function that allocates and calls `extension.load().op(x=x, ...,
//      stream=extension.stream_of(x))`; 5. a raised kApi in module.cpp if an older caller would break.
#pragma once

#include <pybind11/pybind11.h>

#include "bind/call.h"

namespace bbk {

void bind_attention(pybind11::module_& module);
void bind_decode(pybind11::module_& module);
void bind_gemm(pybind11::module_& module);
void bind_layer(pybind11::module_& module);

// Fills what both products with rotary embedding behind them and the operator itself take.
struct RopeKvWriteParams;
void read_rope(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
               const TensorView& positions, const TensorView& slot_mapping, const TensorView& cos,
               const TensorView& sin, RopeKvWriteParams* params);

}  // namespace bbk
