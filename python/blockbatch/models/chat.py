"""Chat formats of the instruct models, as plain text with their special tokens written out.

The formats are built in: a model repository's own template is a program, and none is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from blockbatch.models.spec import FAMILIES, CheckpointError

ROLES = ("system", "user", "assistant")
DREAM_SYSTEM_MESSAGE = "You are a helpful assistant."

# What each format writes, all of which the tokenizer must hold as single tokens.
SPECIAL_TOKENS = {
    "llada": ("<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "dream": ("<|im_start|>", "<|im_end|>"),
    "sdar": ("<|im_start|>", "<|im_end|>"),
    "fast_dllm_v2": ("<|im_start|>", "<|im_end|>"),
}


def format_chat(
    messages: str | Sequence[Mapping[str, str]],
    family: str,
    token_to_id: Callable[[str], int | None],
    enable_thinking: bool | None = None,
) -> str:
    """The prompt text that asks the model for the assistant's next turn.

    Special tokens that occur in a message's own text are not escaped.

    Args:
        messages: one user message, or a list of {"role": "system" | "user" | "assistant", "content": text}.
        family: one of `FAMILIES`.
        token_to_id: id of a token, None where the tokenizer has none.
        enable_thinking: SDAR alone: False writes an empty think block, so that the answer begins at once;
            None and True leave it to the model.

    Raises:
        CheckpointError: the tokenizer lacks a special token of the format (a base model, most likely).
        ValueError: no message, an unknown role, a content that is not text, or `enable_thinking` for another
            family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")
    if enable_thinking is not None and family != "sdar":
        raise ValueError(f"enable_thinking must be None for {family}, got {enable_thinking!r}")
    lacking = [token for token in SPECIAL_TOKENS[family] if token_to_id(token) is None]
    if lacking:
        raise CheckpointError(
            f"tokenizer: the chat format of {family} needs the tokens {', '.join(SPECIAL_TOKENS[family])}, "
            f"it lacks {', '.join(lacking)}: this model was not trained for chat in that format"
        )
    turns = [("user", messages)] if isinstance(messages, str) else [_turn(message) for message in messages]
    if not turns:
        raise ValueError("messages must hold at least one message, got none")
    if family == "llada":
        return _llada(turns)
    return _qwen3(turns, enable_thinking) if family == "sdar" else _dream(turns)


def _llada(turns: list[tuple[str, str]]) -> str:
    text = "<|startoftext|>"
    for role, content in [*turns, ("assistant", None)]:
        text += f"<|start_header_id|>{role}<|end_header_id|>\n\n"
        if content is not None:
            text += f"{content.strip()}<|eot_id|>"
    return text


def _dream(turns: list[tuple[str, str]]) -> str:
    if turns[0][0] != "system":
        turns = [("system", DREAM_SYSTEM_MESSAGE), *turns]
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + "<|im_start|>assistant\n"


def _qwen3(turns: list[tuple[str, str]], enable_thinking: bool | None) -> str:
    """No system message unless there is one; what was thought before the last question is left out."""
    last = max((place for place, (role, _) in enumerate(turns) if role == "user"), default=len(turns))
    text = ""
    for place, (role, content) in enumerate(turns):
        if role == "assistant" and place < last:
            content = content.rsplit("</think>", 1)[-1].lstrip("\n")
        text += f"<|im_start|>{role}\n{content}<|im_end|>\n"
    text += "<|im_start|>assistant\n"
    return text + "<think>\n\n</think>\n\n" if enable_thinking is False else text


def _turn(message: Mapping[str, str]) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"messages: role must be one of {ROLES}, got {role!r}")
    if not isinstance(content, str):
        raise ValueError(f"messages: content must be text, got {content!r}")
    return role, content
