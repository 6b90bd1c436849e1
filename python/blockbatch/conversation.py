"""Conversations: messages in, the assistant's next turn out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blockbatch import generation
from blockbatch.config import DecodeConfig
from blockbatch.models.model import Model
from blockbatch.prompts import encode_prompt
from blockbatch.result import Result
from blockbatch.values import as_list

Messages = str | Sequence[Mapping[str, str]]


def chat(
    model: Model,
    messages: Messages,
    config: DecodeConfig | None = None,
    *,
    enable_thinking: bool | None = None,
) -> Result:
    """Decodes the assistant's next turn; see `blockbatch.Model.chat`."""
    ids = chat_ids(model, messages, enable_thinking=enable_thinking)
    (result,) = generation.decode(model, [ids], config, ["messages"])
    return result


def chat_ids(model: Model, messages: Messages, *, enable_thinking: bool | None = None) -> list[int]:
    """The conversation as token ids in the chat format of the model's family; see `Model.chat_ids`."""
    if model.tokenizer is None:
        raise ValueError("messages: expected a model with a tokenizer, got one without")
    if not isinstance(messages, str):
        messages = _checked(messages)
    text = model.tokenizer.chat(messages, model.spec.family, enable_thinking=enable_thinking)
    return encode_prompt(model, text, "messages", add_bos=False)


def _checked(messages: Messages) -> list[Mapping[str, str]]:
    turns = as_list(messages)
    if turns is None:
        raise TypeError(
            "messages: expected a list of {'role': ..., 'content': ...}, or one user message as text, got "
            f"{type(messages).__name__}"
        )
    if not turns:
        raise ValueError("messages: expected at least one message, got none")
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or set(turn) != {"role", "content"}:
            raise TypeError(f"messages[{index}]: expected {{'role': ..., 'content': ...}}, got {turn!r:.80}")
    return turns
