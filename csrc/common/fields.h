// Structs declared by one list of their fields, X(type, name): the members come from it here, and in
// csrc/bind what fills them from the Python record with the same names.
#pragma once

#include <cstdint>

namespace bbk {

#define BBK_MEMBER(type, name) type name;

// None, or a value.
template <typename T>
struct Optional {
  bool given;
  T value;  // zero if not given
};

// What Python calls the values of an enumeration, which count from 0.
template <typename Enum>
struct EnumNames;

#define BBK_ENUM_VALUE(value, name) value,
#define BBK_ENUM_NAME(value, name) name,
// `LIST` is X(value, name in Python).
#define BBK_ENUM(Enum, LIST)                                       \
  enum Enum : int32_t { LIST(BBK_ENUM_VALUE) };                    \
  template <>                                                      \
  struct EnumNames<Enum> {                                         \
    static constexpr const char* kNames[] = {LIST(BBK_ENUM_NAME)}; \
  };

}  // namespace bbk
