// How a torch.Tensor becomes a TensorView, without a header or a library of torch.
#pragma once

#include <pybind11/pybind11.h>

#include "common/tensor_view.h"

namespace bbk {

// Fetches from torch what the caster compares with and asks for; when the module is imported, once.
void prepare_tensors();

// False: `object` is neither a tensor nor None, which gives a null view. Throws std::invalid_argument for a
// tensor that a view cannot describe, without the name of the argument.
bool read_tensor(PyObject* object, TensorView* view);

}  // namespace bbk

namespace pybind11::detail {

template <>
struct type_caster<bbk::TensorView> {
  PYBIND11_TYPE_CASTER(bbk::TensorView, const_name("torch.Tensor | None"));

  bool load(handle source, bool) { return bbk::read_tensor(source.ptr(), &value); }
};

}  // namespace pybind11::detail
