// Each file here adds its operators to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace bbk {

void bind_activation(pybind11::module_& module);
void bind_attention(pybind11::module_& module);
void bind_gemm(pybind11::module_& module);
void bind_lm_head(pybind11::module_& module);
void bind_norm(pybind11::module_& module);
void bind_pack(pybind11::module_& module);
void bind_pages(pybind11::module_& module);
void bind_policy(pybind11::module_& module);
void bind_rope(pybind11::module_& module);

}  // namespace bbk
