"""What block-causal checkpoints leave out of config.json: MASK, the ends of a text, the block size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from blockbatch.models import fast_dllm_v2, sdar
from blockbatch.models.checkpoint import read_json
from blockbatch.models.spec import CheckpointError, ModelSpec, read_token_ids
from blockbatch.models.tokenizer import Tokenizer

_MASK_TOKENS = {"sdar": sdar.MASK_TOKEN, "fast_dllm_v2": fast_dllm_v2.MASK_TOKEN}


def complete(
    spec: ModelSpec,
    config: Mapping[str, Any],
    folder: Path,
    name: str,
    tokenizer: Tokenizer | None,
    mask_token_id: int | None = None,
) -> ModelSpec:
    """`spec` with what other files of the folder say; that of another family as it is.

    MASK is the caller's, else that of config.json, else of generation_config.json, else the tokenizer's
    token. Ends of a text are those of config.json and, for SDAR, of generation_config.json. The block size of
    an SDAR model without the key is the one in its name (`-b32`).

    Args:
        name: folder or hub id, as the caller gave it.
        mask_token_id: given by the caller; None: not.

    Raises:
        CheckpointError: an id or a size is out of range.
        ValueError: `mask_token_id` for a family whose config.json always names it, or out of range.
    """
    if spec.block_size is None:
        if mask_token_id is not None:
            raise ValueError(
                f"mask_token_id: expected None, since config.json of {spec.family} names it, got "
                f"{mask_token_id!r}"
            )
        return spec
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    changes: dict[str, Any] = {"mask_token_id": _mask(spec, generation, tokenizer, mask_token_id)}
    if spec.family == "sdar":
        more = read_token_ids(generation, "eos_token_id", source="generation_config.json")
        changes["eos_token_ids"] = tuple(dict.fromkeys((*spec.eos_token_ids, *more)))
        if config.get("block_size") is None:
            changes["block_size"] = _size_in(name) or _size_in(folder.name) or spec.block_size
    return replace(spec, **changes)


def end_ids(spec: ModelSpec, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The ids that end a text of the model, unless a config names others.

    Fast-dLLM v2 stops at the one of its config.json alone, as published; all others also at what the
    tokenizer knows as an end.
    """
    if tokenizer is None or (spec.family == "fast_dllm_v2" and spec.eos_token_ids):
        return spec.eos_token_ids
    return tokenizer.eos_token_ids(spec)


def _mask(
    spec: ModelSpec, generation: Mapping[str, Any], tokenizer: Tokenizer | None, given: int | None
) -> int | None:
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < spec.vocab_size:
            raise ValueError(f"mask_token_id: expected an id from 0 to {spec.vocab_size - 1}, got {given!r}")
        return given
    if spec.mask_token_id is not None:
        return spec.mask_token_id
    ids = read_token_ids(generation, "mask_token_id", source="generation_config.json")
    if ids:
        return ids[0]
    if tokenizer is None:
        return None
    token = _MASK_TOKENS[spec.family]
    found = tokenizer.token_to_id(token)
    if found is None:
        raise CheckpointError(
            f"mask_token_id: expected it in config.json, or the token {token!r} in the tokenizer, got neither"
        )
    return found


def _size_in(name: str) -> int | None:
    """The block size that a name such as SDAR-8B-Chat-b32 ends in."""
    found = re.search(r"-b(\d+)/?$", name)
    return int(found[1]) if found else None
