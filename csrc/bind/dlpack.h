// The part of DLPack's C interface (version 1) by which a tensor is described without a call into Python:
// https://dmlc.github.io/dlpack. Layouts are fixed by that standard.
#pragma once

#include <Python.h>

#include <cstdint>

namespace bbk::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1, kCuda = 2, kCudaHost = 3;  // of Device::type

struct Device {
  int32_t type;
  int32_t index;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

// Describes a tensor for as long as its object lives; 0, or -1 with a Python exception.
using FromPyObject = int (*)(void* object, Tensor* out);

struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  ExchangeApi* previous;
  void (*allocate)();
  void (*owned_from_object)();
  void (*owned_to_object)();
  FromPyObject from_object;
  void (*current_stream)();
};

// What `type` publishes, or null.
inline FromPyObject find_exchange(PyObject* type) {
  PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
  const void* table = capsule != nullptr ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
  Py_XDECREF(capsule);  // the table outlives it
  PyErr_Clear();
  const ExchangeApi* api = static_cast<const ExchangeApi*>(table);
  return api != nullptr && api->major == kMajorVersion ? api->from_object : nullptr;
}

}  // namespace bbk::dlpack
