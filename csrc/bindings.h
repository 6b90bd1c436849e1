// Each bind_*.cpp adds its operators to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace bbk {

void bind_activation(pybind11::module_& module);

}  // namespace bbk
