"""Milliseconds of a decode from what each of its turns computed, by a curve of measured turns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from clock_record import Decode
from clock_settings import GEN_LENGTH, Row

# Points (size, milliseconds), ascending; linear between them, and beyond the last two.
Curve = Sequence[tuple[float, float]]

# Block steps by their tokens, on an H100 in the shape of LLaDA-8B; without any, a turn is the policy alone.
H100_BLOCK = (
    (0, 0.2),
    (1, 6.0),
    (32, 6.0),
    (64, 6.15),
    (96, 6.4),
    (128, 6.55),
    (192, 7.2),
    (252, 8.2),
    (512, 13.4),
)
# Whole rows by token, beyond what a block step of so many tokens takes.
_H100_TOKEN_MS = 0.0236


def h100_whole() -> Curve:
    """Whole rows by their tokens."""
    return [(size, max(_H100_TOKEN_MS * size, at(H100_BLOCK, size))) for size in range(64, 12288, 64)]


def at(curve: Curve, size: float) -> float:
    if len(curve) > 1 and size > curve[-1][0]:
        (x0, y0), (x1, y1) = curve[-2:]
        return y1 + (size - x1) * (y1 - y0) / (x1 - x0)
    return float(np.interp(size, *zip(*curve, strict=True)))


def refreshes_canvas(row: Row) -> bool:
    """Whether a refresh computes the prompt as well."""
    return row.config().refresh_scope != "generation"


def modelled_ms(row: Row, decode: Decode, prompt_length: int, block: Curve, whole: Curve) -> float:
    """Milliseconds of a decode with a prompt of this length, by what turns of so many queries take."""
    canvas, total = refreshes_canvas(row), 0.0
    for phase, tokens, rows in decode.steps.tolist():
        if phase == 1:
            total += at(block, tokens)
        else:
            total += at(whole, rows * (GEN_LENGTH + (prompt_length if phase == 0 or canvas else 0)))
    return total
