// The Python module blockbatch_kernels._C. Tensors and records of them arrive as they are, streams as the
// integer of torch.cuda.Stream.cuda_stream; the package blockbatch_kernels/cuda is the only caller and passes
// checked tensors. std::invalid_argument becomes ValueError, std::runtime_error RuntimeError.
#include <cuda_runtime_api.h>

#include <sstream>
#include <string>

#include "bind/bindings.h"
#include "common/capability.h"
#include "common/device.h"

namespace py = pybind11;

namespace bbk {
namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Raised with every change to what the functions of this module take; `API` in
// blockbatch_kernels/cuda/extension.py is the same number.
constexpr int kApi = 15;

py::dict build_info() {
  py::list archs;
  std::istringstream list(BBK_CUDA_ARCHS);
  for (std::string arch; std::getline(list, arch, ',');) archs.append(arch);
  py::dict info;
  info["api"] = kApi;
  info["cuda_archs"] = archs;
  info["cuda_version"] = version_text(CUDART_VERSION);
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = std::string("gcc ") + __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  return info;
}

// The newest CUDA version that the installed driver serves, "0.0" without a driver. Starts no context on a
// GPU.
std::string driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess) return "0.0";
  return version_text(version);
}

const char* code_for(int device) {
  switch (has_code_for(device)) {
    case Code::kNone:
      return "none";
    case Code::kPortable:
      return "portable";
    case Code::kSm90a:
      return "sm90a";
  }
  return "none";
}

}  // namespace
}  // namespace bbk

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled operators of blockbatch_kernels; call them through blockbatch_kernels.ops.";
  module.def("build_info", &bbk::build_info,
             "What the extension was built for and with: api, cuda_archs, cuda_version, compiler.");
  module.def("driver_version", &bbk::driver_version,
             "The newest CUDA version that the installed driver serves; '0.0' without a driver.");
  module.def(
      "has_code_for", &bbk::code_for, py::arg("device"),
      "What of the extension runs on a GPU: 'none', 'portable' (all but the kernels of sm_90a), 'sm90a'.");
  module.def(
      "limit_shared_bytes", [](int bytes) { bbk::shared_bytes_limit() = bytes > 0 ? bytes : INT_MAX; },
      py::arg("bytes"),
      "For tests: GPUs count as having no more shared memory for a CTA; 0: what they have.");
  bbk::prepare_tensors();
  bbk::bind_attention(module);
  bbk::bind_decode(module);
  bbk::bind_gemm(module);
  bbk::bind_layer(module);
  bbk::bind_sampling(module);
}
