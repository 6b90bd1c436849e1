"""Tensors that do not fit a config.json: what they say of adapters, quantised weights and other models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from blockbatch.models.adapters import refuse_adapter_tensors
from blockbatch.models.safetensors_file import FLOAT_DTYPES, TensorEntry, read_header
from blockbatch.models.spec import CheckpointError

# Beside a quantised weight: its scales, zero points, packed values, tables.
_QUANTISED = re.compile(
    r".*[._](qweight|qzeros|g_idx|scales|biases|weight_scale(_inv|_2|_2nd)?|weight_scales?|input_scale|"
    r"weight_packed|weight_shape|weight_zero_point|absmax|quant_map|quant_state(\..*)?|nested_absmax|"
    r"nested_quant_map|SCB|weight_format|zero_point)"
)
_KINDS = (
    (re.compile(r".*\bexperts?\.|.*\bshared_experts?\.|.*\brouter\."), "a mixture of experts, not supported"),
    (
        re.compile(r".*(vision_tower|vision_model|\bvisual\.|mm_projector|multi_modal|image_newline)"),
        "a model that reads images, not supported",
    ),
    (re.compile(r".*\b[qk]_norm\."), "norms of queries and keys, which this family does not have"),
    (
        re.compile(r".*(_orig_mod\.|^module\.)"),
        "names that torch.compile or data parallelism prefixed: save again",
    ),
)


def check_storage(folder: Path, entries: Mapping[str, TensorEntry], wanted: Iterable[str]) -> None:
    """Refuse adapters that were not merged, and weights that are stored quantised.

    Raises:
        CheckpointError: naming the file, a tensor, what was expected and what came.
    """
    refuse_adapter_tensors(folder, entries)
    used = {entry.path for entry in entries.values()}
    for path in sorted(set(folder.glob("*.safetensors")) - used):
        refuse_adapter_tensors(path, _names_in(path))
    wanted = set(wanted)
    quantised = [
        entry
        for name, entry in entries.items()
        if name in wanted and entry.dtype not in (*FLOAT_DTYPES, "F64")
    ]
    marks = sorted(name for name in entries if name not in wanted and _QUANTISED.fullmatch(name))
    if not quantised and not marks:
        return
    advice = "quantised weights are not read: load the F32, F16 or BF16 checkpoint that they were made from"
    if quantised:
        first = min(quantised, key=lambda entry: entry.name)
        beside = f", with {marks[0]} beside it" if marks else ""
        raise CheckpointError(
            f"{first.path}: tensor {first.name!r}: expected dtype {', '.join(FLOAT_DTYPES)}, got "
            f"{first.dtype}{beside}: {advice}"
        )
    raise CheckpointError(
        f"{folder}: expected plain weights, got {marks[0]} and {len(marks) - 1} more: {advice}"
    )


def _names_in(path: Path) -> Iterable[str]:
    """The tensors of a file that no index names; none of one that cannot be read, since nobody needs it."""
    try:
        return read_header(path)
    except CheckpointError:
        return ()


def kind_of(names: Iterable[str]) -> str:
    """What superfluous tensors tell of their model, as an end of a message; empty where they tell nothing."""
    names = sorted(names)
    for pattern, kind in _KINDS:
        if any(pattern.match(name) for name in names):
            return f" ({kind})"
    return ""
