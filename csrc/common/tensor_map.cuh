// Describes tensors to the copy engine of sm_90.
#pragma once

#include "common/driver.h"
#include "common/integers.h"
#include "common/params.h"

namespace bbk {

inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder(const char* op) {
  static const auto function =
      driver_function<PFN_cuTensorMapEncodeTiled_v12000>(op, "cuTensorMapEncodeTiled", 12000);
  return function;
}

// Rows that a copy moves for `rows` that exist: no more than groups of eight need, because it takes the copy
// engine longer to fill rows that do not exist with zeros than to read some (H100).
inline int copied_rows(int64_t rows) { return static_cast<int>(ceil_div<int64_t>(rows, 8) * 8); }

// The copy engine reads rows from addresses of whole 16 bytes.
inline void check_aligned(const char* op, const char* name, const void* pointer, int64_t row_stride) {
  const uintptr_t beyond = reinterpret_cast<uintptr_t>(pointer) % 16;
  if (beyond == 0 && row_stride % 8 == 0) return;
  refuse(op, std::string(name) + ": expected rows aligned to 16 bytes, got a row stride of " +
                 std::to_string(row_stride) + " elements at an address that is " + std::to_string(beyond) +
                 " bytes past a multiple of 16");
}

// A tensor of 16-bit elements, its sizes and strides (in elements, without the first, which is 1) from the
// innermost on, read in boxes that leave in rows of 128 swizzled bytes (another `swizzle`: that many). What
// lies outside reads as zero. promotion: how much L2 fetches at a time.
template <int kDims>
CUtensorMap tensor_map(const char* op, const char* name, const void* pointer, DType dtype,
                       const int64_t (&sizes)[kDims], const int64_t (&strides)[kDims - 1],
                       const int (&box)[kDims], CUtensorMapL2promotion promotion,
                       CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
  cuuint64_t size[kDims], bytes[kDims - 1];
  cuuint32_t boxes[kDims], steps[kDims];
  for (int i = 0; i < kDims; ++i) {
    size[i] = static_cast<cuuint64_t>(sizes[i]);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    steps[i] = 1;
  }
  for (int i = 0; i < kDims - 1; ++i) bytes[i] = static_cast<cuuint64_t>(strides[i]) * 2;
  CUtensorMap map;
  const CUresult status = tensor_map_encoder(op)(
      &map, dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      kDims, const_cast<void*>(pointer), size, bytes, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    fail(op, std::string(name) + ": cuTensorMapEncodeTiled returned error " + std::to_string(status));
  }
  return map;
}

}  // namespace bbk
