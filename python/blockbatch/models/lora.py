"""LoRA (arXiv 2106.09685) as PEFT saves it, merged into the weights of its model while they are read.

The merged weight is W + scale * (B @ A), computed in float32 from what the files hold and rounded to the
model's dtype once. scale is alpha / r, with `use_rslora` (arXiv 2312.03732) alpha / sqrt(r). Settings that
make the result another one (DoRA, biases, trained modules, ...) are refused by name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blockbatch.models.adapters import ADAPTER_CONFIG
from blockbatch.models.json_file import read_json
from blockbatch.models.safetensors_file import (
    FLOAT_DTYPES,
    STAGING_BYTES,
    TensorEntry,
    read_header,
    read_tensor,
)
from blockbatch.models.spec import CheckpointError
from blockbatch.models.weights import Destination
from blockbatch.values import as_float

WEIGHTS = "adapter_model.safetensors"
# What says where an adapter comes from or how it is trained, and what is read below.
_KNOWN = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "alpha_pattern", "revision", "runtime_config", "target_modules",
    "exclude_modules", "task_type", "use_rslora", "init_lora_weights",
}  # fmt: skip
# Of other keys, values that change nothing.
_OFF = (None, False, "none", [], {})
# Ways to begin training that leave the model's own weights as they are; PiSSA, OLoRA and others change them.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight"
    r"|base_model\.model\.(?P<table>.+)\.lora_embedding_(?P<part>[AB])"
)


@dataclass(frozen=True)
class Adapter:
    """A LoRA whose settings are checked and whose file is known.

    Attributes:
        folder: of its files.
        base: the model that it says to be of, which only messages tell.
        rank, alpha, rslora: see the module; `rank_pattern` and `alpha_pattern` hold others by module.
        targets: modules that it changes: names, ends of names, or one regular expression.
        excluded: modules that `targets` does not mean; None: none.
        entries: its tensors by name.
    """

    folder: Path
    base: str | None
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...] | None
    entries: Mapping[str, TensorEntry]

    def changes(self, module: str) -> bool:
        """Whether the settings name a module."""
        return _names(self.targets, module) and not (self.excluded and _names(self.excluded, module))

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_pattern_of(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        alpha = self.alpha_pattern.get(_pattern_of(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class Update:
    """What is added to one weight [rows, columns]: scale * (B @ A).

    Attributes:
        a, b: tensors of the file: [r, columns] and [rows, r]; of an embedding [r, rows] and [columns, r],
            whose product is turned over.
        is_table: whether they are those of an embedding.
    """

    a: TensorEntry
    b: TensorEntry
    scale: float
    is_table: bool = False

    def read_merged(
        self,
        entry: TensorEntry,
        written: torch.Tensor,
        staging: torch.Tensor,
        first_row: int = 0,
        first_column: int = 0,
    ) -> None:
        """Reads a weight with this added, rounded once.

        Beside `written` one float32 copy of it is held, on its device.

        Args:
            entry: the weight's tensor, of which `written` is the first rows, or a part.
            written: [rows, columns], contiguous, any device and float dtype.
            staging, first_row, first_column: see `safetensors_file.read_tensor`.

        Raises:
            CheckpointError: a file ends too early, or a value is not finite.
        """
        a, b = (_read(factor, written.device, staging) for factor in (self.a, self.b))
        left, right = (a.T, b.T) if self.is_table else (b, a)
        left = left[first_row : first_row + written.shape[0]]
        right = right[:, first_column : first_column + written.shape[1]]
        merged = torch.mm(left, right).mul_(self.scale)
        read_tensor(entry, merged, staging, first_row, first_column, add=True)
        written.copy_(merged)
        if not torch.stack(torch.aminmax(written)).isfinite().all():
            dtype = str(written.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{self.a.path}: expected finite values of {entry.name!r} in {dtype} with the adapter added, "
                "got NaN or infinity (out of that dtype's range)"
            )


def read_adapter(folder: str | os.PathLike) -> Adapter:
    """The LoRA of a folder: its settings, and the header of its file.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: a file is missing or damaged, or a setting is not supported, named with what came.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"adapter: expected a folder, got {folder!r}")
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"adapter: expected a folder with {ADAPTER_CONFIG}, got {str(folder)!r}")
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: expected an adapter's {ADAPTER_CONFIG}, there is none")
    config = read_json(path)
    _check_config(path, config)
    if not (folder / WEIGHTS).is_file():
        others = sorted(file.name for file in folder.iterdir() if file.name.startswith("adapter_model"))
        came = f"got {', '.join(others)} (pickled files are never opened)" if others else "there is none"
        raise CheckpointError(f"{folder}: expected the adapter's tensors as {WEIGHTS}, {came}")
    base = config.get("base_model_name_or_path")
    return Adapter(
        folder=folder,
        base=base if isinstance(base, str) and base else None,
        rank=_rank(path, "r", config.get("r")),
        alpha=_alpha(path, "lora_alpha", config.get("lora_alpha")),
        rslora=_flag(path, "use_rslora", config),
        rank_pattern=_pattern(path, "rank_pattern", config, _rank),
        alpha_pattern=_pattern(path, "alpha_pattern", config, _alpha),
        targets=_modules(path, "target_modules", config),
        excluded=_modules(path, "exclude_modules", config) if config.get("exclude_modules") else None,
        entries=read_header(folder / WEIGHTS),
    )


