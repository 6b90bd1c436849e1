// A tensor as it arrives from Python: no type of torch or pybind11.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

#include "common/check.h"
#include "common/dtype.h"

namespace bbk {

// Whose argument something is, for errors: "blockbatch_kernels.<op>: <owner>.<name>: ". All are literals.
struct Label {
  const char* op = "";
  const char* owner = nullptr;  // the record that holds it, if any
  const char* name = "";

  std::string field() const { return owner != nullptr ? std::string(owner) + "." + name : name; }
  std::string text() const { return std::string("blockbatch_kernels.") + op + ": " + field() + ": "; }
};

struct TensorView {
  static constexpr int kMaxDims = 6;

  void* ptr = nullptr;
  int dims = -1;  // -1: None came instead of a tensor
  int64_t sizes[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements
  DType dtype = DType::kFloat32;
  int device = -1;  // -1: host memory
  Label label;

  bool is_none() const { return dims < 0; }

  // Throws std::invalid_argument in the name of the argument.
  [[noreturn]] void refuse(const std::string& what) const {
    bbk::refuse(label.op, label.field() + ": " + what);
  }

  // The elements as T: refuses None and any other dtype. `void` takes every dtype, uint8_t bools too.
  template <typename T>
  T* data() const {
    if (is_none()) refuse("expected a tensor, got None");
    return data_or_null<T>();
  }

  // The same, and nullptr for None.
  template <typename T>
  T* data_or_null() const {
    if (is_none()) return nullptr;
    using Element = std::remove_const_t<T>;
    if constexpr (std::is_same_v<Element, float>) expect(DType::kFloat32);
    if constexpr (std::is_same_v<Element, int32_t>) expect(DType::kInt32);
    if constexpr (std::is_same_v<Element, int64_t>) expect(DType::kInt64);
    if constexpr (std::is_same_v<Element, uint8_t>) {
      if (dtype != DType::kUInt8) expect(DType::kBool);
    }
    static_assert(std::is_void_v<Element> || std::is_same_v<Element, float> ||
                      std::is_same_v<Element, int32_t> || std::is_same_v<Element, int64_t> ||
                      std::is_same_v<Element, uint8_t>,
                  "no dtype is known for this type of element");
    return static_cast<T*>(ptr);
  }

  int64_t size(int dim) const { return sizes[checked(dim)]; }
  int64_t stride(int dim) const { return strides[checked(dim)]; }

  // A size that parameters keep in 32 bits.
  int int_size(int dim) const {
    const int64_t value = size(dim);
    if (value > std::numeric_limits<int>::max()) {
      refuse("expected fewer than 2^31 entries in dimension " + std::to_string(dim) + ", got " +
             std::to_string(value));
    }
    return static_cast<int>(value);
  }

  // From a row of a matrix to the next; the elements of a row must be neighbours.
  int64_t row_stride() const {
    if (size(0) > 0 && size(1) > 1 && stride(1) != 1) {
      refuse("expected a last stride of 1, got " + std::to_string(stride(1)));
    }
    return stride(0);
  }

  // What lies from `first` on in a dimension.
  TensorView from(int dim, int64_t first) const {
    TensorView part = *this;
    part.sizes[checked(dim)] -= first;
    if (ptr != nullptr) part.ptr = static_cast<char*>(ptr) + first * stride(dim) * size_of(dtype);
    return part;
  }

  const TensorView& contiguous() const {
    int64_t expected = 1;
    bool dense = true, empty = false;
    for (int dim = dims - 1; dim >= 0; --dim) {
      empty |= sizes[dim] == 0;
      if (sizes[dim] == 1) continue;
      dense &= strides[dim] == expected;
      expected *= sizes[dim];
    }
    if (dense || empty) return *this;
    std::string got;
    for (int dim = 0; dim < dims; ++dim) got += (dim > 0 ? ", " : "") + std::to_string(strides[dim]);
    refuse("expected a contiguous tensor, got strides (" + got + ")");
  }

 private:
  void expect(DType expected) const {
    if (dtype != expected) {
      refuse(std::string("expected ") + name_of(expected) + ", got " + name_of(dtype));
    }
  }

  int checked(int dim) const {
    if (dim >= dims) {
      refuse(is_none() ? std::string("expected a tensor, got None")
                       : "expected at least " + std::to_string(dim + 1) + " dimensions, got " +
                             std::to_string(dims));
    }
    return dim;
  }
};

}  // namespace bbk
