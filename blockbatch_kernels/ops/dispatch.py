"""Which backend runs an operator."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from blockbatch_kernels import cuda, reference, triton, tuning

MODULES = {"reference": reference, "triton": triton, "cuda": cuda}
BACKENDS = tuple(MODULES)
COMPILED = ("triton", "cuda")
_E4M3_CAPABILITY = (8, 9)  # the first with conversions and products of e4m3


def module_for(
    name: str | None, op: str, example: Tensor, *, excluded: tuple[str, ...] = (), **sizes: int
) -> ModuleType:
    """The module that runs `op` on tensors like `example`; `tuning.preference` has the order.

    excluded: backends that refuse the call for another reason than the sizes, passed over by default.
    """
    if name is None:
        for module in tuning.preference(op, **sizes) if example.is_cuda else ():
            if module in excluded or not hasattr(MODULES[module], op):
                continue
            if MODULES[module].why_unavailable(example.device) is None:
                return MODULES[module]
        return reference
    if name not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {', '.join(BACKENDS)}, got {name!r}")
    module = MODULES[name]
    if not hasattr(module, op):
        raise RuntimeError(f"backend: {op} has no {name} version")
    if name == "reference":
        return reference
    reason = module.why_unavailable(example.device)
    if name == "cuda" and not example.is_cuda:
        reason = "the tensors are not on a GPU"
    if reason is not None:
        raise RuntimeError(f"backend: {name} cannot run {op}: {reason}")
    return module


def module_for_e4m3(
    name: str | None, op: str, example: Tensor, *, excluded: tuple[str, ...] = (), **sizes: int
) -> ModuleType:
    """`module_for` of an operator on numbers of 8 bits: on GPUs that do not know e4m3 the reference alone."""
    if example.is_cuda and (have := torch.cuda.get_device_capability(example.device)) < _E4M3_CAPABILITY:
        if name in COMPILED:
            raise RuntimeError(
                f"backend: {name} cannot run {op}: e4m3 needs compute capability 8.9 or newer, the GPU has "
                f"{have[0]}.{have[1]}"
            )
        excluded = COMPILED
    return module_for(name, op, example, excluded=excluded, **sizes)


def backend_of(op: str, device: torch.device, backend: str | None = None, **sizes: int) -> str:
    """Name of the backend that runs the operator `op` on tensors of `device`; raises as `op` would.

    Args:
        sizes: what the default choice of some operators depends on, as far as it is known: num_tokens,
            num_keys, head_dim and element_size of `varlen_attention`; num_branches of `copy_pages`, and with
            num_eos_tokens of `initial_plan` and `decode_policy`.
    """
    choose = module_for_e4m3 if op.endswith("_fp8") else module_for
    module = choose(backend, op, torch.empty(0, device=device), **sizes)
    return next(name for name in MODULES if is_backend(module, name))


def is_backend(module: ModuleType, name: str) -> bool:
    """Whether `module`, as `module_for` gave it, is the backend of that name."""
    return module is MODULES[name]
