"""Whether a function on tensors waits for the device, which no CUDA graph can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that bring values to the host: a number, or the size of their result.
_WAITS = {
    "_local_scalar_dense", "_unique", "_unique2", "bincount", "equal", "is_nonzero", "item", "masked_select",
    "nonzero", "unique_consecutive", "unique_dim",
}  # fmt: skip
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class _Watch(TorchDispatchMode):
    """Notes the first operator that waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self.found is None and _waits(name, args, kwargs or {}, result):
            self.found = name
        return result


def host_wait_of(run: Callable[[], Any]) -> str | None:
    """Runs a function; the operator in it that waits for the device, None if none does.

    Copies between host and device count, and so do indices that are masks, since their number of members is
    the size of the result.
    """
    with _Watch() as watch:
        run()
    return watch.found


def _waits(name: str, args: Any, kwargs: dict[str, Any], result: Any) -> bool:
    if name in _WAITS:
        return True
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in _INDEXED:
        masks = (torch.bool, torch.uint8)
        return any(isinstance(index, torch.Tensor) and index.dtype in masks for index in args[1])
    if name in ("_to_copy", "copy_", "to"):
        return len({tensor.device.type for tensor in _tensors((args, result))}) > 1
    # What a list became on the device was copied there.
    return name == "lift_fresh" and result.device.type != "cpu"


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
