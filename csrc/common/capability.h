// What the loaded extension can run on a device. No name of an architecture is parsed for it: the binary
// itself is asked.
#pragma once

namespace bbk {

// kNone: nothing in the binary runs there. kPortable: code for its architecture, or that the driver makes
// from PTX, without the kernels of sm_90a, which are empty in it. kSm90a: all kernels.
enum class Code : int { kNone = 0, kPortable = 1, kSm90a = 2 };

// Any thread may ask; the answer for a device is found once, without a launch. Throws std::runtime_error
// where there is no such device, or no driver.
Code has_code_for(int device);

// Throws std::runtime_error in the name of `op` where the kernels of sm_90a are missing.
void check_sm90a(const char* op, int device);

}  // namespace bbk
