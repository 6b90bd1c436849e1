#include "gemm/gemm.h"

#include "bind/bindings.h"
#include "gemm/lm_head.h"

namespace py = pybind11;

namespace bbk {
namespace {

BBK_READER(GemmTile, BBK_GEMM_TILE)
BBK_READER(GemmFp8Tile, BBK_GEMM_FP8_TILE)

GemmTile tile_of(const Record& record) {
  GemmTile tile{};
  read_record(record, &tile);
  return tile;
}

// `features` of the product from feature `first` on, into their columns of `out`.
void call_gemm(Call& call, const TensorView& x, const TensorView& weight, const TensorView& bias,
               const TensorView& out, int64_t first, int64_t features, const Record& tile, bool gated,
               bool static_weight, bool programmatic) {
  GemmParams params{};
  params.dtype = float_dtype({&x, &weight, &bias, &out});
  params.x = x.data<const void>();
  params.weight = weight.from(0, first).data<const void>();
  params.bias = bias.is_none() ? nullptr : bias.contiguous().from(0, first).data<const void>();
  params.out = out.from(1, first).data<void>();
  params.num_tokens = x.size(0);
  params.in_features = x.size(1);
  params.out_features = features;
  params.x_row_stride = x.row_stride();
  params.weight_row_stride = weight.row_stride();
  params.out_row_stride = out.row_stride();
  params.up_distance = gated ? weight.size(0) / 2 : weight.size(0);
  params.gated = gated;
  gemm(params, tile_of(tile), static_weight, programmatic, call.launch_on_gpu());
}

// x and weight as bytes.
void call_linear_fp8(Call& call, const TensorView& x, const TensorView& x_scale, const TensorView& weight,
                     const TensorView& weight_scale, const TensorView& bias, const TensorView& out,
                     const Record& tile, bool gated, bool static_weight, bool programmatic) {
  GemmFp8Params params{};
  params.dtype = float_dtype({&out, &bias});
  params.x = x.data<const uint8_t>();
  params.x_scale = x_scale.contiguous().data<const float>();
  params.weight = weight.data<const uint8_t>();
  params.weight_scale = weight_scale.contiguous().data<const float>();
  params.bias = bias.is_none() ? nullptr : bias.contiguous().data<const void>();
  params.out = out.data<void>();
  params.num_tokens = x.size(0);
  params.in_features = x.size(1);
  params.out_features = gated ? weight.size(0) / 2 : weight.size(0);
  params.x_row_stride = x.row_stride();
  params.weight_row_stride = weight.row_stride();
  params.out_row_stride = out.row_stride();
  params.gated = gated;
  GemmFp8Tile cut{};
  read_record(tile, &cut);
  gemm_fp8(params, cut, static_weight, programmatic, call.launch_on_gpu());
}

void call_linear_rope_kv_write(Call& call, const TensorView& x, const TensorView& weight,
                               const TensorView& bias, const TensorView& q, const TensorView& k_cache,
                               const TensorView& v_cache, const TensorView& k_scale,
                               const TensorView& v_scale, const TensorView& positions,
                               const TensorView& slot_mapping, const TensorView& cos, const TensorView& sin,
                               const Record& tile, bool static_weight, bool programmatic) {
  RopeKvWriteParams rope{};
  rope.dtype = float_dtype({&x, &weight, &bias, &q});
  read_cache_scales(k_scale, v_scale, q, k_cache, v_cache, &rope);
  read_rope(q, k_cache, v_cache, positions, slot_mapping, cos, sin, &rope);
  GemmParams params{};
  params.dtype = rope.dtype;
  params.x = x.data<const void>();
  params.weight = weight.data<const void>();
  params.bias = bias.contiguous().data_or_null<const void>();
  params.num_tokens = x.size(0);
  params.in_features = x.size(1);
  params.out_features = (rope.num_heads + 2LL * rope.num_kv_heads) * rope.head_dim;
  params.x_row_stride = x.row_stride();
  params.weight_row_stride = weight.row_stride();
  linear_rope_kv_write(params, rope, tile_of(tile), static_weight, programmatic, call.launch_on_gpu());
}

// x and weight as bytes.
void call_linear_rope_kv_write_fp8(Call& call, const TensorView& x, const TensorView& x_scale,
                                   const TensorView& weight, const TensorView& weight_scale,
                                   const TensorView& bias, const TensorView& q, const TensorView& k_cache,
                                   const TensorView& v_cache, const TensorView& k_scale,
                                   const TensorView& v_scale, const TensorView& positions,
                                   const TensorView& slot_mapping, const TensorView& cos,
                                   const TensorView& sin, const Record& tile, bool static_weight,
                                   bool programmatic) {
  RopeKvWriteParams rope{};
  rope.dtype = float_dtype({&q, &bias});
  read_cache_scales(k_scale, v_scale, q, k_cache, v_cache, &rope);
  read_rope(q, k_cache, v_cache, positions, slot_mapping, cos, sin, &rope);
  GemmFp8Params params{};
  params.dtype = rope.dtype;
  params.x = x.data<const uint8_t>();
  params.x_scale = x_scale.contiguous().data<const float>();
  params.weight = weight.data<const uint8_t>();
  params.weight_scale = weight_scale.contiguous().data<const float>();
  params.bias = bias.contiguous().data_or_null<const void>();
  params.num_tokens = x.size(0);
  params.in_features = x.size(1);
  params.out_features = (rope.num_heads + 2LL * rope.num_kv_heads) * rope.head_dim;
  params.x_row_stride = x.row_stride();
  params.weight_row_stride = weight.row_stride();
  GemmFp8Tile cut{};
  read_record(tile, &cut);
  linear_rope_kv_write_fp8(params, rope, cut, static_weight, programmatic, call.launch_on_gpu());
}

// [rows, pieces, 4] floats
LmHeadPartial* partials_of(const TensorView& partials) {
  static_assert(sizeof(LmHeadPartial) == 4 * sizeof(float));
  return reinterpret_cast<LmHeadPartial*>(partials.contiguous().data<float>());
}

int64_t token_or_none(const Optional<int64_t>& token) { return token.given ? token.value : -1; }

void call_lm_head_product(Call& call, const TensorView& hidden, const TensorView& weight,
                          const TensorView& partials, const Optional<int64_t>& suppress_token,
                          int tile_rows) {
  LmHeadProductParams params{};
  params.dtype = float_dtype({&hidden, &weight});
  params.hidden = hidden.data<const void>();
  params.weight = weight.data<const void>();
  params.partials = partials_of(partials);
  params.num_rows = hidden.size(0);
  params.dim = hidden.size(1);
  params.vocab_size = weight.size(0);
  params.hidden_row_stride = hidden.row_stride();
  params.weight_row_stride = weight.row_stride();
  params.suppress_token = token_or_none(suppress_token);
  params.num_pieces = partials.size(1);
  lm_head_product(params, tile_rows, call.launch_on_gpu());
}

void call_lm_head_reduce(Call& call, const TensorView& logits, const TensorView& probe_tokens,
                         const TensorView& partials, int64_t first_token,
                         const Optional<int64_t>& suppress_token) {
  LmHeadReduceParams params{};
  params.dtype = float_dtype({&logits});
  params.logits = logits.data<const void>();
  params.probe_tokens = probe_tokens.contiguous().data_or_null<const int32_t>();
  params.partials = partials_of(partials);
  params.num_rows = logits.size(0);
  params.num_tokens = logits.size(1);
  params.row_stride = logits.row_stride();
  params.first_token = first_token;
  params.suppress_token = token_or_none(suppress_token);
  params.num_pieces = partials.size(1);
  lm_head_reduce(params, call.launch_on_gpu());
}

void call_lm_head_finish(Call& call, const TensorView& partials, const TensorView& probe_tokens,
                         const TensorView& top_token, const TensorView& confidence,
                         const TensorView& probe_probability, int64_t piece_tokens, int64_t vocab_size) {
  LmHeadFinishParams params{};
  params.partials = partials_of(partials);
  params.probe_tokens = probe_tokens.contiguous().data_or_null<const int32_t>();
  params.top_token = top_token.contiguous().data<int32_t>();
  params.confidence = confidence.contiguous().data<float>();
  params.probe_probability = probe_probability.contiguous().data_or_null<float>();
  params.num_rows = partials.size(0);
  params.num_pieces = partials.size(1);
  params.piece_tokens = piece_tokens;
  params.vocab_size = vocab_size;
  lm_head_finish(params, call.launch_on_gpu());
}

void call_lm_head_parts(Call& call, const TensorView& partials, const TensorView& probe_tokens,
                        const TensorView& parts, int64_t first_token, int64_t piece_tokens,
                        int64_t vocab_size) {
  LmHeadFinishParams params{};
  params.partials = partials_of(partials);
  params.probe_tokens = probe_tokens.contiguous().data_or_null<const int32_t>();
  params.parts = parts.contiguous().data<float>();
  params.first_token = first_token;
  params.num_rows = partials.size(0);
  params.num_pieces = partials.size(1);
  params.piece_tokens = piece_tokens;
  params.vocab_size = vocab_size;
  lm_head_finish(params, call.launch_on_gpu());
}

void call_lm_head_merge(Call& call, const TensorView& parts, const TensorView& top_token,
                        const TensorView& confidence, const TensorView& probe_probability,
                        const TensorView& turn, const Inboxes& inboxes, int rank, int64_t source_bytes) {
  LmHeadMergeParams params{};
  params.parts = parts.contiguous().data<const float>();
  params.peers = Peers{inboxes, rank, source_bytes, turn.contiguous().data<int32_t>()};
  params.top_token = top_token.contiguous().data<int32_t>();
  params.confidence = confidence.contiguous().data<float>();
  params.probe_probability = probe_probability.contiguous().data_or_null<float>();
  params.num_rows = parts.size(0);
  lm_head_merge(params, call.launch_on_gpu());
}

// [rows, pieces, 12] floats
LmHeadLikelyPartial* likely_partials_of(const TensorView& partials) {
  static_assert(sizeof(LmHeadLikelyPartial) == 12 * sizeof(float));
  return reinterpret_cast<LmHeadLikelyPartial*>(partials.contiguous().data<float>());
}

void call_lm_head_likely_reduce(Call& call, const TensorView& logits, const TensorView& partials,
                                int64_t first_token, const Optional<int64_t>& suppress_token) {
  LmHeadLikelyReduceParams params{};
  params.dtype = float_dtype({&logits});
  params.logits = logits.data<const void>();
  params.partials = likely_partials_of(partials);
  params.num_rows = logits.size(0);
  params.num_tokens = logits.size(1);
  params.row_stride = logits.row_stride();
  params.first_token = first_token;
  params.suppress_token = token_or_none(suppress_token);
  params.num_pieces = partials.size(1);
  lm_head_likely_reduce(params, call.launch_on_gpu());
}

void call_lm_head_likely_finish(Call& call, const TensorView& partials, const TensorView& top_token,
                                const TensorView& confidence, const TensorView& likely_token,
                                const TensorView& likely_probability) {
  LmHeadLikelyFinishParams params{};
  params.partials = likely_partials_of(partials);
  params.top_token = top_token.contiguous().data<int32_t>();
  params.confidence = confidence.contiguous().data<float>();
  params.likely_token = likely_token.contiguous().data<int32_t>();
  params.likely_probability = likely_probability.contiguous().data<float>();
  params.num_rows = partials.size(0);
  params.num_pieces = partials.size(1);
  lm_head_likely_finish(params, call.launch_on_gpu());
}

}  // namespace

void bind_gemm(py::module_& module) {
  module.attr("LM_HEAD_PIECE_TOKENS") = kLmHeadPieceTokens;
  module.attr("LM_HEAD_TILE_TOKENS") = kLmHeadTileTokens;
  define<&call_gemm>(
      module, "gemm",
      {"x", "weight", "bias", "out", "first", "features", "tile", "gated", "static_weight", "programmatic"});
  define<&call_linear_fp8>(module, "linear_fp8",
                           {"x", "x_scale", "weight", "weight_scale", "bias", "out", "tile", "gated",
                            "static_weight", "programmatic"});
  define<&call_linear_rope_kv_write>(
      module, "linear_rope_kv_write",
      {"x", "weight", "bias", "q", "k_cache", "v_cache", "k_scale", "v_scale", "positions", "slot_mapping",
       "cos", "sin", "tile", "static_weight", "programmatic"});
  define<&call_linear_rope_kv_write_fp8>(
      module, "linear_rope_kv_write_fp8",
      {"x", "x_scale", "weight", "weight_scale", "bias", "q", "k_cache", "v_cache", "k_scale", "v_scale",
       "positions", "slot_mapping", "cos", "sin", "tile", "static_weight", "programmatic"});
  define<&call_lm_head_product>(module, "lm_head_product",
                                {"hidden", "weight", "partials", "suppress_token", "tile_rows"});
  define<&call_lm_head_reduce>(module, "lm_head_reduce",
                               {"logits", "probe_tokens", "partials", "first_token", "suppress_token"});
  define<&call_lm_head_likely_reduce>(module, "lm_head_likely_reduce",
                                      {"logits", "partials", "first_token", "suppress_token"});
  define<&call_lm_head_likely_finish>(
      module, "lm_head_likely_finish",
      {"partials", "top_token", "confidence", "likely_token", "likely_probability"});
  define<&call_lm_head_parts>(
      module, "lm_head_parts",
      {"partials", "probe_tokens", "parts", "first_token", "piece_tokens", "vocab_size"});
  define<&call_lm_head_merge>(
      module, "lm_head_merge",
      {"parts", "top_token", "confidence", "probe_probability", "turn", "inboxes", "rank", "source_bytes"});
  define<&call_lm_head_finish>(module, "lm_head_finish",
                               {"partials", "probe_tokens", "top_token", "confidence", "probe_probability",
                                "piece_tokens", "vocab_size"});
}

}  // namespace bbk
