"""Shapes written with names, and what the backends share about them.

A shape is text such as "rows+1 head_dim/2": one word for each dimension. A word is a number, `*` for any
size, or a name, which stands for the same size wherever the arguments of one call use it; a name may be
multiplied in front ("2*intermediate") and divided or added to behind it. Records say the shape and dtype of
each field once, as `Annotated[Tensor, Layout(...)]`; checks, schemas, fakes and allocation follow from that.
"""

from __future__ import annotations

import functools
import re
import types
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Keys of a unit of an attention plan at most, integers of its record, and of the record of a stretch.
UNIT_KEYS = 128
UNIT_INTEGERS = 22
STRETCH_INTEGERS = 4
# Elements of quantised tensors, and the largest of them. A row's largest magnitude counts as at least
# LEAST_AMAX, so that a row of zeros has a scale, too.
E4M3, E4M3_MAX, LEAST_AMAX = torch.float8_e4m3fn, 448.0, 1e-30
# Tokens above this probability are likely; of what adds up to 1 at most so many can be.
LEAST_LIKELY, NUM_LIKELY = 0.2, 4
# What `lm_head_sample` may say of a prediction.
CONFIDENCES = ("probability", "entropy", "margin")
# Where the two halves of a key of its noise start, and what is added at every step; any numbers would do.
KEY_STARTS, KEY_STEP = (0x243F6A88, 0x85A308D3), 0x9E3779B9

_WORD = re.compile(r"(?:(\d+)\*)?([a-z_]+)(?:/(\d+))?(?:\+(\d+))?")


class Dim(NamedTuple):
    """The size symbol * times // over + plus; without a symbol `plus`, where None stands for any size."""

    symbol: str | None
    times: int = 1
    over: int = 1
    plus: int | None = 0

    def __str__(self) -> str:
        """As Python: what a size is, from variables named as the symbols."""
        if self.symbol is None:
            return str(self.plus)
        times = f"{self.times} * " if self.times > 1 else ""
        over = f" // {self.over}" if self.over > 1 else ""
        return f"{times}{self.symbol}{over}" + (f" + {self.plus}" if self.plus else "")

    def size(self, sizes: dict[str, int]) -> int | None:
        if self.symbol is None:
            return self.plus
        return sizes[self.symbol] * self.times // self.over + self.plus

    @property
    def binds(self) -> bool:
        """Whether a size says what the symbol stands for."""
        return self.symbol is not None and self.over == 1 and self.plus == 0


@functools.cache
def dims(shape: str) -> tuple[Dim, ...]:
    """Raises ValueError where the text is no shape."""

    def dim(word: str) -> Dim:
        if word == "*" or word.isdecimal():
            return Dim(None, plus=None if word == "*" else int(word))
        match = _WORD.fullmatch(word)
        if match is None:
            raise ValueError(f"shape: expected numbers, * and names such as 2*rows, rows/2, got {shape!r}")
        times, symbol, over, plus = match.groups()
        return Dim(symbol, int(times or 1), int(over or 1), int(plus or 0))

    return tuple(dim(word) for word in shape.split())


@dataclass(frozen=True)
class Layout:
    """What a tensor of a record is.

    Attributes:
        shape: in words, see the module.
        dtype: the only one that it may have.
        given: of a state: it is set when the state is made; operators read it alone.
    """

    shape: str
    dtype: torch.dtype = torch.int32
    given: bool = False

    def sizes(self, symbols: dict[str, int]) -> tuple[int | None, ...]:
        """The shape where the symbols stand for these sizes."""
        return tuple(dim.size(symbols) for dim in dims(self.shape))


class Field(NamedTuple):
    """A field of a record: a tensor with its layout, or a plain number (`layout` is None)."""

    name: str
    layout: Layout | None
    optional: bool


@functools.cache
def fields_of(record: type) -> tuple[Field, ...]:
    """The fields of a record class in order, as their annotations say."""
    fields = []
    for name, hint in typing.get_type_hints(record, include_extras=True).items():
        layout = next(
            (found for found in getattr(hint, "__metadata__", ()) if isinstance(found, Layout)), None
        )
        fields.append(Field(name, layout, is_optional(hint)))
    return tuple(fields)


def is_optional(hint: Any) -> bool:
    """Whether None is allowed by the annotation."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    return type(None) in alternatives(hint)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def zeros(
    record: type, sizes: dict[str, int], device: torch.device, without: Collection[str] = ()
) -> dict[str, Tensor]:
    """Field -> a tensor of zeros, for the tensors of the record but those in `without`."""
    return {
        name: torch.zeros(layout.sizes(sizes), dtype=layout.dtype, device=device)
        for name, layout, _ in fields_of(record)
        if layout is not None and name not in without
    }


def split_heads(product: Tensor, num_heads: int, k_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The heads of q, k and v as views of their product [tokens, all heads * head_dim]."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    return product.unflatten(1, (-1, head_dim)).split((num_heads, num_kv_heads, num_kv_heads), dim=1)


def rotate_heads(
    product: Tensor,
    num_heads: int,
    where: Sequence[Tensor | None],
    rope_kv_write: Callable[..., None],
    rope_kv_write_fp8: Callable[..., None],
) -> Tensor:
    """q of a product of q, k and v, rotated in place; k and v are on their way into the caches.

    Args:
        product: [tokens, all heads * head_dim]; *written*.
        where: the six that `rope_kv_write` takes behind v, then the scales of caches in e4m3: none, or None,
            for others.
        rope_kv_write, rope_kv_write_fp8: a backend's operators.
    """
    places, scales = where[:6], where[6:]
    q, k, v = split_heads(product, num_heads, places[-1])
    if not scales or scales[0] is None:
        rope_kv_write(q, k, v, *places)
    else:
        rope_kv_write_fp8(q, k, v, *places, *scales)
    return q


def map_entries(block_sizes: Sequence[int], gen_length: int) -> int:
    """Entries of a line of `BranchState.map_token` that are always enough.

    Tokens get an entry in block steps, while their position is a MASK inside the window. Each such step
    decodes at least one other position of that window, and none of them becomes a MASK again before the map
    is emptied: a sync replaces tokens and map together. So there are fewer steps than positions in the
    windows of all sizes around the position. In each of them at most two tokens have one half.
    """
    spans = (
        max(position // size * size + size for size in block_sizes)
        - min(position // size * size for size in block_sizes)
        for position in range(gen_length)
    )
    return max(1, 2 * (min(max(spans), gen_length) - 1))
