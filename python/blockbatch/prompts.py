"""Prompts in every form that callers hand over, as token ids, and what makes one impossible to decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from blockbatch.decoding.prompt_checks import check_ids as check_ids
from blockbatch.decoding.prompt_checks import check_prompt as check_prompt
from blockbatch.models.model import Model
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
