"""Prompts in every form that callers hand over, as token ids, and what makes one impossible to decode."""

from __future__ import annotations

from collections.abc import Sequence

from blockbatch.decoding.prompt_checks import check_prompt as check_prompt
from blockbatch.models.model import Model
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
