"""Tensors that are described rather than there: for errors that the extension reports before any launch."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Described:
    """What the extension reads of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    strides: tuple[int, ...] | None = None
    address: int = 0
    device: int = 0  # index of the GPU; -1: host memory

    def data_ptr(self):
        return self.address

    def stride(self):
        if self.strides is not None:
            return self.strides
        strides = [1]
        for size in reversed(self.shape[1:]):
            strides.insert(0, strides[0] * size)
        return tuple(strides) if self.shape else ()

    def get_device(self):
        return self.device


def change(arguments, name, **fields):
    """`arguments` with other fields of one tensor."""
    return {**arguments, name: dataclasses.replace(arguments[name], **fields)}
