// A tensor is read in one of two ways: through the table of C functions that newer versions of torch publish
// for DLPack's exchange of tensors, within some tens of nanoseconds, or through its Python attributes, within
// some hundreds, which serve every version of torch, subclasses of its tensors, and what only looks like one.
#include "bind/caster.h"

#include "bind/dlpack.h"

namespace py = pybind11;

namespace bbk {
namespace {

struct Torch {
  PyObject* data_ptr;
  PyObject* shape;
  PyObject* stride;
  PyObject* dtype;
  PyObject* get_device;
  PyObject* dtypes[kNumDTypes];
  PyTypeObject* exchanged[2];     // the types that the table of functions is for
  dlpack::FromPyObject exchange;  // null: torch has no table, or one of another major version
};

Torch known{};

// Owns a reference for a scope; null stands for a Python exception.
struct Owned {
  PyObject* object;
  explicit Owned(PyObject* owned) : object(owned) {
    if (owned == nullptr) throw py::error_already_set();
  }
  ~Owned() { Py_DECREF(object); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
};

void check_dims(int64_t dims) {
  if (dims > TensorView::kMaxDims) {
    throw std::invalid_argument("expected at most " + std::to_string(TensorView::kMaxDims) +
                                " dimensions, got " + std::to_string(dims));
  }
}

[[noreturn]] void refuse_dtype(PyObject* tensor) {
  std::string expected;
  for (int i = 0; i < kNumDTypes; ++i) {
    expected += (i == 0 ? "" : i == kNumDTypes - 1 ? " or " : ", ") + std::string(kDTypeNames[i]);
  }
  const Owned dtype(PyObject_GetAttr(tensor, known.dtype));
  throw std::invalid_argument("expected " + expected + ", got " + std::string(py::str(dtype.object)));
}

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

// Writes a tuple of integers and returns their number.
int integers(PyObject* tuple, int64_t* values) {
  if (!PyTuple_Check(tuple)) throw std::invalid_argument("expected tuples as shape and stride()");
  const Py_ssize_t count = PyTuple_GET_SIZE(tuple);
  check_dims(count);
  for (Py_ssize_t i = 0; i < count; ++i) values[i] = integer(PyTuple_GET_ITEM(tuple, i));
  return static_cast<int>(count);
}

void read_attributes(PyObject* tensor, PyObject* address, TensorView* view) {
  view->ptr = PyLong_AsVoidPtr(address);
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  view->dims = integers(Owned(PyObject_GetAttr(tensor, known.shape)).object, view->sizes);
  if (integers(Owned(PyObject_CallMethodNoArgs(tensor, known.stride)).object, view->strides) != view->dims) {
    throw std::invalid_argument("expected as many strides as sizes");
  }
  view->device = static_cast<int>(integer(Owned(PyObject_CallMethodNoArgs(tensor, known.get_device)).object));
  const Owned dtype(PyObject_GetAttr(tensor, known.dtype));
  int code = 0;
  while (code < kNumDTypes && known.dtypes[code] != dtype.object) ++code;
  if (code == kNumDTypes) refuse_dtype(tensor);
  view->dtype = static_cast<DType>(code);
}

void read_exchanged(PyObject* tensor, TensorView* view) {
  dlpack::Tensor exchanged{};
  if (known.exchange(tensor, &exchanged) != 0) throw py::error_already_set();
  check_dims(exchanged.dims);
  view->ptr = static_cast<char*>(exchanged.data) + exchanged.byte_offset;
  view->dims = exchanged.dims;
  for (int dim = 0; dim < exchanged.dims; ++dim) {
    view->sizes[dim] = exchanged.shape[dim];
    view->strides[dim] = exchanged.strides[dim];
  }
  switch (exchanged.device.type) {
    case dlpack::kCpu:
    case dlpack::kCudaHost:
      view->device = -1;
      break;
    case dlpack::kCuda:
      view->device = exchanged.device.index;
      break;
    default:
      throw std::invalid_argument("expected a tensor on a CUDA GPU or in host memory");
  }
#define BBK_MATCH(value, name, kind, width)                                                          \
  if (exchanged.dtype.code == kind && exchanged.dtype.bits == width && exchanged.dtype.lanes == 1) { \
    view->dtype = DType::value;                                                                      \
    return;                                                                                          \
  }
  BBK_DTYPES(BBK_MATCH)
#undef BBK_MATCH
  refuse_dtype(tensor);
}

}  // namespace

void prepare_tensors() {
  const py::module_ torch = py::module_::import("torch");
  known.data_ptr = PyUnicode_InternFromString("data_ptr");
  known.shape = PyUnicode_InternFromString("shape");
  known.stride = PyUnicode_InternFromString("stride");
  known.dtype = PyUnicode_InternFromString("dtype");
  known.get_device = PyUnicode_InternFromString("get_device");
  for (int i = 0; i < kNumDTypes; ++i)
    known.dtypes[i] = py::object(torch.attr(kDTypeNames[i])).release().ptr();
  const py::object tensor = torch.attr("Tensor"), parameter = torch.attr("nn").attr("Parameter");
  known.exchange = dlpack::find_exchange(tensor.ptr());
  if (dlpack::find_exchange(parameter.ptr()) == known.exchange) {
    known.exchanged[1] = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  }
  known.exchanged[0] = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
}

bool read_tensor(PyObject* object, TensorView* view) {
  *view = TensorView();
  if (object == Py_None) return true;
  const PyTypeObject* type = Py_TYPE(object);
  if (known.exchange != nullptr && (type == known.exchanged[0] || type == known.exchanged[1])) {
    read_exchanged(object, view);
    return true;
  }
  PyObject* address = PyObject_CallMethodNoArgs(object, known.data_ptr);
  if (address == nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
    PyErr_Clear();
    return false;
  }
  read_attributes(object, Owned(address).object, view);
  return true;
}

}  // namespace bbk
