"""Adapters (LoRA and its like) in a model folder: recognised by their files and refused by name.

A LoRA in a folder of its own is merged by `lora.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from blockbatch.models.json_file import read_optional_json
from blockbatch.models.spec import CheckpointError

ADAPTER_CONFIG = "adapter_config.json"
# adapter_model.safetensors, adapters.npz, pytorch_lora_weights.safetensors, non_lora_trainables.bin ...
_FILES = re.compile(r".*(adapter|lora).*\.(safetensors|bin|pt|pth|npz|ckpt)(\.index\.json)?", re.IGNORECASE)
_TENSORS = re.compile(
    r".*(\blora_|\.base_layer\.|\bhada_w|\blokr_w|\bia3_|\bvera_lambda|modules_to_save\.).*"
)
_MERGE = (
    "load_model(MODEL, adapter=FOLDER) merges a LoRA of PEFT that has a folder of its own (--adapter "
    "FOLDER); merge others with peft (PeftModel.merge_and_unload, save_pretrained) and load that folder"
)


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder that is an adapter, or holds one beside full weights, which would be left out.

    Raises:
        CheckpointError: naming the file, the kind of adapter and its model, as far as it says them.
    """
    files = sorted(path.name for path in folder.iterdir() if _FILES.fullmatch(path.name))
    if (folder / ADAPTER_CONFIG).is_file():
        files.insert(0, ADAPTER_CONFIG)
    if not files:
        return
    settings = read_optional_json(folder / ADAPTER_CONFIG)
    kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
    name = f"a {kind} adapter" if isinstance(kind, str) else "an adapter"
    of = f" of {base!r}" if isinstance(base, str) and base else ""
    if (folder / "config.json").is_file():
        state = f"holds {name}{of} beside a model: if that has it merged already, remove the adapter's files"
    else:
        state = f"is {name}{of} and no model: expected a config.json and weights"
    raise CheckpointError(f"{folder}: {state} (got {', '.join(files)}); {_MERGE}")


def refuse_adapter_tensors(place: Path, names: Iterable[str]) -> None:
    """Refuse weights that hold an adapter which was not merged.

    Args:
        place: the file or folder of the tensors, for messages.
        names: of the tensors.
    """
    found = sorted(name for name in names if _TENSORS.fullmatch(name))
    if found:
        raise CheckpointError(
            f"{place}: holds tensors of an adapter ({found[0]} and {len(found) - 1} more); {_MERGE}"
        )
