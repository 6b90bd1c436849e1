"""From a HuggingFace model folder or hub id to weights in memory, everything checked before it is allocated.

Only JSON and safetensors are read: no code of a model repository runs, nothing is unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from blockbatch.models import dream, fast_dllm_v2, foreign_tensors, llada, lora, sdar, stored_fp8, tied_head
from blockbatch.models.adapters import ADAPTER_CONFIG, refuse_adapter
from blockbatch.models.config_keys import checked
from blockbatch.models.folders import hint
from blockbatch.models.json_file import read_json, read_optional_json
from blockbatch.models.quantized_weights import QuantizedWeight
from blockbatch.models.relatives import check_model
from blockbatch.models.safetensors_file import (
    FLOAT_DTYPES,
    STAGING_BYTES,
    TensorEntry,
    read_header,
    read_tensor,
)
from blockbatch.models.spec import CheckpointError, ModelSpec
from blockbatch.models.token_keys import check_generation_config
from blockbatch.models.weights import Destination, TransformerWeights, allocate
from blockbatch.parallel.shards import Shard

__all__ = ["CheckpointError", "load_weights", "read_config", "read_json", "read_spec", "resolve_folder"]

# By model_type in config.json.
SPEC_READERS = {
    "llada": llada.read_spec,
    "Dream": dream.read_spec,
    "sdar": sdar.read_spec,
    "Fast_dLLM_Qwen": fast_dllm_v2.read_spec,
}
# By ModelSpec.family.
TENSOR_MAPS = {
    "llada": llada.tensor_map,
    "dream": dream.tensor_map,
    "sdar": sdar.tensor_map,
    "fast_dllm_v2": fast_dllm_v2.tensor_map,
}

# What says whether a model can be decoded at all, fetched before gigabytes of weights are.
_FIRST_FILES = ("config.json", "generation_config.json", ADAPTER_CONFIG)
HUB_FILES = (
    *_FIRST_FILES,  # an adapter's, so that an adapter is known as one
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
# Tables that some exporters store although they follow from config.json.
HARMLESS_BUFFERS = re.compile(
    r"(model\.)?rotary_emb\.inv_freq"
    r"|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    r"|model\.transformer\.blocks\.\d+\.rotary_emb\.inv_freq"
)


def resolve_folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The local folder of a model.

    Args:
        name_or_path: a folder, or a hub id "owner/name": looked up in the HuggingFace cache first and fetched
            (configuration, tokenizer and safetensors files only) if it is not there in full.
        revision: branch, tag or commit on the hub; only for a hub id.

    Raises:
        FileNotFoundError: neither a folder nor a hub id.
        CheckpointError: the hub has no such model or cannot be reached, and the cache does not hold it; or it
            is none that can be decoded, which is seen before its weights are fetched.
        ValueError: `revision` with a local folder.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision must be None for a local folder, got {revision!r} with {folder}")
        return folder
    if folder.exists():
        raise FileNotFoundError(f"model: expected a folder, got the file {folder}")
    hub_id = str(name_or_path)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", hub_id):
        raise FileNotFoundError(
            f"model: expected an existing folder or a hub id 'owner/name', got {hub_id!r}"
        )
    return _from_hub(hub_id, revision)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `folder`/config.json, in a folder of one whole model.

    generation_config.json is checked as well, since it may name tokens that no decode here knows.

    Raises:
        CheckpointError: the file is missing or not a JSON object; the folder holds an adapter; a key of
            generation_config.json is not supported.
    """
    folder = Path(folder)
    if folder.is_dir():
        refuse_adapter(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: expected a config.json, there is none{hint(folder)}")
    config = read_json(path)
    check_generation_config(read_optional_json(folder / "generation_config.json"), config)
    return config


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a config.json of any supported family.

    Raises:
        CheckpointError: a model that is not supported, a missing size, or a key that asks for what the
            forward pass does not do (`config_keys` says which).
    """
    model_type = check_model(config, tuple(SPEC_READERS))
    return SPEC_READERS[model_type](checked(config, model_type))


def stored_as(folder: Path, spec: ModelSpec, config: Mapping[str, Any]) -> str | None:
    """The quantisation that a folder's weights are stored in, as `load_model` takes it; None: in none.

    Raises:
        CheckpointError: they are quantised in a way that is not read; files as of `load_weights`.
    """
    if not stored_fp8.stored_fp8(config):
        return None
    entries, places = _read_headers(Path(folder)), TENSOR_MAPS[spec.family](spec)
    head = next((name for name, place in places.items() if place.field == "lm_head"), None)
    return "fp8-all" if head in entries and stored_fp8.is_e4m3(entries[head]) else "fp8"


def load_weights(
    folder: Path,
    spec: ModelSpec,
    device: torch.device | str,
    dtype: torch.dtype,
    adapter: lora.Adapter | None = None,
    shard: Shard | None = None,
    *,
    quantization: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> TransformerWeights:
    """Read the weights of a folder onto `device`, converted to `dtype`.

    Names, shapes, dtypes and file sizes are checked from the headers first. Then the shards are read one
    after the other, each tensor in small pieces into its rows of the fused weights. Host memory beyond the
    weights themselves: one staging buffer of at most 16 MiB. With an adapter, one weight at a time is held in
    float32 besides.

    Args:
        spec: of the whole model or, with `shard`, of its part.
        shard: the part that is read; None: all of it. Of an LM head that is stored beside the embedding that
            it is tied to, all is compared.
        adapter: a LoRA to be merged into the weights, see `blockbatch.models.lora`.
        quantization: None, or "fp8": the weights of the layers' products become e4m3 while they are read;
            "fp8-all": the LM head too, also one that is tied to the embedding.
        config: of a folder whose weights may be stored quantised (`stored_fp8` says how); then with a
            `quantization`. None: they may not.

    Raises:
        CheckpointError: no safetensors files; a missing, superfluous or wrongly shaped tensor; a dtype that
            is not F32, F16 or BF16; a truncated or corrupted file; an index at odds with its shards; values
            that are not finite in `dtype`; an LM head that differs from the embedding it is tied to; an
            adapter that does not fit.
        ValueError: `dtype` is not float32, bfloat16 or float16, or the quantisation is not known.
    """
    folder = Path(folder)
    tensor_map = TENSOR_MAPS[spec.family]
    whole = spec if shard is None else shard.spec
    places = tensor_map(whole)
    entries = _read_headers(folder)
    is_stored = config is not None and stored_fp8.stored_fp8(config)
    with_head = quantization == "fp8-all"
    scales = stored_fp8.take_scales(entries, places, config, head=with_head) if is_stored else {}
    foreign_tensors.check_storage(folder, entries, places.keys() - scales.keys())
    tied = tied_head.resolve(places, entries, whole, tensor_map)
    _check_tensors(folder, entries, places, scales)
    updates = lora.match(adapter, places, tied=spec.tie_embeddings) if adapter else {}
    lora.check_values(updates.values())
    weights = allocate(spec, device, dtype, None if shard is None else shard.vocabulary, quantization)
    reads = list(places.items())
    if with_head and spec.tie_embeddings:
        reads.append(tied_head.from_embedding(places, whole))
    if shard is not None:
        reads = [(name, shard.cut(place)) for name, place in reads]
    # Four bytes an element hold any stored dtype; some weights are read by whole rows.
    largest = 4 * max(place.rows(weights).numel() for _, place in reads)
    longest = 4 * max(place.shape[-1] for _, place in reads)
    staging = torch.empty(max(longest, min(STAGING_BYTES, largest)), dtype=torch.uint8, device="cpu")
    for name, place in sorted(reads, key=lambda read: (str(entries[read[0]].path), entries[read[0]].begin)):
        entry, update = entries[name], updates.get(name)
        written, part = place.rows(weights), (place.first_row, place.first_column)
        if isinstance(written, QuantizedWeight):
            stored_fp8.read_quantized(entry, written, staging, scales.get(entry.name), update, *part)
        elif update is not None:
            update.read_merged(entry, written, staging, *part)
        else:
            read_tensor(entry, written, staging, *part)
    if tied is not None:
        tied_head.compare(*tied, spec.vocab_size, staging)
    return weights


def _from_hub(hub_id: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(f"model {hub_id!r}: a hub id needs the package huggingface_hub") from None
    # The patterns' "*" also matches "/", but nothing in a subfolder belongs to the model itself.
    options = {"revision": revision, "allow_patterns": list(HUB_FILES), "ignore_patterns": ["*/*"]}
    # What these calls raise depends on the version and the transport below it (HTTP, offline mode, file
    # system), so every failure counts alike: the model could not be had from there. Newer versions refuse a
    # cached folder for lack of any file that the repository lists, and name the folder.
    cached = None
    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True, **options))
        if _is_complete(folder):
            return folder
    except Exception as error:
        cached = _named_folder(error)
    try:
        first = Path(snapshot_download(hub_id, **options | {"allow_patterns": list(_FIRST_FILES)}))
        if (first / "config.json").is_file() or (first / ADAPTER_CONFIG).is_file():
            read_spec(read_config(first))
        return Path(snapshot_download(hub_id, **options))
    except CheckpointError:
        raise  # it is there, and no model that can be decoded
    except Exception as error:
        for folder in (cached, _named_folder(error)):
            if folder is not None and _is_complete(folder):
                return folder
        at = "" if revision is None else f" at revision {revision!r}"
        raise CheckpointError(
            f"model {hub_id!r}{at}: expected it in the HuggingFace cache or on the hub; it is not cached in "
            f"full, and fetching it failed: {error}"
        ) from error


def _named_folder(error: Exception) -> Path | None:
    """The cached folder that `huggingface_hub.errors.IncompleteSnapshotError` (from 1.22 on) names."""
    path = getattr(error, "snapshot_path", None)
    return Path(path) if isinstance(path, (str, Path)) and path else None


def _is_complete(folder: Path) -> bool:
    """Whether a model can be loaded from `folder`, or is known not to be one."""
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        return True
    try:
        _shards(folder)
    except CheckpointError:
        return False

    def holds(*names: str) -> bool:
        return all((folder / name).is_file() for name in names)

    return holds("config.json") and (
        holds("tokenizer.json") or holds("vocab.json", "merges.txt", "tokenizer_config.json")
    )


def _shards(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a folder and, where there is an index, the file name of each tensor."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single], None
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) > 1:
        raise CheckpointError(
            f"{folder}: expected one safetensors index, got {_listed(p.name for p in indices)}"
        )
    if indices:
        weight_map = read_json(indices[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(
                f"{indices[0]}: expected weight_map {{tensor name: file name}}, got {weight_map!r:.80}"
            )
        names = sorted(set(weight_map.values()))
        for name in names:
            # An index must not lead out of its folder.
            if not re.fullmatch(r"[\w.-]+\.safetensors", name):
                raise CheckpointError(
                    f"{indices[0]}: expected names of safetensors files in the folder, got {name!r}"
                )
            if not (folder / name).is_file():
                raise CheckpointError(f"{indices[0]}: names the file {name}, which is missing")
        if not names:
            raise CheckpointError(f"{indices[0]}: expected at least one tensor in weight_map, got none")
        return [folder / name for name in names], weight_map
    if len(files) == 1:
        return files, None
    if files:
        raise CheckpointError(
            f"{folder}: expected model.safetensors, or an index beside several files, got "
            f"{_listed(path.name for path in files)}"
        )
    pickled = sorted(
        path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if pickled:
        raise CheckpointError(
            f"{folder}: expected weights as safetensors files, got only pickled ones (never opened): "
            + _listed(pickled)
        )
    raise CheckpointError(f"{folder}: expected weights as *.safetensors files, there are none{hint(folder)}")


def _read_headers(folder: Path) -> dict[str, TensorEntry]:
    shards, weight_map = _shards(folder)
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, entry in read_header(shard).items():
            if name in entries:
                raise CheckpointError(
                    f"tensor {name!r}: expected once, got it in {entries[name].path} and {shard}"
                )
            entries[name] = entry
    if weight_map is not None:
        for name, file in weight_map.items():
            if name not in entries or entries[name].path.name != file:
                came = f"it is in {entries[name].path.name}" if name in entries else "no file holds it"
                raise CheckpointError(f"{folder}: the index places tensor {name!r} in {file}, but {came}")
        unlisted = entries.keys() - weight_map.keys()
        if unlisted:
            raise CheckpointError(
                f"{folder}: superfluous tensors that the index does not name: {_listed(unlisted)}"
            )
    return entries


def _check_tensors(
    folder: Path,
    entries: dict[str, TensorEntry],
    places: dict[str, Destination],
    scales: Mapping[str, stored_fp8.StoredScale],
) -> None:
    missing = places.keys() - entries.keys()
    if missing:
        raise CheckpointError(f"{folder}: missing tensors that config.json asks for: {_listed(missing)}")
    extra = {name for name in entries.keys() - places.keys() if not HARMLESS_BUFFERS.fullmatch(name)}
    if extra:
        raise CheckpointError(
            f"{folder}: superfluous tensors that config.json does not ask for: {_listed(extra)}"
            + foreign_tensors.kind_of(extra)
        )
    for name, place in places.items():
        entry = entries[name]
        if entry.shape != place.shape:
            raise CheckpointError(
                f"{entry.path}: tensor {name!r}: expected shape {list(place.shape)}, got {list(entry.shape)}"
            )
        if entry.dtype not in FLOAT_DTYPES and name not in scales:
            raise CheckpointError(
                f"{entry.path}: tensor {name!r}: expected dtype {', '.join(FLOAT_DTYPES)}, got {entry.dtype}"
            )


def _listed(names: Any) -> str:
    names = sorted(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
