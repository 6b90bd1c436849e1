"""Checkpoints whose weights are stored in e4m3: what config.json says of them, and how they are read.

Two ways of writing them down are known: that of compressed-tensors (`weight_scale`, one for a row or for the
whole tensor) and that of `quant_method` "fp8" (`weight_scale_inv` for blocks, as DeepSeek-V3's, or a scale
for the tensor). In both a weight is its values times the scale, whatever the name. Scales of rows and tensors
are taken over as they are; blocks are multiplied out in fp32 and quantised again by row. Activations are
quantised by token here, so that stored scales of activations are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import blockbatch_kernels as bbk
from blockbatch.models.lora import Update
from blockbatch.models.quantized_weights import QuantizedWeight
from blockbatch.models.safetensors_file import FLOAT_DTYPES, ITEM_SIZES, TensorEntry, read_bytes, read_tensor
from blockbatch.models.spec import CheckpointError
from blockbatch.models.weights import Destination

CONFIG_KEYS = ("quantization_config", "compression_config")
PRODUCTS = ("qkv_weight", "out_weight", "gate_up_weight", "down_weight")
_STORED = "F8_E4M3"
_SCALE_NAMES = ("weight_scale", "weight_scale_inv")
_UNREAD_NAMES = ("input_scale", "activation_scale")
_EXPECTED = "one of 8-bit floats (e4m3) by row, tensor or block, of compressed-tensors or quant_method 'fp8'"


@dataclass(frozen=True)
class StoredScale:
    """The scales of one weight.

    Attributes:
        entry: their tensor.
        block: rows and columns of the weight that share a scale; None: of its whole width or more.
    """

    entry: TensorEntry
    block: tuple[int, int] | None = None


def stored_fp8(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that the weights are stored in e4m3, in a way that is read here.

    Raises:
        CheckpointError: they are quantised in another way; it is named.
    """
    found = [key for key in CONFIG_KEYS if isinstance(config.get(key), dict) and config[key]]
    for key in found:
        check_config(key, config[key])
    return bool(found)


def check_config(key: str, settings: Mapping[str, Any]) -> None:
    """Raises CheckpointError where the settings of a key of `CONFIG_KEYS` are none that are read here."""
    why = _why_not(settings)
    if why is not None:
        raise CheckpointError(f"config.json: {key} must be null or {_EXPECTED}, got {why}")


def _why_not(settings: Mapping[str, Any]) -> str | None:
    method = settings.get("quant_method")
    if method == "fp8":
        kind = settings.get("fmt", "e4m3")
        if kind not in ("e4m3", "float8_e4m3fn"):
            return f"fmt {kind!r}"
        block = settings.get("weight_block_size")
        if block is not None and _block(block) is None:
            return f"weight_block_size {block!r}"
        return None
    if method != "compressed-tensors":
        return f"quant_method {method!r}"
    for key in ("kv_cache_scheme", "transform_config"):
        if settings.get(key):
            return f"compressed-tensors with {key} {settings[key]!r:.100}"
    sparsity = settings.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        return f"compressed-tensors with sparsity_config {sparsity!r:.100}"
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return f"compressed-tensors with config_groups {groups!r:.100}"
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            return f"compressed-tensors with a group {group!r:.100}"
        found = {key: weights.get(key) for key in ("num_bits", "type", "strategy")}
        good = (8, "float") == (found["num_bits"], found["type"]) and weights.get("symmetric", True)
        if not good or found["strategy"] not in ("channel", "tensor", "block"):
            return f"compressed-tensors of format {settings.get('format')!r} with weights {found}"
        if found["strategy"] == "block" and _block(weights.get("block_structure")) is None:
            return f"compressed-tensors with block_structure {weights.get('block_structure')!r}"
    return None


def _block(value: Any) -> tuple[int, int] | None:
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return tuple(value)
    return None


def _block_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    for key in CONFIG_KEYS:
        settings = config.get(key) or {}
        block = settings.get("weight_block_size")
        for group in (settings.get("config_groups") or {}).values():
            block = block or group["weights"].get("block_structure")
        if block is not None:
            return _block(block)
    return None


def is_e4m3(entry: TensorEntry) -> bool:
    return entry.dtype == _STORED


def take_scales(
    entries: dict[str, TensorEntry],
    places: Mapping[str, Destination],
    config: Mapping[str, Any],
    *,
    head: bool = False,
) -> dict[str, StoredScale]:
    """The scales of every weight that is stored in e4m3, by the weight's name.

    Weights that were left in 16 or 32 bits have none.

    Args:
        entries: *written*: scales are taken out, also those of activations.
        head: whether the LM head may be stored so, too.

    Raises:
        CheckpointError: a weight without scales, scales without such a weight, or a wrong shape or dtype; an
            LM head that may not be stored so.
    """
    block, scales = _block_of(config), {}
    for name, place in places.items():
        if not name.endswith(".weight") or name not in entries:
            continue
        owner = name.removesuffix("weight")
        for unread in _UNREAD_NAMES:
            entries.pop(owner + unread, None)
        found = [entries.pop(owner + scale) for scale in _SCALE_NAMES if owner + scale in entries]
        is_stored = is_e4m3(entries[name])
        if is_stored and place.field == "lm_head" and not head:
            raise CheckpointError(
                f"{entries[name].path}: tensor {name!r}: expected dtype {', '.join(FLOAT_DTYPES)} with "
                f"quantization 'fp8', got {_STORED}, which 'fp8-all' reads"
            )
        if not is_stored or place.field not in (*PRODUCTS, "lm_head"):
            if found:
                raise CheckpointError(
                    f"{found[0].path}: tensor {found[0].name!r}: expected {name!r} in {_STORED} and the "
                    f"weight of a layer's product, got {entries[name].dtype}"
                )
            continue
        if len(found) != 1:
            expected = " or ".join(owner + scale for scale in _SCALE_NAMES)
            raise CheckpointError(
                f"{entries[name].path}: tensor {name!r} ({_STORED}): expected {expected} beside it, got "
                f"{'both' if found else 'neither'}"
            )
        scales[name] = _stored_scale(found[0], place.shape, block)
    return scales


