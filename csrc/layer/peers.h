#pragma once

#include "common/params.h"

namespace bbk {

// Addresses, one for each rank, which every rank reaches.
struct Inboxes {
  static constexpr int kMost = 16;
  int32_t count;
  int64_t ids[kMost];
};

// Memory through which the ranks of a model give each other rows: see peers.cuh.
//
// An inbox holds [2 turns][ranks - 1 others, in their order][source_bytes]: parts of rows as they arrive. A
// 32-bit word that has not arrived reads as kNotThere; all of them do before the first call.
struct Peers {
  static constexpr uint32_t kNotThere = 0xFFFFFFFFu;

  Inboxes inboxes;
  int rank;
  int64_t source_bytes;
  int32_t* turn;  // [2] of this rank's own memory, zeros before the first call: the turn; blocks at its end
};

}  // namespace bbk
