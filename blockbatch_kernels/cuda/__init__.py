"""The compiled backend: one thin line per operator over the extension `blockbatch_kernels._C`.

Callers go through `blockbatch_kernels.ops`, which states the contracts and checks the tensors; here they are
only unpacked into addresses, sizes and strides.
"""

from blockbatch_kernels.cuda.activation import swiglu
from blockbatch_kernels.cuda.extension import build_info, is_available, why_unavailable

__all__ = ["build_info", "is_available", "swiglu", "why_unavailable"]
