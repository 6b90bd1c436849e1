#pragma once

#include "common/params.h"
#include "layer/peers.h"

namespace bbk {

// The vocabulary is reduced in pieces of this many tokens, counted from token 0. Each piece is reduced in a
// fixed order by one warp, so that a row's result depends neither on the other rows nor on the chunks.
constexpr int kLmHeadPieceTokens = 4096;

// The reduction of one row over one piece.
struct LmHeadPartial {
  float highest;  // logit
  float sum;      // of exp(logit - highest)
  int32_t token;  // the lowest one that has the highest logit
  float probe;    // logit of the row's probe token, in the piece that holds it
};

// Logits of consecutive tokens to the partials of their pieces.
struct LmHeadReduceParams {
  const void* logits;           // [num_rows, num_tokens]
  const int32_t* probe_tokens;  // [num_rows] or null
  LmHeadPartial* partials;      // [num_rows, num_pieces], written where the tokens are
  int64_t num_rows;
  int64_t num_tokens;
  int64_t row_stride;
  int64_t first_token;     // a multiple of kLmHeadPieceTokens
  int64_t suppress_token;  // its logit counts as minus infinity; -1: none
  int64_t num_pieces;      // of the whole vocabulary
  DType dtype;             // of the logits
};

struct LmHeadFinishParams {
  const LmHeadPartial* partials;  // [num_rows, num_pieces]
  const int32_t* probe_tokens;    // [num_rows] or null; outside of the vocabulary:
                                  // probability NaN
  float* parts;                   // [num_rows, 4] or null, written instead of all below: of a vocabulary that
                                  // is a part the highest logit, the sum of exp(logit - highest), the token
                                  // counted from first_token on, and the probe's logit, minus infinity if
                                  // there is none
  int64_t first_token;            // of `parts`; of probes as well
  int32_t* top_token;             // [num_rows], written
  float* confidence;              // [num_rows], written
  float* probe_probability;       // [num_rows] or null, written
  int64_t num_rows;
  int64_t num_pieces;
  int64_t piece_tokens;  // of the vocabulary, in a piece
  int64_t vocab_size;
};

// Parts of every rank to what LmHeadFinishParams has of the whole vocabulary. Every rank launches it, with an
// equal number of rows.
struct LmHeadMergeParams {
  const float* parts;  // [num_rows, 4], of this rank
  Peers peers;         // with room for 16 bytes of a row
  int32_t* top_token;
  float* confidence;
  float* probe_probability;  // or null
  int64_t num_rows;
};

void lm_head_merge(const LmHeadMergeParams& params, const Launch& launch);

// Vocabulary of a tile of the product below: each tile is a piece.
constexpr int kLmHeadTileTokens = 192;

// Hidden states of few rows to the partials of their pieces, by a product whose logits nobody stores.
struct LmHeadProductParams {
  const void* hidden;       // [num_rows, dim]
  const void* weight;       // [vocab_size, dim]
  LmHeadPartial* partials;  // [num_rows, num_pieces], written, but for the probes
  int64_t num_rows;
  int64_t dim;
  int64_t vocab_size;
  int64_t hidden_row_stride;
  int64_t weight_row_stride;
  int64_t suppress_token;  // its logit counts as minus infinity; -1: none
  int64_t num_pieces;      // vocab_size / kLmHeadTileTokens, rounded up
  DType dtype;             // fp16 or bf16; logits are rounded to it
};

// Needs what gemm() needs; num_rows <= tile_rows, which is 16, 64 or 128.
void lm_head_product(const LmHeadProductParams& params, int tile_rows, const Launch& launch);

// Tokens above a probability of 0.2 are likely; of what adds up to 1 at most so many can be.
constexpr int kNumLikelyTokens = 4;

// The reduction of one row over one piece, for the likely tokens.
struct LmHeadLikelyPartial {
  float highest;                          // logit, of what is not suppressed, as the next two
  float sum;                              // of exp(logit - highest)
  int32_t token;                          // the lowest one that has the highest logit
  float suppressed;                       // logit of the suppressed token, in the piece that holds it
  float likely_logits[kNumLikelyTokens];  // the highest of all, falling
  int32_t likely_tokens[kNumLikelyTokens];
};

struct LmHeadLikelyReduceParams {
  const void* logits;             // [num_rows, num_tokens]
  LmHeadLikelyPartial* partials;  // [num_rows, num_pieces], written where the tokens are
  int64_t num_rows;
  int64_t num_tokens;
  int64_t row_stride;
  int64_t first_token;     // a multiple of kLmHeadPieceTokens
  int64_t suppress_token;  // counts for the likely tokens alone; -1: none
  int64_t num_pieces;      // of the whole vocabulary
  DType dtype;             // of the logits
};

struct LmHeadLikelyFinishParams {
  const LmHeadLikelyPartial* partials;  // [num_rows, num_pieces]
  int32_t* top_token;                   // [num_rows], written
  float* confidence;                    // [num_rows], written
  int32_t* likely_token;                // [num_rows, kNumLikelyTokens], written; -1 where there are fewer
  float* likely_probability;            // the same; 0
  int64_t num_rows;
  int64_t num_pieces;
};

void lm_head_likely_reduce(const LmHeadLikelyReduceParams& params, const Launch& launch);
void lm_head_likely_finish(const LmHeadLikelyFinishParams& params, const Launch& launch);

void lm_head_reduce(const LmHeadReduceParams& params, const Launch& launch);
void lm_head_finish(const LmHeadFinishParams& params, const Launch& launch);

}  // namespace bbk
