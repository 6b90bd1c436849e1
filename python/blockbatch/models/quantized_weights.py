"""A weight in 8 bits: rows in e4m3, each with a scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# What `load_model` takes as `quantization`, and which weights are in e4m3 with it.
QUANTIZATIONS = {"fp8": "layers", "fp8-all": "layers and LM head"}
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [out, in] that is about `values * scale[:, None]`.

    Attributes:
        values: [out, in] float8_e4m3fn.
        scale: [out] fp32.
    """

    values: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def empty(cls, rows: int, columns: int, device: torch.device | str) -> QuantizedWeight:
        return cls(
            torch.empty(rows, columns, dtype=E4M3, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
        )

    def __getitem__(self, rows: slice) -> QuantizedWeight:
        return QuantizedWeight(self.values[rows], self.scale[rows])

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def numel(self) -> int:
        return self.values.numel()

    def float(self) -> torch.Tensor:
        """[out, in] fp32: what the weight stands for."""
        return self.values.float() * self.scale[:, None]


def head_operator(
    operators: Any, name: str, lm_head: torch.Tensor | QuantizedWeight
) -> tuple[Callable[..., Any], tuple[torch.Tensor, ...]]:
    """The operator `name` of the LM head for the kind of its weight, and the weight as that takes it."""
    if isinstance(lm_head, QuantizedWeight):
        return getattr(operators, f"{name}_fp8"), (lm_head.values, lm_head.scale)
    return getattr(operators, name), (lm_head,)
