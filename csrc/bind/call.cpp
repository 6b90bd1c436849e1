#include "bind/call.h"

#include <cstring>

namespace py = pybind11;

namespace bbk {
namespace {

std::string place_of(int device) {
  return device < 0 ? std::string("host memory") : "cuda:" + std::to_string(device);
}

std::string repr_of_type(PyObject* object) { return Py_TYPE(object)->tp_name; }

}  // namespace

void Call::join(const TensorView& view) {
  if (view.is_none()) return;
  if (*first_.name == '\0') {
    first_ = view.label;
    device_ = view.device;
  } else if (view.device != device_) {
    view.refuse("expected a tensor in " + place_of(device_) + " as " + first_.field() + ", got one in " +
                place_of(view.device));
  }
}

Launch Call::launch_on_gpu() const {
  if (device_ < 0) refuse(op_, "expected tensors on a GPU, got host memory");
  return launch();
}

void Record::throw_missing(const Label& label) {
  if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
  PyErr_Clear();
  throw py::type_error(label.text() + "missing");
}

DType float_dtype(std::initializer_list<const TensorView*> tensors) {
  const TensorView& first = **tensors.begin();
  if (!is_float(first.dtype)) {
    first.refuse(std::string("expected float32, float16 or bfloat16, got ") + name_of(first.dtype));
  }
  for (const TensorView* tensor : tensors) {
    if (tensor->is_none() || tensor->dtype == first.dtype) continue;
    tensor->refuse(std::string("expected ") + name_of(first.dtype) + " as " + first.label.field() + ", got " +
                   name_of(tensor->dtype));
  }
  return first.dtype;
}

void check_caches(bool scaled, const TensorView& q, std::initializer_list<const TensorView*> caches) {
  for (const TensorView* cache : caches) {
    if (!scaled) {
      float_dtype({&q, cache});
    } else if (cache->dtype != DType::kUInt8) {
      cache->refuse(std::string("expected uint8 beside scales, got ") + name_of(cache->dtype));
    }
  }
}

void throw_wrong_type(const Label& label, const char* expected, PyObject* object) {
  throw py::type_error(label.text() + "expected " + expected + ", got " + repr_of_type(object));
}

void throw_wrong_name(const Label& label, const char* const* names, int count, PyObject* object) {
  std::string expected;
  for (int i = 0; i < count; ++i) {
    expected += (i == 0 ? "'" : i == count - 1 ? "' or '" : "', '") + std::string(names[i]);
  }
  refuse(label.op, label.field() + ": expected " + expected + "', got " + std::string(py::repr(object)));
}

void throw_too_many(const Label& label, int most, int64_t count) {
  refuse(label.op,
         label.field() + ": expected at most " + std::to_string(most) + " ids, got " + std::to_string(count));
}

void Arguments::set(const char* op, const char* const* names, size_t count) {
  op_ = op;
  for (size_t i = 0; i < count; ++i) {
    const char* equals = std::strchr(names[i], '=');
    const std::string keyword = equals != nullptr ? std::string(names[i], equals) : names[i];
    keys_[i] = PyUnicode_InternFromString(keyword.c_str());
    names_[i] = equals != nullptr ? equals + 1 : names[i];
  }
  keys_[count] = PyUnicode_InternFromString("stream");
  names_[count] = "stream";
  count_ = count + 1;
}

void Arguments::match(PyObject* const* values, Py_ssize_t positional, PyObject* keywords,
                      PyObject** given) const {
  const auto fail = [this](const std::string& what) {
    throw py::type_error(std::string("blockbatch_kernels.") + op_ + ": " + what);
  };
  if (positional != 0) fail("expected arguments by name alone");
  std::fill_n(given, count_, nullptr);
  const size_t number = keywords != nullptr ? static_cast<size_t>(PyTuple_GET_SIZE(keywords)) : 0;
  for (size_t i = 0; i < number; ++i) {
    PyObject* key = PyTuple_GET_ITEM(keywords, i);
    // Names in a call are interned, and mostly come in the order of the definition.
    size_t at = i < count_ && keys_[i] == key ? i : 0;
    while (at < count_ && keys_[at] != key) ++at;
    for (size_t j = 0; at == count_ && j < count_; ++j) {
      if (PyUnicode_Compare(keys_[j], key) == 0) at = j;
    }
    if (at == count_) fail("unexpected argument '" + std::string(py::str(key)) + "'");
    given[at] = values[i];
  }
  for (size_t i = 0; i < count_; ++i) {
    if (given[i] == nullptr) fail(std::string(names_[i]) + ": missing");
  }
}

void raise_current() {
  try {
    throw;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

void add_function(py::module_& module, const Arguments& arguments, PyMethodDef* method, Function function) {
  method->ml_name = arguments.op();
  method->ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
  method->ml_flags = METH_FASTCALL | METH_KEYWORDS;
  module.add_object(method->ml_name, py::reinterpret_steal<py::object>(PyCFunction_New(method, nullptr)));
}

}  // namespace bbk
