#include "gemm/lm_head.h"

#include "bind/bindings.h"

namespace py = pybind11;

namespace bbk {
namespace {

void launch_lm_head_reduce(uintptr_t logits, uintptr_t probe_tokens, uintptr_t partials, int64_t num_rows,
                           int64_t num_tokens, int64_t row_stride, int64_t first_token,
                           int64_t suppress_token, int64_t num_pieces, int dtype, int device,
                           uintptr_t stream) {
  const LmHeadReduceParams params{reinterpret_cast<const void*>(logits),
                                  reinterpret_cast<const int32_t*>(probe_tokens),
                                  reinterpret_cast<LmHeadPartial*>(partials),
                                  num_rows,
                                  num_tokens,
                                  row_stride,
                                  first_token,
                                  suppress_token,
                                  num_pieces,
                                  static_cast<DType>(dtype)};
  lm_head_reduce(params, Launch{device, reinterpret_cast<cudaStream_t>(stream)});
}

void launch_lm_head_product(uintptr_t hidden, uintptr_t weight, uintptr_t partials, int64_t num_rows,
                            int64_t dim, int64_t vocab_size, int64_t hidden_row_stride,
                            int64_t weight_row_stride, int64_t suppress_token, int64_t num_pieces, int dtype,
                            int tile_rows, int device, uintptr_t stream) {
  const LmHeadProductParams params{reinterpret_cast<const void*>(hidden),
                                   reinterpret_cast<const void*>(weight),
                                   reinterpret_cast<LmHeadPartial*>(partials),
                                   num_rows,
                                   dim,
                                   vocab_size,
                                   hidden_row_stride,
                                   weight_row_stride,
                                   suppress_token,
                                   num_pieces,
                                   static_cast<DType>(dtype)};
  lm_head_product(params, tile_rows, Launch{device, reinterpret_cast<cudaStream_t>(stream)});
}

void launch_lm_head_finish(uintptr_t partials, uintptr_t probe_tokens, uintptr_t top_token,
                           uintptr_t confidence, uintptr_t probe_probability, int64_t num_rows,
                           int64_t num_pieces, int64_t piece_tokens, int64_t vocab_size, int device,
                           uintptr_t stream) {
  const LmHeadFinishParams params{reinterpret_cast<const LmHeadPartial*>(partials),
                                  reinterpret_cast<const int32_t*>(probe_tokens),
                                  reinterpret_cast<int32_t*>(top_token),
                                  reinterpret_cast<float*>(confidence),
                                  reinterpret_cast<float*>(probe_probability),
                                  num_rows,
                                  num_pieces,
                                  piece_tokens,
                                  vocab_size};
  lm_head_finish(params, Launch{device, reinterpret_cast<cudaStream_t>(stream)});
}

}  // namespace

void bind_lm_head(py::module_& module) {
  module.attr("LM_HEAD_PIECE_TOKENS") = kLmHeadPieceTokens;
  module.attr("LM_HEAD_TILE_TOKENS") = kLmHeadTileTokens;
  module.def("lm_head_product", &launch_lm_head_product, py::arg("hidden"), py::arg("weight"),
             py::arg("partials"), py::arg("num_rows"), py::arg("dim"), py::arg("vocab_size"),
             py::arg("hidden_row_stride"), py::arg("weight_row_stride"), py::arg("suppress_token"),
             py::arg("num_pieces"), py::arg("dtype"), py::arg("tile_rows"), py::arg("device"),
             py::arg("stream"));
  module.def("lm_head_reduce", &launch_lm_head_reduce, py::arg("logits"), py::arg("probe_tokens"),
             py::arg("partials"), py::arg("num_rows"), py::arg("num_tokens"), py::arg("row_stride"),
             py::arg("first_token"), py::arg("suppress_token"), py::arg("num_pieces"), py::arg("dtype"),
             py::arg("device"), py::arg("stream"));
  module.def("lm_head_finish", &launch_lm_head_finish, py::arg("partials"), py::arg("probe_tokens"),
             py::arg("top_token"), py::arg("confidence"), py::arg("probe_probability"), py::arg("num_rows"),
             py::arg("num_pieces"), py::arg("piece_tokens"), py::arg("vocab_size"), py::arg("device"),
             py::arg("stream"));
}

}  // namespace bbk
