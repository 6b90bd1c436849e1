#pragma once

namespace bbk {

// X(enumerator, name in torch, DLPack's code of the kind, bits): a line is all that a new element type needs
// to arrive from Python.
#define BBK_DTYPES(X)           \
  X(kFloat32, float32, 2, 32)   \
  X(kFloat16, float16, 2, 16)   \
  X(kBFloat16, bfloat16, 4, 16) \
  X(kInt32, int32, 0, 32)       \
  X(kInt64, int64, 0, 64)       \
  X(kBool, bool, 6, 8)          \
  X(kUInt8, uint8, 1, 8)

#define BBK_DTYPE_ENUMERATOR(value, name, code, bits) value,
#define BBK_DTYPE_NAME(value, name, code, bits) #name,
#define BBK_DTYPE_BYTES(value, name, code, bits) bits / 8,

enum class DType : int { BBK_DTYPES(BBK_DTYPE_ENUMERATOR) };

constexpr const char* kDTypeNames[] = {BBK_DTYPES(BBK_DTYPE_NAME)};
constexpr int kDTypeBytes[] = {BBK_DTYPES(BBK_DTYPE_BYTES)};
constexpr int kNumDTypes = sizeof(kDTypeBytes) / sizeof(int);

constexpr const char* name_of(DType dtype) { return kDTypeNames[static_cast<int>(dtype)]; }
constexpr int size_of(DType dtype) { return kDTypeBytes[static_cast<int>(dtype)]; }

constexpr bool is_float(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

}  // namespace bbk
