// Each file here adds the operators of one room to the Python module. A new operator is a function
//   void call_op(Call& call, const TensorView& x, ..., float eps)
// that fills the operator's parameters by name (`params.x = x.data<const void>()`), sizes and strides from
// the views, and calls it with call.launch(), or call.launch_on_gpu() if it has no version for the host;
// below it one line, define<&call_op>(module, "op", {"x", ..., "eps"}); then Python calls op(x=x, ...,
// stream=...).
#pragma once

#include <pybind11/pybind11.h>

#include "bind/call.h"

namespace bbk {

void bind_attention(pybind11::module_& module);
void bind_decode(pybind11::module_& module);
void bind_gemm(pybind11::module_& module);
void bind_layer(pybind11::module_& module);
void bind_sampling(pybind11::module_& module);

// What rope_kv_write and the products that end in it have in common. Caches are bytes where they have scales.
struct RopeKvWriteParams;
void read_cache_scales(const TensorView& k_scale, const TensorView& v_scale, const TensorView& q,
                       const TensorView& k_cache, const TensorView& v_cache, RopeKvWriteParams* params);
void read_rope(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
               const TensorView& positions, const TensorView& slot_mapping, const TensorView& cos,
               const TensorView& sin, RopeKvWriteParams* params);

}  // namespace bbk
