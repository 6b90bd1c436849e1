"""Scales of K and V in e4m3: one for each layer and kv head, from a short calibration when a model is loaded.

What the cache holds stands for `stored * scale`. Static scales let a key be stored once and for all: it never
depends on other tokens, so that pages can be shared and copied as they are.

Scales are powers of two. In a floating-point format that costs nothing: the step between numbers is relative,
and a power of two moves all of them without rounding. So every backend stores the same bits, and what is read
back is exact in 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch_kernels.shapes import E4M3, E4M3_MAX, LEAST_AMAX

KV_DTYPES = ("fp8",)
# The largest magnitude of a few texts is not that of all: outliers of K and V belong to channels and differ
# little from text to text, and what is larger still is limited, not lost. The cost is range at the lower end:
# e4m3 has 15 powers of two before it loses bits, and what is 2^12 times smaller than a head's largest weighs
# nothing.
MARGIN = 2.0
# Positions of a text, of which the last third is MASK as at the start of a decode.
_LENGTH, _MASKED = 192, 64
_TEXTS = (
    "Question: A farmer has 17 sheep and buys 25 more. He sells a third of them at 85 dollars each. How much "
    "money does he get? Answer: 17 + 25 = 42 sheep, a third of them is 14, and 14 * 85 = 1190 dollars. ",
    "def fibonacci(n: int) -> list[int]:\n    numbers = [0, 1]\n    while len(numbers) < n:\n        "
    "numbers.append(numbers[-1] + numbers[-2])\n    return numbers[:n]\n\nassert fibonacci(5)[4] == 3\n",
    "The river rises in the hills behind the old town. For most of the year it is a quiet stream, but in "
    "spring, when the snow melts, it carries trees and stones down to the sea. Nobody remembers who built "
    "the bridge. ",
    'User: Translate "good morning" into French, German and Spanish.\nAssistant: Bonjour; Guten Morgen; '
    'buenos d\u00edas.\nUser: {"name": "Ada", "year": 1843}\nAssistant: Ada Lovelace, 1843. ',
)


@dataclass(frozen=True)
class KVScales:
    """
    Attributes:
        k, v: [layers, num_kv_heads] fp32.
    """

    k: Tensor
    v: Tensor


def check_kv_dtype(kv_dtype: str | None, device: torch.device, backend: str | None) -> None:
    """
    Raises:
        ValueError: not None or one of `KV_DTYPES`.
        RuntimeError: nothing fast computes with it there.
    """
    if kv_dtype is None:
        return
    if kv_dtype not in KV_DTYPES:
        names = ", ".join(map(repr, KV_DTYPES))
        raise ValueError(f"kv_dtype: expected None or one of {names}, got {kv_dtype!r}")
    if device.type != "cuda" or backend == "reference":
        return
    try:
        chosen = bbk.backend_of("varlen_attention_fp8", device, backend)
    except RuntimeError as error:
        raise RuntimeError(f"kv_dtype: {error}") from None
    if chosen == "reference":
        raise RuntimeError(
            f"kv_dtype: expected None on {torch.cuda.get_device_name(device)}, got {kv_dtype!r}: no compiled "
            "backend computes with e4m3 there (compute capability 8.9 and newer); backend='reference' does, "
            "slowly"
        )


def calibrate(model: Any) -> KVScales:
    """The scales of a model, by forwards of a few texts with K and V in the model's dtype.

    Every text is a forward of its own, so that nothing depends on what is beside it. Under tensor parallelism
    every rank finds the scales of its heads.
    """
    spec = model.spec
    most = torch.full((2, spec.num_layers, spec.num_kv_heads), LEAST_AMAX, device=model.device)
    for ids in _rows(model):
        kv = model.keys_and_values(torch.tensor([ids], device=model.device))
        most = torch.maximum(most, kv.abs().amax((2, 3, 5)).float().transpose(0, 1))
    if not bool(most.isfinite().all()):
        raise ValueError("kv_dtype: expected finite keys and values of the model, got NaN or infinity")
    k, v = power_of_two(most * (MARGIN / E4M3_MAX))
    return KVScales(k.contiguous(), v.contiguous())


def power_of_two(scale: Tensor) -> Tensor:
    """The least power of two that is not below."""
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa from 0.5 to below 1
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())


def _rows(model: Any) -> list[list[int]]:
    """Token ids of equal length; without a tokenizer ids from all over the vocabulary."""
    spec = model.spec
    length = min(_LENGTH, spec.max_length)
    masked = min(_MASKED, length // 3)
    rows = []
    for number, text in enumerate(_TEXTS):
        if model.tokenizer is None:
            ids = [(number * 7919 + place * 104729) % spec.vocab_size for place in range(length)]
        else:
            ids = model.tokenizer.encode(text) or [0]
        ids = (ids * (length // len(ids) + 1))[: length - masked]
        rows.append(ids + [spec.mask_token_id] * masked)
    return rows


def dtype_of_cache(scales: KVScales | None, dtype: torch.dtype) -> torch.dtype:
    """Of a cache with these scales, in a model of `dtype`."""
    return dtype if scales is None else E4M3
