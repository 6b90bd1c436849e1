// One call from Python: arguments by name, all tensors on one device, errors that name the argument.
#pragma once

#include <array>
#include <initializer_list>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "bind/caster.h"
#include "common/fields.h"
#include "common/params.h"

namespace bbk {

// A Python string that is made once for the place where this stands.
#define BBK_KEY(name)                                              \
  ([]() -> PyObject* {                                             \
    static PyObject* const key = PyUnicode_InternFromString(name); \
    return key;                                                    \
  }())

// The operator of a call and where it runs.
class Call {
 public:
  explicit Call(const char* op) : op_(op) {}

  const char* op() const { return op_; }

  void set_stream(uintptr_t stream) { stream_ = reinterpret_cast<cudaStream_t>(stream); }

  // Notes where a tensor lies, and refuses one that lies elsewhere than those before it.
  void join(const TensorView& view);

  // Where the tensors are; device -1 is the calling thread, for tensors in host memory.
  Launch launch() const { return Launch{device_, stream_}; }

  // The same for an operator that has no version for the host.
  Launch launch_on_gpu() const;

 private:
  const char* op_;
  cudaStream_t stream_ = nullptr;
  int device_ = -1;
  Label first_;  // of the tensors; without a name before there is one
};

// The value of an argument or of a record's field as T.
template <typename T>
T convert(Call& call, const Label& label, PyObject* object);

// An argument whose attributes are read by name: a record of tensors or of options.
class Record {
 public:
  Record() = default;
  Record(Call& call, const char* name, PyObject* object) : call_(&call), name_(name), object_(object) {}

  // For keys by BBK_KEY.
  template <typename T>
  void read(PyObject* key, T* field) const {
    const Label label{call_->op(), name_, PyUnicode_AsUTF8(key)};
    PyObject* value = PyObject_GetAttr(object_, key);
    if (value == nullptr) throw_missing(label);
    const auto owned = pybind11::reinterpret_steal<pybind11::object>(value);
    *field = convert<T>(*call_, label, value);
  }

  template <typename T>
  T get(PyObject* key) const {
    T value;
    read(key, &value);
    return value;
  }

 private:
  [[noreturn]] static void throw_missing(const Label& label);

  Call* call_ = nullptr;
  const char* name_ = "";
  PyObject* object_ = nullptr;
};

// For an X-macro list of fields: fills `target` from `record`, both by these names.
#define BBK_READ_FIELD(type, name) record.read(BBK_KEY(#name), &target.name);
#define BBK_READER(View, LIST)                                \
  inline void read_record(const Record& record, View* view) { \
    View& target = *view;                                     \
    LIST(BBK_READ_FIELD)                                      \
  }

// The dtype of `tensors`, None left out: floats, all of one dtype.
DType float_dtype(std::initializer_list<const TensorView*> tensors);

// Refuses caches whose elements are not those of q, or with scales not 8 bits.
void check_caches(bool scaled, const TensorView& q, std::initializer_list<const TensorView*> caches);

[[noreturn]] void throw_wrong_type(const Label& label, const char* expected, PyObject* object);
[[noreturn]] void throw_wrong_name(const Label& label, const char* const* names, int count, PyObject* object);
[[noreturn]] void throw_too_many(const Label& label, int most, int64_t count);

template <typename T>
struct IsOptional : std::false_type {};
template <typename T>
struct IsOptional<Optional<T>> : std::true_type {};

template <typename T, typename = void>
struct IsIdList : std::false_type {};
template <typename T>
struct IsIdList<T, std::void_t<decltype(T::ids)>> : std::true_type {};

template <typename T>
constexpr const char* expected_type() {
  if (std::is_same_v<T, TensorView>) return "a torch.Tensor or None";
  if (std::is_same_v<T, bool>) return "a bool";
  return std::is_integral_v<T> ? "an integer" : "a number";
}

template <typename T>
T convert(Call& call, const Label& label, PyObject* object) {
  if constexpr (std::is_same_v<T, Record>) {
    return Record(call, label.name, object);
  } else if constexpr (std::is_pointer_v<T>) {  // a contiguous tensor
    const TensorView view = convert<TensorView>(call, label, object);
    return view.contiguous().template data<std::remove_pointer_t<T>>();
  } else if constexpr (IsOptional<T>::value) {
    if (object == Py_None) return T{};
    return T{true, convert<decltype(T::value)>(call, label, object)};
  } else if constexpr (IsIdList<T>::value) {
    const auto sequence = pybind11::reinterpret_steal<pybind11::object>(PySequence_Fast(object, ""));
    if (!sequence) {
      PyErr_Clear();
      throw_wrong_type(label, "a sequence", object);
    }
    T list{};
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence.ptr());
    if (count > T::kMost) throw_too_many(label, T::kMost, count);
    for (Py_ssize_t i = 0; i < count; ++i) {
      list.ids[list.count++] = convert<std::remove_all_extents_t<decltype(T::ids)>>(
          call, label, PySequence_Fast_GET_ITEM(sequence.ptr(), i));
    }
    return list;
  } else if constexpr (std::is_enum_v<T>) {
    constexpr auto& names = EnumNames<T>::kNames;
    constexpr int count = static_cast<int>(std::size(names));
    for (int i = 0; PyUnicode_Check(object) && i < count; ++i) {
      if (PyUnicode_CompareWithASCIIString(object, names[i]) == 0) return static_cast<T>(i);
    }
    throw_wrong_name(label, names, count, object);
  } else {
    pybind11::detail::make_caster<T> caster;
    bool loaded = false;
    try {
      loaded = caster.load(object, true);
    } catch (const std::invalid_argument& error) {
      refuse(label.op, label.field() + ": " + error.what());
    }
    if (!loaded) throw_wrong_type(label, expected_type<T>(), object);
    T value = pybind11::detail::cast_op<T>(caster);
    if constexpr (std::is_same_v<T, TensorView>) {
      value.label = label;
      call.join(value);
    }
    return value;
  }
}

