// The tensors of blockbatch_kernels/structs.py, each record declared by one list of its fields: a line here
// is all that a new field needs to reach the kernels.
#pragma once

#include "common/fields.h"

namespace bbk {

// R rows, Q requests, G generated positions; bool tensors as bytes of 0 and 1. All are contiguous.
#define BBK_BRANCH_STATE(X)                                  \
  X(const int32_t*, prompt_tokens) /* [Q, max_prompt] */     \
  X(const int32_t*, prompt_length) /* [Q] */                 \
  X(int32_t*, tokens)              /* [R, G] */              \
  X(const int32_t*, block_size)    /* [R], and so on */      \
  X(int32_t*, window_start)                                  \
  X(int32_t*, window_end)                                    \
  X(int32_t*, decoded)                                       \
  X(int32_t*, progress)                                      \
  X(int32_t*, blocks_since_refresh)                          \
  X(int32_t*, steps_in_block)                                \
  X(uint8_t*, needs_refresh)                                 \
  X(uint8_t*, done)                                          \
  X(int32_t*, top_token)           /* [R, G] */              \
  X(float*, confidence)            /* [R, G] */              \
  X(int32_t*, cached_token)        /* [R, G] */              \
  X(int32_t*, moved_since_refresh) /* [R] */                 \
  X(int32_t*, map_token)           /* [R, G, map_entries] */ \
  X(float*, map_probability)                                 \
  X(int32_t*, committed)   /* [R] */                         \
  X(int32_t*, merged)      /* [R] */                         \
  X(int32_t*, synced)      /* [R] */                         \
  X(int32_t*, adopted)     /* [R] */                         \
  X(int32_t*, nfe)         /* [Q, 3] */                      \
  X(uint8_t*, finished)    /* [Q] */                         \
  X(int32_t*, winner)      /* [Q] */                         \
  X(int32_t*, stop_reason) /* [Q] */                         \
  X(int32_t*, non_finite)  /* [Q] */

struct BranchStateView {
  BBK_BRANCH_STATE(BBK_MEMBER)
};

#define BBK_STEP_PLAN(X)                   \
  X(int32_t*, query_start)    /* [R] */    \
  X(int32_t*, query_end)      /* [R] */    \
  X(int32_t*, source_row)     /* [R] */    \
  X(uint8_t*, predict)        /* [R, G] */ \
  X(int32_t*, flags)          /* [5] */    \
  X(int32_t*, query_position) /* [R, G + 1] */

struct StepPlanView {
  BBK_STEP_PLAN(BBK_MEMBER)
};

#define BBK_PREDICTIONS(X)                                                      \
  X(const int64_t*, target) /* [num_predictions], as all below */               \
  X(const int32_t*, top_token)                                                  \
  X(const float*, confidence)                                                   \
  X(Optional<const float*>, probe_probability)                                  \
  X(Optional<const int32_t*>, likely_token) /* [num_predictions, kNumLikely] */ \
  X(Optional<const float*>, likely_probability)

struct PredictionsView {
  BBK_PREDICTIONS(BBK_MEMBER)
};

#define BBK_POLICY_EVENTS(X)            \
  X(uint8_t*, committed)   /* [R, G] */ \
  X(uint8_t*, merged)      /* [R, G] */ \
  X(int32_t*, sync_source) /* [R] */

struct PolicyEventsView {
  BBK_POLICY_EVENTS(BBK_MEMBER)
};

#define BBK_PACKED_QUERIES(X)                          \
  X(int32_t*, input_ids)      /* [capacity] */         \
  X(int32_t*, positions)      /* [capacity] */         \
  X(int32_t*, row_index)      /* [capacity] */         \
  X(int32_t*, cu_seqlens_q)   /* [R + 1] */            \
  X(int64_t*, slot_mapping)   /* [capacity] */         \
  X(int64_t*, predict_index)  /* [predict_capacity] */ \
  X(int64_t*, predict_target) /* [predict_capacity] */

struct PackedQueriesView {
  BBK_PACKED_QUERIES(BBK_MEMBER)
};

}  // namespace bbk
