#pragma once

#include "common/params.h"

namespace bbk {

// What the confidence of a prediction says; see blockbatch_kernels.ops.lm_head_sample.
enum class Confidence { kProbability = 0, kEntropy = 1, kMargin = 2 };

// SamplingRules of blockbatch_kernels.structs.
struct SampleRules {
  const float* temperature;      // [requests]
  const int64_t* seed;           // [requests]
  const int32_t* forward;        // [requests]
  const int32_t* changed_token;  // [num_changed]
  const float* logit_bias;       // [requests, num_changed]
  const int32_t* banned_before;  // [requests, num_changed]
  const float* top_p;            // [requests] or null
  const int32_t* top_k;          // [requests] or null
  int num_changed;
};

// The reduction of one row over one piece of the vocabulary, of kLmHeadPieceTokens.
struct SamplePartial {
  float score;    // the highest logit / temperature + noise
  int32_t token;  // the lowest one that has it
  float logit;    // of that token
  float highest;  // logit of all
  float sum;      // of exp(logit - highest)
  float second;   // the second highest logit, or the sum of exp(logit - highest) * (logit - highest)
  float probe;    // logit of the row's probe token, in the piece that holds it
  int32_t unused;
};

// Logits of consecutive tokens to the partials of their pieces.
struct SampleReduceParams {
  const void* logits;           // [num_rows, num_tokens]
  SampleRules rules;            // top_p and top_k are not read
  const int32_t* request;       // [num_rows]
  const int32_t* positions;     // [num_rows]
  const float* least;           // [num_rows] or null: what is below is not drawn
  const int32_t* probe_tokens;  // [num_rows] or null
  SamplePartial* partials;      // [num_rows, num_pieces], written where the tokens are
  int64_t num_rows;
  int64_t num_tokens;
  int64_t row_stride;
  int64_t first_token;     // what the logits begin with
  int64_t first_piece;     // where its partial is
  int64_t suppress_token;  // its logit counts as minus infinity; -1: none
  int64_t num_pieces;      // of a row of partials
  Confidence confidence;
  DType dtype;  // of the logits
};

// The lowest logit that top_p and top_k leave of each row.
struct SampleFilterParams {
  const float* logits;     // [num_rows, vocab_size], as the rules change them
  SampleRules rules;       // what changes logits is not read
  const int32_t* request;  // [num_rows]
  float* least;            // [num_rows], written
  int64_t num_rows;
  int64_t vocab_size;
  int64_t row_stride;
};

struct SampleFinishParams {
  const SamplePartial* partials;  // [num_rows, num_pieces]
  const int32_t* probe_tokens;    // [num_rows] or null; outside of the vocabulary: probability NaN. What
                                  // counts is the piece of kLmHeadPieceTokens that a probe is in
  int32_t* token;                 // [num_rows], written
  float* confidence;              // [num_rows], written
  float* probe_probability;       // [num_rows] or null, written
  int64_t num_rows;
  int64_t num_pieces;
  int64_t vocab_size;
  Confidence measure;
};

void lm_head_sample_reduce(const SampleReduceParams& params, const Launch& launch);
void lm_head_sample_filter(const SampleFilterParams& params, const Launch& launch);
void lm_head_sample_finish(const SampleFinishParams& params, const Launch& launch);

}  // namespace bbk
