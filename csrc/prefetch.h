#pragma once

#include <cstdint>

namespace bbk {

// What the next product of the stream will read, to be brought into L2 while memory is idle. It is a hint: no
// result depends on it, so that it may run ahead of wait_for_predecessors().
struct Prefetch {
  const void* data;    // aligned to 16 bytes
  int64_t rows;
  int64_t row_stride;  // bytes
  int64_t row_bytes;   // from the beginning of each row; a multiple of 16
  bool trigger;
};

}  // namespace bbk
