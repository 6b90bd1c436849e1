#include "layer/rope.h"

#include <tuple>

#include "bind/bindings.h"
#include "gemm/gemm.h"

namespace py = pybind11;

namespace bbk {
namespace {

using Heads = std::tuple<uintptr_t, int64_t,
                         int64_t>;  // address, token stride, head stride
using Cache = std::tuple<uintptr_t, int64_t, int64_t,
                         int64_t>;  // address, page stride, token stride, head stride

HeadsView heads_view(const Heads& heads) {
  return HeadsView{reinterpret_cast<void*>(std::get<0>(heads)), std::get<1>(heads), std::get<2>(heads)};
}

CacheView cache_view(const Cache& cache) {
  return CacheView{reinterpret_cast<void*>(std::get<0>(cache)), std::get<1>(cache), std::get<2>(cache),
                   std::get<3>(cache)};
}

void launch_rope_kv_write(const Heads& q, const Heads& k, const Heads& v, const Cache& k_cache,
                          const Cache& v_cache, uintptr_t positions, uintptr_t slots, uintptr_t cos,
                          uintptr_t sin, int64_t cos_row_stride, int64_t sin_row_stride, int64_t num_tokens,
                          int64_t num_positions, int64_t num_pages, int64_t page_size, int num_heads,
                          int num_kv_heads, int head_dim, int dtype, bool programmatic, int device,
                          uintptr_t stream) {
  const RopeKvWriteParams params{heads_view(q),
                                 heads_view(k),
                                 heads_view(v),
                                 cache_view(k_cache),
                                 cache_view(v_cache),
                                 reinterpret_cast<const int32_t*>(positions),
                                 reinterpret_cast<const int64_t*>(slots),
                                 reinterpret_cast<const float*>(cos),
                                 reinterpret_cast<const float*>(sin),
                                 cos_row_stride,
                                 sin_row_stride,
                                 num_tokens,
                                 num_positions,
                                 num_pages,
                                 page_size,
                                 num_heads,
                                 num_kv_heads,
                                 head_dim,
                                 static_cast<DType>(dtype)};
  rope_kv_write(params, programmatic, Launch{device, reinterpret_cast<cudaStream_t>(stream)});
}

void launch_linear_rope_kv_write(uintptr_t x, uintptr_t weight, uintptr_t bias, int64_t in_features,
                                 int64_t x_row_stride, int64_t weight_row_stride, int tile_tokens,
                                 int tile_rows, int split_k, int multicast, bool static_weight,
                                 const Heads& q, const Cache& k_cache, const Cache& v_cache,
                                 uintptr_t positions, uintptr_t slots, uintptr_t cos, uintptr_t sin,
                                 int64_t cos_row_stride, int64_t sin_row_stride, int64_t num_tokens,
                                 int64_t num_positions, int64_t num_pages, int64_t page_size, int num_heads,
                                 int num_kv_heads, int head_dim, int dtype, bool programmatic, int device,
                                 uintptr_t stream) {
  GemmParams params = {};
  params.x = reinterpret_cast<const void*>(x);
  params.weight = reinterpret_cast<const void*>(weight);
  params.bias = reinterpret_cast<const void*>(bias);
  params.num_tokens = num_tokens;
  params.in_features = in_features;
  params.out_features = (num_heads + 2LL * num_kv_heads) * head_dim;
  params.x_row_stride = x_row_stride;
  params.weight_row_stride = weight_row_stride;
  params.dtype = static_cast<DType>(dtype);
  RopeKvWriteParams rope = {};
  rope.q = heads_view(q);
  rope.k_cache = cache_view(k_cache);
  rope.v_cache = cache_view(v_cache);
  rope.positions = reinterpret_cast<const int32_t*>(positions);
  rope.slots = reinterpret_cast<const int64_t*>(slots);
  rope.cos = reinterpret_cast<const float*>(cos);
  rope.sin = reinterpret_cast<const float*>(sin);
  rope.cos_row_stride = cos_row_stride;
  rope.sin_row_stride = sin_row_stride;
  rope.num_tokens = num_tokens;
  rope.num_positions = num_positions;
  rope.num_pages = num_pages;
  rope.page_size = page_size;
  rope.num_heads = num_heads;
  rope.num_kv_heads = num_kv_heads;
  rope.head_dim = head_dim;
  rope.dtype = params.dtype;
  linear_rope_kv_write(params, rope, GemmTile{tile_tokens, tile_rows, split_k, multicast}, static_weight,
                       programmatic, Launch{device, reinterpret_cast<cudaStream_t>(stream)});
}

}  // namespace

void bind_rope(py::module_& module) {
  module.def("rope_kv_write", &launch_rope_kv_write, py::arg("q"), py::arg("k"), py::arg("v"),
             py::arg("k_cache"), py::arg("v_cache"), py::arg("positions"), py::arg("slots"), py::arg("cos"),
             py::arg("sin"), py::arg("cos_row_stride"), py::arg("sin_row_stride"), py::arg("num_tokens"),
             py::arg("num_positions"), py::arg("num_pages"), py::arg("page_size"), py::arg("num_heads"),
             py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("dtype"), py::arg("programmatic"),
             py::arg("device"), py::arg("stream"));
  module.def("linear_rope_kv_write", &launch_linear_rope_kv_write, py::arg("x"), py::arg("weight"),
             py::arg("bias"), py::arg("in_features"), py::arg("x_row_stride"), py::arg("weight_row_stride"),
             py::arg("tile_tokens"), py::arg("tile_rows"), py::arg("split_k"), py::arg("multicast"),
             py::arg("static_weight"), py::arg("q"), py::arg("k_cache"), py::arg("v_cache"),
             py::arg("positions"), py::arg("slots"), py::arg("cos"), py::arg("sin"),
             py::arg("cos_row_stride"), py::arg("sin_row_stride"), py::arg("num_tokens"),
             py::arg("num_positions"), py::arg("num_pages"), py::arg("page_size"), py::arg("num_heads"),
             py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("dtype"), py::arg("programmatic"),
             py::arg("device"), py::arg("stream"));
}

}  // namespace bbk