def match(adapter: Adapter, places: Mapping[str, Destination], *, tied: bool) -> dict[str, Update]:
    """What is added to which tensor of a checkpoint, by its name there; checked from the headers alone.

    Args:
        places: of the tensors that the checkpoint holds.
        tied: whether the embedding is the LM head, too.

    Raises:
        CheckpointError: a tensor of the adapter belongs to no weight, or has another shape or dtype; a weight
            that it changes by its settings lacks tensors, or the other way round.
    """
    path = adapter.folder / WEIGHTS
    of = f" (made for {adapter.base!r})" if adapter.base else ""
    modules = {
        name.removesuffix(".weight"): name
        for name, place in places.items()
        if name.endswith(".weight") and len(place.shape) == 2
    }
    factors: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in adapter.entries.items():
        found = _TENSOR.fullmatch(name)
        module = found and (found["module"] or found["table"])
        is_table = module in modules and places[modules[module]].field == "embedding"
        if not found or module not in modules or is_table == (found["table"] is None):
            raise CheckpointError(
                f"{path}: expected tensors of weights that the model has (such as base_model.model."
                f"{next(iter(modules))}.lora_A.weight), got {name!r}{of}"
            )
        if is_table and tied:
            raise CheckpointError(
                f"{path}: expected no change of an embedding that is the LM head, too, got {name!r}{of}"
            )
        factors.setdefault(module, {})[found["factor"] or found["part"]] = entry
    named = {
        module
        for module in modules
        if adapter.changes(module) and _is_target(adapter, places, modules[module])
    }
    _check_named(path, named, factors, of)
    return {
        modules[module]: _update(adapter, module, places[modules[module]], pair, of)
        for module, pair in factors.items()
    }


def check_values(updates: Collection[Update]) -> None:
    """Raises CheckpointError if a value of an adapter is NaN or infinite; holds one tensor at a time."""
    staging = torch.empty(STAGING_BYTES if updates else 0, dtype=torch.uint8, device="cpu")
    for update in updates:
        for entry in (update.a, update.b):
            _read(entry, torch.device("cpu"), staging)


def _read(entry: TensorEntry, device: torch.device, staging: torch.Tensor) -> torch.Tensor:
    values = torch.empty(entry.shape, dtype=torch.float32, device=device)
    read_tensor(entry, values, staging)
    return values