// Names of a function's arguments, the stream last, and which of them a call gave. "keyword=name" is an
// argument that errors call by another name than the call does.
class Arguments {
 public:
  void set(const char* op, const char* const* names, size_t count);
  const char* op() const { return op_; }
  const char* name(size_t index) const { return names_[index]; }
  // Throws py::type_error for positional, unknown and missing arguments.
  void match(PyObject* const* values, Py_ssize_t positional, PyObject* keywords, PyObject** given) const;

  static constexpr size_t kMost = 24;

 private:
  const char* op_ = "";
  size_t count_ = 0;
  std::array<const char*, kMost> names_{};
  std::array<PyObject*, kMost> keys_{};
};

// Sets the Python exception for the C++ one being handled.
void raise_current();

template <auto kFunction>
struct Bound;

template <typename... Args, void (*kFunction)(Call&, Args...)>
struct Bound<kFunction> {
  static constexpr size_t kStream = sizeof...(Args);
  static_assert(kStream < Arguments::kMost);
  static inline Arguments arguments;
  static inline PyMethodDef method{};

  template <size_t... kIndex>
  static void run(PyObject* const* given, std::index_sequence<kIndex...>) {
    const char* op = arguments.op();
    Call call(op);
    call.set_stream(convert<uintptr_t>(call, Label{op, nullptr, "stream"}, given[kStream]));
    const std::tuple<std::decay_t<Args>...> values{
        convert<std::decay_t<Args>>(call, Label{op, nullptr, arguments.name(kIndex)}, given[kIndex])...};
    kFunction(call, std::get<kIndex>(values)...);
  }

  static PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t positional, PyObject* keywords) {
    try {
      PyObject* given[Arguments::kMost];
      arguments.match(values, positional, keywords, given);
      run(given, std::index_sequence_for<Args...>());
    } catch (...) {
      raise_current();
      return nullptr;
    }
    Py_RETURN_NONE;
  }
};

using Function = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);
void add_function(pybind11::module_& module, const Arguments& arguments, PyMethodDef* method,
                  Function function);

// Adds module.op(*, names..., stream), which calls kFunction(call, arguments...) in the order of `names`.
template <auto kFunction, size_t kCount>
void define(pybind11::module_& module, const char* op, const char* const (&names)[kCount]) {
  static_assert(kCount == Bound<kFunction>::kStream, "a name for every argument behind the call");
  using This = Bound<kFunction>;
  This::arguments.set(op, names, kCount);
  add_function(module, This::arguments, &This::method, &This::call);
}

}  // namespace bbk
