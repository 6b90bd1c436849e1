"""Prompts in every form that callers hand over, as token ids, and what makes one impossible to decode."""

from __future__ import annotations

from collections.abc import Sequence

from blockbatch.config import DecodeConfig
from blockbatch.decoding.block_diffusion import BlockMethod
from blockbatch.decoding.choice import method_for
from blockbatch.models.model import Model
from blockbatch.models.spec import is_block_causal
from blockbatch.texts import check_text
from blockbatch.values import as_int, as_list

# Arrays of numpy and tensors of torch count as sequences of ids.
Prompt = str | Sequence[int]


def read_prompts(model: Model, prompt: Prompt | Sequence[Prompt]) -> tuple[list[list[int]], bool]:
    """Token ids of every prompt, and whether one prompt came rather than a list of them.

    A sequence of integers is one prompt, anything else a list of prompts, an empty sequence a list of none.

    Raises:
        ValueError, TypeError: naming the prompt, what was expected and what came.
    """
    if isinstance(prompt, str):
        return [encode_prompt(model, prompt, "prompt")], True
    items = as_list(prompt)
    if items is None:
        raise TypeError(f"prompt: expected text, token ids or a list of either, got {type(prompt).__name__}")
    ids = [as_int(item) for item in items]
    if items and None not in ids:
        return [ids], True
    return [_read(model, item, f"prompt[{index}]") for index, item in enumerate(items)], False


def encode_prompt(model: Model, text: str, name: str = "prompt", *, add_bos: bool | None = None) -> list[int]:
    """Token ids of a prompt that is text.

    Args:
        name: what messages call it: an argument, or a file with its line.
        add_bos: whether the beginning-of-sequence token stands in front, once; None: as the tokenizer's own
            settings say (`add_bos_token` in tokenizer_config.json).

    Raises:
        ValueError: the model has no tokenizer, the text holds half a character, or there is no such token.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{name}: expected token ids, since the model's folder has no tokenizer; got text")
    check_text(text, name)
    ids = tokenizer.encode(text)
    if add_bos is None:
        add_bos = tokenizer.add_bos
    if not add_bos:
        return ids
    bos = tokenizer.bos_token_id
    if bos is None:
        raise ValueError("add_bos_token: expected a tokenizer with a known bos_token, got one without")
    return ids if ids[:1] == [bos] else [bos, *ids]


def _read(model: Model, prompt: Prompt, name: str) -> list[int]:
    if isinstance(prompt, str):
        return encode_prompt(model, prompt, name)
    items = as_list(prompt)
    ids = None if items is None else [as_int(item) for item in items]
    if ids is None or None in ids:
        raise TypeError(f"{name}: expected text or token ids, got {prompt!r:.80}")
    return ids


def check_prompt(model: Model, ids: list[int], config: DecodeConfig, name: str) -> None:
    """Raises ValueError if a prompt's ids cannot be decoded; `name` is what the message calls it."""
    spec = model.spec
    method = method_for(model, config.for_model(spec))
    if not ids and spec.prediction_offset:
        raise ValueError(f"{name}: expected at least one token for {spec.family}, got an empty prompt")
    for position, token in enumerate(ids):
        if not 0 <= token < spec.vocab_size:
            raise ValueError(
                f"{name}: expected ids from 0 to {spec.vocab_size - 1}, got {token} at {position}"
            )
        if token == spec.mask_token_id:
            raise ValueError(f"{name}: expected no MASK token (id {token}), got one at position {position}")
    if is_block_causal(spec):
        _check_blocks(ids, method, spec.max_length, name)
        return
    canvas = len(ids) + config.gen_length
    if canvas > spec.max_length:
        raise ValueError(
            f"{name}: expected prompt and gen_length to fit in {spec.max_length} positions, got {len(ids)} + "
            f"{config.gen_length} = {canvas}"
        )


def _check_blocks(ids: list[int], method: BlockMethod, most: int, name: str) -> None:
    """That a text fits in the model's positions: its first block where it may grow, else all of it."""
    size = method.block_size
    positions = (len(ids) // size + 1) * size if method.grow else method.positions(len(ids))
    if positions > most:
        raise ValueError(
            f"{name}: expected prompt and gen_length in whole blocks of {size} to fit in {most} positions, "
            f"got {len(ids)} + {method.gen_length}, which take {positions}"
        )