def _update(
    adapter: Adapter, module: str, place: Destination, pair: Mapping[str, TensorEntry], of: str
) -> Update:
    rank, is_table = adapter.rank_of(module), place.field == "embedding"
    rows, columns = place.shape
    shapes = (
        {"A": (rank, rows), "B": (columns, rank)} if is_table else {"A": (rank, columns), "B": (rows, rank)}
    )
    for factor, shape in shapes.items():
        entry = pair.get(factor)
        if entry is None:
            other = next(iter(pair.values()))
            raise CheckpointError(
                f"{other.path}: expected lora_A and lora_B of {module}, got {other.name!r} alone"
            )
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name!r}: expected shape {list(shape)}, got "
                f"{list(entry.shape)}{of}"
            )
        if entry.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name!r}: expected dtype {', '.join(FLOAT_DTYPES)}, got "
                f"{entry.dtype}"
            )
    return Update(pair["A"], pair["B"], adapter.scale_of(module), is_table)


def _is_target(adapter: Adapter, places: Mapping[str, Destination], name: str) -> bool:
    """ "all-linear" leaves out the embedding and the head."""
    return adapter.targets != "all-linear" or places[name].layer is not None


def _check_named(path: Path, named: Collection[str], factors: Mapping[str, Any], of: str) -> None:
    if unnamed := sorted(factors.keys() - named):
        raise CheckpointError(
            f"{path}: expected tensors of the modules that target_modules names, got some of {unnamed[0]}{of}"
        )
    if lacking := sorted(named - factors.keys()):
        raise CheckpointError(
            f"{path}: expected tensors of every module that target_modules names, got none of {lacking[0]}"
            f"{f' and {len(lacking) - 1} more' if len(lacking) > 1 else ''}{of}"
        )
    if not named:
        raise CheckpointError(f"{path}: expected target_modules that the model has, got none of them{of}")


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type: expected 'LORA', got {kind!r}")
    init = config.get("init_lora_weights")
    if not any(init is allowed or (isinstance(init, str) and init == allowed) for allowed in _INITS):
        raise CheckpointError(
            f"{path}: init_lora_weights: expected true, false, gaussian, eva or orthogonal, got {init!r}, "
            "which may have changed the model's own weights: convert the adapter to a plain LoRA, or merge "
            "it with peft"
        )
    for key, value in config.items():
        if key in _KNOWN or any(value is off or (value == off and type(value) is type(off)) for off in _OFF):
            continue
        raise CheckpointError(
            f"{path}: {key}: expected it to be off, got {value!r:.80}: only a plain LoRA is merged here; "
            "merge this one with peft (PeftModel.merge_and_unload, save_pretrained) and load that folder"
        )


def _rank(path: Path, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: {key}: expected an integer of at least 1, got {value!r}")
    return value


def _alpha(path: Path, key: str, value: Any) -> float:
    number = as_float(value)
    if number is None or not math.isfinite(number):
        raise CheckpointError(f"{path}: {key}: expected a number, got {value!r}")
    return number


def _flag(path: Path, key: str, config: Mapping[str, Any]) -> bool:
    value = config.get(key) or False
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: {key}: expected true or false, got {value!r}")
    return value


def _pattern(path: Path, key: str, config: Mapping[str, Any], read: Any) -> dict[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: {key}: expected an object, got {found!r:.80}")
    for name in found:
        _check_expression(path, key, name)
    return {name: read(path, f"{key}[{name!r}]", value) for name, value in found.items()}


def _modules(path: Path, key: str, config: Mapping[str, Any]) -> str | tuple[str, ...]:
    found = config.get(key)
    if isinstance(found, str) and found:
        _check_expression(path, key, found)
        return found
    if isinstance(found, list) and found and all(isinstance(name, str) for name in found):
        return tuple(found)
    raise CheckpointError(
        f"{path}: {key}: expected names of modules or a regular expression, got {found!r:.80}"
    )


def _check_expression(path: Path, key: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise CheckpointError(
            f"{path}: {key}: expected a regular expression, got {expression!r} ({error})"
        ) from None


def _names(wanted: str | tuple[str, ...], module: str) -> bool:
    """As PEFT reads `target_modules`: an expression fits the whole name, a name also the end of one."""
    if wanted == "all-linear":
        return True
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def _pattern_of(patterns: Mapping[str, Any], module: str) -> str | None:
    """The first key that fits the end of a module's name, as PEFT has it."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
