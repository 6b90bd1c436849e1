"""Prompts in every form that callers hand over, as token ids, and what makes one impossible to decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from blockbatch.config import DecodeConfig
from blockbatch.decoding.block_diffusion import BlockMethod
from blockbatch.decoding.choice import method_for
from blockbatch.models.model import Model
from blockbatch.models.spec import is_block_causal
from blockbatch.texts import check_text
from blockbatch.values import as_int, as_list

# Arrays of numpy and tensors of torch count as sequences of ids.
Prompt = str | Sequence[int]
Encoded = TypeVar("Encoded")


def read_prompts(model: Model, prompt: Prompt | Sequence[Prompt]) -> tuple[list[list[int]], bool]:
    """Token ids of every prompt, and whether one prompt came rather than a list of them.

    A sequence of integers is one prompt, anything else a list of prompts, an empty sequence a list of none.

    Raises:
        ValueError, TypeError: naming the prompt, what was expected and what came.
    """
    return read_each(prompt, "prompt", lambda text, name: encode_prompt(model, text, name))


def read_each(
    given: Prompt | Sequence[Prompt], name: str, encode: Callable[[str, str], Encoded]
) -> tuple[list[Encoded | list[int]], bool]:
    """The same for an argument of any name.

    Args:
        encode: what becomes of a text and of its name.
    """
    if isinstance(given, str):
        return [encode(given, name)], True
    items = as_list(given)
    if items is None:
        raise TypeError(f"{name}: expected text, token ids or a list of either, got {type(given).__name__}")
    ids = [as_int(item) for item in items]
    if items and None not in ids:
        return [ids], True
    return [_read(item, f"{name}[{index}]", encode) for index, item in enumerate(items)], False


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


def _read(given: Prompt, name: str, encode: Callable[[str, str], Encoded]) -> Encoded | list[int]:
    if isinstance(given, str):
        return encode(given, name)
    items = as_list(given)
    ids = None if items is None else [as_int(item) for item in items]
    if ids is None or None in ids:
        raise TypeError(f"{name}: expected text or token ids, got {given!r:.80}")
    return ids


def check_prompt(model: Model, ids: list[int], config: DecodeConfig, name: str) -> None:
    """Raises ValueError if a prompt's ids cannot be decoded; `name` is what the message calls it."""
    spec = model.spec
    method = method_for(model, config.for_model(spec))
    if not ids and spec.prediction_offset:
        raise ValueError(f"{name}: expected at least one token for {spec.family}, got an empty prompt")
    check_ids(ids, spec.vocab_size, name)
    if spec.mask_token_id in ids:
        raise ValueError(
            f"{name}: expected no MASK token (id {spec.mask_token_id}), got one at position "
            f"{ids.index(spec.mask_token_id)}; blockbatch.fill decodes MASK inside a text"
        )
    if is_block_causal(spec):
        _check_blocks(ids, method, spec.max_length, name)
        return
    canvas = len(ids) + config.gen_length
    if canvas > spec.max_length:
        raise ValueError(
            f"{name}: expected prompt and gen_length to fit in {spec.max_length} positions, got {len(ids)} + "
            f"{config.gen_length} = {canvas}"
        )


def check_ids(ids: list[int], vocab_size: int, name: str) -> None:
    """Raises ValueError for an id outside of the vocabulary."""
    for position, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name}: expected ids from 0 to {vocab_size - 1}, got {token} at {position}")


def _check_blocks(ids: list[int], method: BlockMethod, most: int, name: str) -> None:
    """That a text fits in the model's positions: its first block where it may grow, else all of it."""
    size = method.block_size
    positions = (len(ids) // size + 1) * size if method.grow else method.positions(len(ids))
    if positions > most:
        raise ValueError(
            f"{name}: expected prompt and gen_length in whole blocks of {size} to fit in {most} positions, "
            f"got {len(ids)} + {method.gen_length}, which take {positions}"
        )