def _stored_scale(entry: TensorEntry, shape: tuple[int, ...], block: tuple[int, int] | None) -> StoredScale:
    rows, columns = shape
    if entry.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{entry.path}: tensor {entry.name!r}: expected dtype {', '.join(FLOAT_DTYPES)}, got "
            f"{entry.dtype}"
        )
    if entry.shape in ((), (1,), (rows,), (rows, 1)):
        return StoredScale(entry)
    expected = f"[], [1], [{rows}] or [{rows}, 1]"
    if block is not None:
        blocks = (-(-rows // block[0]), -(-columns // block[1]))
        if entry.shape == blocks:
            return StoredScale(entry, block)
        expected += f", or {list(blocks)} of blocks"
    raise CheckpointError(
        f"{entry.path}: tensor {entry.name!r}: expected shape {expected}, got {list(entry.shape)}"
    )


def read_quantized(
    entry: TensorEntry,
    written: QuantizedWeight,
    staging: torch.Tensor,
    scale: StoredScale | None,
    update: Update | None = None,
    first_row: int = 0,
    first_column: int = 0,
) -> None:
    """Read a weight, or a part of its rows and columns, into rows of e4m3, some rows at a time.

    Args:
        entry: a tensor [out, in] of a float dtype, or in e4m3 with `scale`.
        written: [out, in]; receives the rows.
        staging: see `read_tensor`; at least a row.
        update: of an adapter, added to the whole weight in fp32 before it is quantised.
        first_row, first_column: where the part begins whose size is `written`'s.

    Raises:
        CheckpointError: the file ends too early, or a value or scale is not finite; an adapter of a weight
            that is stored in e4m3, to which nothing can be added exactly.
    """
    rows, columns = written.shape
    item = ITEM_SIZES[entry.dtype]
    if update is not None:
        if scale is not None:
            raise CheckpointError(
                f"adapter: expected a model stored in {', '.join(FLOAT_DTYPES)}, got {entry.name!r} in "
                f"{entry.dtype}"
            )
        merged = torch.empty(rows, columns, dtype=torch.float32, device=written.values.device)
        update.read_merged(entry, merged, staging, first_row, first_column)
        _quantize(merged, written)
        return
    if scale is not None:
        factors = torch.empty(scale.entry.shape, dtype=torch.float32, device=written.scale.device)
        read_tensor(scale.entry, factors, staging)
        if scale.block is None:
            factors = factors.reshape(-1)
            written.scale.copy_(factors if len(factors) == 1 else factors[first_row : first_row + rows])
            read_bytes(entry, written.values.view(torch.uint8), staging, first_row, first_column)
            _check_finite(entry, written.values)
            return
    step = max(1, staging.numel() // (columns * item))
    for start in range(0, rows, step):
        part = written[start : start + step]
        at = first_row + start, first_column
        if scale is None:
            exact = torch.empty(part.shape, dtype=FLOAT_DTYPES[entry.dtype], device=part.values.device)
            read_tensor(entry, exact, staging, *at)
        else:
            stored = torch.empty_like(part.values)
            read_bytes(entry, stored.view(torch.uint8), staging, *at)
            _check_finite(entry, stored)
            exact = stored.float() * _spread(factors, scale.block, *at, part.shape)
        _quantize(exact, part)


def _quantize(exact: torch.Tensor, written: QuantizedWeight) -> None:
    # By the reference on every device: the same bits everywhere.
    values, scale = bbk.quantize_rows(exact, backend="reference")
    written.values.copy_(values)
    written.scale.copy_(scale)


def _spread(
    factors: torch.Tensor, block: tuple[int, int], first_row: int, first_column: int, shape: tuple[int, ...]
) -> torch.Tensor:
    """The scale of each element of some rows, from those of blocks."""
    device = factors.device
    row = (torch.arange(shape[0], device=device) + first_row) // block[0]
    column = (torch.arange(shape[1], device=device) + first_column) // block[1]
    return factors[row][:, column]


def _check_finite(entry: TensorEntry, values: torch.Tensor) -> None:
    if ((values.view(torch.uint8) & 0x7F) == 0x7F).any():
        raise CheckpointError(
            f"{entry.path}: tensor {entry.name!r} ({entry.dtype}): expected finite values, got NaN "
            "(corrupted)"
        )
