"""Bytes of the tensors that exist at the same time while something runs on the CPU."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Counts the storages that operators make, from their making to their end.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            value.untyped_storage().data_ptr()
            for value in tree_iter((args, kwargs))
            if isinstance(value, torch.Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in given:
                self._add(value.untyped_storage())
        return result

    def _add(self, storage):
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size):
        self.now -= size
