"""Reading one safetensors file: the header is checked in full first, then one tensor at a time is read.

Format: 8 bytes little-endian length N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data,
without holes. Reading here and not through a memory map keeps the host memory at one small staging buffer
whatever the size of the file, and turns a file cut short on disk into an exception instead of a bus error.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blockbatch.models.folders import LFS_POINTER
from blockbatch.models.spec import CheckpointError

FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
SUB_BYTE = ("F4", "F6_E2M3", "F6_E3M2", "I4", "U4")  # less than a byte an element
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
STAGING_BYTES = 16 << 20  # large enough for the disk's full speed, small beside any real shard


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a file: `dtype` as written there (F32, BF16, ...), `begin` its first byte in the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """All tensors of a file, from its header alone.

    Checks the header's syntax, that every tensor's bytes fit its shape and dtype, and that the data follow
    without holes or overlaps and end with the file.

    Raises:
        CheckpointError: the file is truncated, corrupted or not a safetensors file.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        if prefix == LFS_POINTER[:8]:
            raise CheckpointError(
                f"{path}: expected a safetensors file, got a pointer of Git LFS: fetch the file with "
                "`git lfs pull`"
            )
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path}: truncated, corrupted or not a safetensors file: expected a header length of "
                f"at most {max(size - 8, 0)} bytes in the first 8 bytes, got {length} (file size {size})"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: corrupted: expected JSON in the header, got {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: corrupted: expected a JSON object in the header, got {header!r:.80}")
    header.pop("__metadata__", None)

    entries, spans = {}, []
    for name, fields in header.items():
        dtype, shape, begin, end = _entry_fields(path, name, fields)
        spans.append((begin, end, name))
        entries[name] = TensorEntry(path, name, dtype, shape, 8 + length + begin)
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise CheckpointError(
                f"{path}: corrupted: expected tensor {name!r} at byte {position}, got {begin}"
            )
        position = end
    if position != size - 8 - length:
        state = "truncated" if position > size - 8 - length else "corrupted"
        raise CheckpointError(
            f"{path}: {state}: expected {position} bytes of data after the header, got {size - 8 - length}"
        )
    return entries


def read_tensor(
    entry: TensorEntry,
    written: torch.Tensor,
    staging: torch.Tensor,
    first_row: int = 0,
    first_column: int = 0,
    *,
    add: bool = False,
) -> None:
    """Read the first `written.numel()` elements of a tensor, or a part of its rows and columns.

    Args:
        entry: a tensor of a float dtype in `FLOAT_DTYPES`.
        written: contiguous, any device and float dtype; receives the elements in row-major order, converted.
        staging: [at least one element's bytes, and one row's of `written`] uint8 on the CPU, overwritten; the
            only host memory used.
        first_row, first_column: where the part begins whose size is `written`'s. No byte of the file beside
            it is read.
        add: whether the elements are added to what `written` holds.

    Raises:
        CheckpointError: the file ends too early, or a value is not finite in `written`'s dtype.
    """
    dtype, item = FLOAT_DTYPES[entry.dtype], ITEM_SIZES[entry.dtype]
    for part, chunk in _chunks(entry, written, staging, item, first_row, first_column):
        values = chunk.view(dtype)
        part.add_(values.to(part.device)) if add else part.copy_(values)
        # The extremes carry NaN and infinity along and need no temporary of the chunk's size.
        if not torch.stack(torch.aminmax(part)).isfinite().all():
            target = str(written.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name!r} ({entry.dtype}): expected finite values "
                f"in {target}, got NaN or infinity (corrupted, or out of that dtype's range)"
            )


def read_bytes(
    entry: TensorEntry,
    written: torch.Tensor,
    staging: torch.Tensor,
    first_row: int = 0,
    first_column: int = 0,
) -> None:
    """Read the first `written.numel()` bytes of a tensor as they are, or a part of its rows and columns.

    Args:
        entry: a tensor of elements of one byte.
        written: contiguous uint8, any device.
        staging, first_row, first_column: see `read_tensor`.

    Raises:
        CheckpointError: the file ends too early.
    """
    for part, chunk in _chunks(entry, written, staging, 1, first_row, first_column):
        part.copy_(chunk)


def _chunks(
    entry: TensorEntry,
    written: torch.Tensor,
    staging: torch.Tensor,
    item: int,
    first_row: int = 0,
    first_column: int = 0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of `written`, flat, with the bytes of the file that belong there, `item` for an element."""
    row_bytes = math.prod(entry.shape[1:]) * item
    begin = entry.begin + first_row * row_bytes + first_column * item
    flat = written.view(-1)
    # Bytes that lie together: all of it, or a piece of each row.
    run = flat.numel() * item
    if len(entry.shape) > 1 and written.shape[1:] != entry.shape[1:]:
        run = written.shape[-1] * item
    step = staging.numel() // run * (run // item) if run <= staging.numel() else staging.numel() // item
    with open(entry.path, "rb", buffering=0) as file:
        for start in range(0, flat.numel(), max(1, step)):
            count = min(step, flat.numel() - start)
            chunk = staging[: count * item]
            for place in range(0, count * item, run):
                row, within = divmod(start * item + place, run)
                file.seek(begin + row * row_bytes + within)
                _read_exactly(file, chunk[place : place + run].numpy(), entry)
            yield flat[start : start + count], chunk


def _read_exactly(file: Any, written: Any, entry: TensorEntry) -> None:
    """Fills `written`, a flat array of bytes; one call may give less than is there."""
    filled = 0
    while filled < len(written):
        count = file.readinto(written[filled:])
        if not count:
            raise CheckpointError(f"{entry.path}: truncated while reading tensor {entry.name!r}")
        filled += count


def _entry_fields(path: Path, name: str, fields: Any) -> tuple[str, tuple[int, ...], int, int]:
    def sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)

    if not isinstance(fields, dict):
        raise CheckpointError(
            f"{path}: corrupted: expected dtype, shape and data_offsets of {name!r}, got {fields!r:.80}"
        )
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not sizes(shape) or not sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{path}: corrupted: expected dtype, shape and data_offsets of {name!r}, got {fields!r:.200}"
        )
    if dtype in SUB_BYTE:
        raise CheckpointError(
            f"{path}: tensor {name!r}: expected dtype {', '.join(FLOAT_DTYPES)}, got {dtype}: quantised "
            "weights are not read: load the F32, F16 or BF16 checkpoint that they were made from"
        )
    if dtype not in ITEM_SIZES:
        raise CheckpointError(
            f"{path}: tensor {name!r}: expected one of {', '.join(ITEM_SIZES)} as dtype, got {dtype!r}"
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_SIZES[dtype]:
        raise CheckpointError(
            f"{path}: corrupted: tensor {name!r}: expected {math.prod(shape) * ITEM_SIZES[dtype]} bytes "
            f"for shape {shape} of {dtype}, got {end - begin}"
        )
    return dtype, tuple(shape), begin, end


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("the same key twice")
    return fields
