#include "bind/bindings.h"
#include "layer/activation.h"
#include "layer/all_reduce_norm.h"
#include "layer/norm.h"
#include "layer/quantize.h"
#include "layer/rope.h"

namespace py = pybind11;

namespace bbk {
namespace {

void call_rms_norm(Call& call, const TensorView& x, const TensorView& weight, const TensorView& residual,
                   const TensorView& out, float eps, bool programmatic) {
  RmsNormParams params{};
  params.dtype = float_dtype({&x, &weight, &residual, &out});
  params.x = x.data<const void>();
  params.weight = weight.contiguous().data<const void>();
  params.residual = residual.data_or_null<void>();
  params.out = out.data<void>();
  params.num_tokens = x.size(0);
  params.dim = x.size(1);
  params.x_row_stride = x.row_stride();
  params.residual_row_stride = residual.is_none() ? 0 : residual.row_stride();
  params.out_row_stride = out.row_stride();
  params.eps = eps;
  rms_norm(params, programmatic, call.launch_on_gpu());
}

void call_all_reduce_norm(Call& call, const TensorView& x, const TensorView& weight,
                          const TensorView& residual, const TensorView& out, const TensorView& scale,
                          const TensorView& turn, const Inboxes& inboxes, int rank, int64_t source_bytes,
                          float eps, int lanes, bool lets_next_wait, bool programmatic) {
  AllReduceNormParams params{};
  params.dtype = float_dtype({&x, &weight, &residual});
  params.x = x.data<const void>();
  params.weight = weight.contiguous().data<const void>();
  params.residual = residual.data<void>();
  if (scale.is_none()) {
    float_dtype({&x, &out});
    params.out = out.data<void>();
    params.out_row_stride = out.row_stride();
  } else {
    params.out = out.contiguous().data<uint8_t>();
    params.scale = scale.contiguous().data<float>();
  }
  params.peers = Peers{inboxes, rank, source_bytes, turn.contiguous().data<int32_t>()};
  params.num_tokens = x.size(0);
  params.dim = x.size(1);
  params.x_row_stride = x.row_stride();
  params.residual_row_stride = residual.row_stride();
  params.eps = eps;
  params.lanes = lanes;
  params.lets_next_wait = lets_next_wait;
  all_reduce_norm(params, programmatic, call.launch_on_gpu());
}

void call_swiglu(Call& call, const TensorView& gate_up, const TensorView& out) {
  SwigluParams params{};
  params.dtype = float_dtype({&gate_up, &out});
  params.gate_up = gate_up.data<const void>();
  params.out = out.data<void>();
  params.num_tokens = gate_up.size(0);
  params.intermediate_size = gate_up.size(1) / 2;
  params.gate_up_row_stride = gate_up.row_stride();
  params.out_row_stride = out.row_stride();
  swiglu(params, call.launch_on_gpu());
}

// What all three quantising operators have in common.
QuantizeParams quantize_params(const TensorView& x, const TensorView& out, const TensorView& scale) {
  QuantizeParams params{};
  params.x = x.data<const void>();
  params.out = out.contiguous().data<uint8_t>();
  params.scale = scale.contiguous().data<float>();
  params.num_tokens = out.size(0);
  params.dim = out.size(1);
  params.x_row_stride = x.row_stride();
  return params;
}

void call_quantize_rows(Call& call, const TensorView& x, const TensorView& out, const TensorView& scale,
                        bool programmatic) {
  QuantizeParams params = quantize_params(x, out, scale);
  params.dtype = float_dtype({&x});
  quantize("quantize_rows", QuantizeSource::kRows, params, programmatic, call.launch_on_gpu());
}

void call_rms_norm_fp8(Call& call, const TensorView& x, const TensorView& weight, const TensorView& residual,
                       const TensorView& out, const TensorView& scale, float eps, bool programmatic) {
  QuantizeParams params = quantize_params(x, out, scale);
  params.dtype = float_dtype({&x, &weight, &residual});
  params.weight = weight.contiguous().data<const void>();
  params.residual = residual.data_or_null<void>();
  params.residual_row_stride = residual.is_none() ? 0 : residual.row_stride();
  params.eps = eps;
  quantize("rms_norm_fp8", QuantizeSource::kNorm, params, programmatic, call.launch_on_gpu());
}

void call_swiglu_fp8(Call& call, const TensorView& gate_up, const TensorView& out, const TensorView& scale,
                     bool programmatic) {
  QuantizeParams params = quantize_params(gate_up, out, scale);
  params.dtype = float_dtype({&gate_up});
  quantize("swiglu_fp8", QuantizeSource::kSwiglu, params, programmatic, call.launch_on_gpu());
}

HeadsView heads_view(const TensorView& heads) {
  return HeadsView{heads.data<void>(), heads.stride(0), heads.stride(1)};
}

CacheView cache_view(const TensorView& cache) {
  return CacheView{cache.data<void>(), cache.stride(0), cache.stride(1), cache.stride(2)};
}

void call_rope_kv_write(Call& call, const TensorView& q, const TensorView& k, const TensorView& v,
                        const TensorView& k_cache, const TensorView& v_cache, const TensorView& k_scale,
                        const TensorView& v_scale, const TensorView& positions,
                        const TensorView& slot_mapping, const TensorView& cos, const TensorView& sin,
                        const TensorView& q_norm, const TensorView& k_norm, float norm_eps,
                        bool programmatic) {
  RopeKvWriteParams params{};
  params.dtype = float_dtype({&q, &k, &v, &q_norm, &k_norm});
  read_cache_scales(k_scale, v_scale, q, k_cache, v_cache, &params);
  read_rope(q, k_cache, v_cache, positions, slot_mapping, cos, sin, &params);
  params.k = heads_view(k);
  params.v = heads_view(v);
  params.q_norm = q_norm.contiguous().data_or_null<const void>();
  params.k_norm = k_norm.contiguous().data_or_null<const void>();
  params.norm_eps = norm_eps;
  rope_kv_write(params, programmatic, call.launch_on_gpu());
}

}  // namespace

void read_cache_scales(const TensorView& k_scale, const TensorView& v_scale, const TensorView& q,
                       const TensorView& k_cache, const TensorView& v_cache, RopeKvWriteParams* params) {
  params->k_scale = k_scale.contiguous().data_or_null<const float>();
  params->v_scale = v_scale.contiguous().data_or_null<const float>();
  check_caches(params->k_scale != nullptr, q, {&k_cache, &v_cache});
}

void read_rope(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
               const TensorView& positions, const TensorView& slot_mapping, const TensorView& cos,
               const TensorView& sin, RopeKvWriteParams* params) {
  params->q = heads_view(q);
  params->k_cache = cache_view(k_cache);
  params->v_cache = cache_view(v_cache);
  params->positions = positions.contiguous().data<const int32_t>();
  params->slots = slot_mapping.contiguous().data<const int64_t>();
  params->cos = cos.data<const float>();
  params->sin = sin.data<const float>();
  params->cos_row_stride = cos.row_stride();
  params->sin_row_stride = sin.row_stride();
  params->num_tokens = q.size(0);
  params->num_positions = cos.size(0);
  params->num_pages = k_cache.size(0);
  params->page_size = k_cache.size(1);
  params->num_heads = q.int_size(1);
  params->num_kv_heads = k_cache.int_size(2);
  params->head_dim = q.int_size(2);
}

void bind_layer(py::module_& module) {
  define<&call_rms_norm>(module, "rms_norm", {"x", "weight", "residual", "out", "eps", "programmatic"});
  define<&call_all_reduce_norm>(module, "all_reduce_norm",
                                {"x", "weight", "residual", "out", "scale", "turn", "inboxes", "rank",
                                 "source_bytes", "eps", "lanes", "lets_next_wait", "programmatic"});
  define<&call_quantize_rows>(module, "quantize_rows", {"x", "out", "scale", "programmatic"});
  define<&call_rms_norm_fp8>(module, "rms_norm_fp8",
                             {"x", "weight", "residual", "out", "scale", "eps", "programmatic"});
  define<&call_swiglu_fp8>(module, "swiglu_fp8", {"gate_up", "out", "scale", "programmatic"});
  define<&call_swiglu>(module, "swiglu", {"gate_up", "out"});
  define<&call_rope_kv_write>(module, "rope_kv_write",
                              {"q", "k", "v", "k_cache", "v_cache", "k_scale", "v_scale", "positions",
                               "slot_mapping", "cos", "sin", "q_norm", "k_norm", "norm_eps", "programmatic"});
}

}  // namespace bbk
