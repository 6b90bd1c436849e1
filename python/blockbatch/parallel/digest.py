"""A number that two ranks have in common as good as only if their decodes are in the same state."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


def of_text(text: str) -> int:
    """63 bits of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


class StateDigest:
    """Digests of one batch's `BranchState`: every number of it, whatever its dtype, by its bits.

    Each 32-bit word is multiplied with an odd random number of its place, modulo 2^64, so that a change of a
    single word always changes the sum.

    Args:
        state: the record; its tensors stay where they are.
    """

    def __init__(self, state) -> None:
        self._tensors = [value for value in vars(state).values() if isinstance(value, Tensor)]
        words = sum(tensor.numel() for tensor in self._tensors)
        random = torch.Generator("cpu").manual_seed(0)
        factors = torch.randint(-(2**62), 2**62, (words,), generator=random, device="cpu") * 2 + 1
        self._factors = factors.to(self._tensors[0].device)

    def compute(self) -> Tensor:
        """[] int64 on the state's device; no wait for it."""
        words = torch.cat(
            [
                (tensor.view(torch.int32) if tensor.element_size() == 4 else tensor.int()).flatten()
                for tensor in self._tensors
            ]
        )
        return (words.long() * self._factors).sum()


class HostDigest:
    """Digests of what the host alone knows of decodes.

    Args:
        told: gives it as text.
    """

    def __init__(self, told: Callable[[], str]) -> None:
        self._told = told

    def compute(self) -> Tensor:
        """[] int64 on the CPU."""
        return torch.tensor(of_text(self._told()), dtype=torch.int64, device="cpu")


def of_state(state) -> StateDigest | HostDigest:
    """Of a record of tensors; a `HostDigest` is its own."""
    return state if isinstance(state, HostDigest) else StateDigest(state)
