#include "bind/bindings.h"
#include "gemm/lm_head_sample.h"

namespace py = pybind11;

namespace bbk {
namespace {

// [rows, pieces, 8] floats
SamplePartial* partials_of(const TensorView& partials) {
  static_assert(sizeof(SamplePartial) == 8 * sizeof(float));
  return reinterpret_cast<SamplePartial*>(partials.contiguous().data<float>());
}

SampleRules draw_rules_of(const TensorView& temperature, const TensorView& top_p, const TensorView& top_k) {
  SampleRules rules{};
  rules.temperature = temperature.contiguous().data<const float>();
  rules.top_p = top_p.contiguous().data_or_null<const float>();
  rules.top_k = top_k.contiguous().data_or_null<const int32_t>();
  return rules;
}

void call_lm_head_sample_reduce(Call& call, const TensorView& logits, const TensorView& request,
                                const TensorView& positions, const TensorView& temperature,
                                const TensorView& seed, const TensorView& forward,
                                const TensorView& changed_token, const TensorView& logit_bias,
                                const TensorView& banned_before, const TensorView& least,
                                const TensorView& probe_tokens, const TensorView& partials,
                                int64_t first_token, int64_t first_piece,
                                const Optional<int64_t>& suppress_token, int confidence) {
  SampleReduceParams params{};
  params.dtype = float_dtype({&logits});
  params.logits = logits.data<const void>();
  params.rules.temperature = temperature.contiguous().data<const float>();
  params.rules.seed = seed.contiguous().data<const int64_t>();
  params.rules.forward = forward.contiguous().data<const int32_t>();
  params.rules.changed_token = changed_token.contiguous().data<const int32_t>();
  params.rules.logit_bias = logit_bias.contiguous().data<const float>();
  params.rules.banned_before = banned_before.contiguous().data<const int32_t>();
  params.rules.num_changed = changed_token.int_size(0);
  params.request = request.contiguous().data<const int32_t>();
  params.positions = positions.contiguous().data<const int32_t>();
  params.least = least.contiguous().data_or_null<const float>();
  params.probe_tokens = probe_tokens.contiguous().data_or_null<const int32_t>();
  params.partials = partials_of(partials);
  params.num_rows = logits.size(0);
  params.num_tokens = logits.size(1);
  params.row_stride = logits.row_stride();
  params.first_token = first_token;
  params.first_piece = first_piece;
  params.suppress_token = suppress_token.given ? suppress_token.value : -1;
  params.num_pieces = partials.size(1);
  params.confidence = static_cast<Confidence>(confidence);
  lm_head_sample_reduce(params, call.launch_on_gpu());
}

void call_lm_head_sample_filter(Call& call, const TensorView& logits, const TensorView& request,
                                const TensorView& temperature, const TensorView& top_p,
                                const TensorView& top_k, const TensorView& least) {
  SampleFilterParams params{};
  params.logits = logits.data<const float>();
  params.rules = draw_rules_of(temperature, top_p, top_k);
  params.request = request.contiguous().data<const int32_t>();
  params.least = least.contiguous().data<float>();
  params.num_rows = logits.size(0);
  params.vocab_size = logits.size(1);
  params.row_stride = logits.row_stride();
  lm_head_sample_filter(params, call.launch_on_gpu());
}

void call_lm_head_sample_finish(Call& call, const TensorView& partials, const TensorView& probe_tokens,
                                const TensorView& token, const TensorView& sureness,
                                const TensorView& probe_probability, int64_t vocab_size, int confidence) {
  SampleFinishParams params{};
  params.partials = partials_of(partials);
  params.probe_tokens = probe_tokens.contiguous().data_or_null<const int32_t>();
  params.token = token.contiguous().data<int32_t>();
  params.confidence = sureness.contiguous().data<float>();
  params.probe_probability = probe_probability.contiguous().data_or_null<float>();
  params.num_rows = partials.size(0);
  params.num_pieces = partials.size(1);
  params.vocab_size = vocab_size;
  params.measure = static_cast<Confidence>(confidence);
  lm_head_sample_finish(params, call.launch_on_gpu());
}

}  // namespace

void bind_sampling(py::module_& module) {
  define<&call_lm_head_sample_reduce>(
      module, "lm_head_sample_reduce",
      {"logits", "request", "positions", "temperature", "seed", "forward", "changed_token", "logit_bias",
       "banned_before", "least", "probe_tokens", "partials", "first_token", "first_piece", "suppress_token",
       "confidence"});
  define<&call_lm_head_sample_filter>(module, "lm_head_sample_filter",
                                      {"logits", "request", "temperature", "top_p", "top_k", "least"});
  define<&call_lm_head_sample_finish>(
      module, "lm_head_sample_finish",
      {"partials", "probe_tokens", "token", "sureness", "probe_probability", "vocab_size", "confidence"});
}

}  // namespace bbk
