"""The bodies of requests, as OpenAI's clients send them, and what is refused in them.

Fields that would change the answer and that this server does not have are refused by name. Fields that nobody
here knows are passed over, since clients send more of them with every release.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from blockbatch.methods import OPTIONS, PRESET_TABLE
from blockbatch.serving.errors import bad_request

MOST_STOPS = 16
MOST_PROMPTS = 128
MOST_INTEGERS = 64
# Field -> the values that ask for nothing.
_CHAT_ONLY = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "top_logprobs": (None, 0),
}
_COMPLETION_ONLY = {
    "echo": (None, False),
    "suffix": (None, ""),
    "best_of": (None, 1),
}
_BOTH = {
    "n": (None, 1),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None, {}),
}


class _Body(BaseModel):
    """A JSON object that is taken at its word: no text counts as a number."""

    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(_Body):
    include_usage: bool | None = None


class ContentPart(_Body):
    type: str
    text: str | None = None


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]


_Integer = Annotated[int, Field(ge=-(2**31), lt=2**31)]
_KINDS = {
    "name": str,
    "integer": _Integer,
    "number": Annotated[float, Field(allow_inf_nan=False)],
    "integers": Annotated[list[_Integer], Field(max_length=MOST_INTEGERS)],
    "switch": bool,
    "texts": Annotated[list[str], Field(max_length=MOST_STOPS)],
}
# Fields of the body say these.
_ELSEWHERE = ("stop", "temperature", "top_p", "top_k", "seed")


def _options_model() -> type[BaseModel]:
    """A field for each option of a decode, from the table that the command line has, too."""
    preset = Field(None, description=f"named settings: {', '.join(PRESET_TABLE)}; other options change them")
    branches = Field(None, ge=1, le=MOST_INTEGERS, description="of this request, whatever the load")
    fields: dict[str, Any] = {"preset": (str | None, preset), "branches": (int | None, branches)}
    for option in OPTIONS:
        if option.name not in _ELSEWHERE:
            fields[option.name] = (_KINDS[option.kind] | None, Field(None, description=option.help))
    config = ConfigDict(strict=True, extra="forbid")
    return create_model("BlockBatchOptions", __config__=config, **fields)


BlockBatchOptions = _options_model()
_Text = Annotated[str, Field(min_length=1)]
_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
_Tokens = Annotated[int, Field(ge=1, lt=2**31)]


_LOGPROBS = "log of the model's probability of each token in the forward that committed it"


class _Request(_Body):
    # What is refused is read from the rest, with messages of its own.
    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = Field(None, description="as /v1/models names it")
    max_tokens: _Tokens | None = Field(None, description="tokens of the answer at most")
    stop: _Text | Annotated[list[_Text], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    blockbatch: BlockBatchOptions | None = Field(None, description="options of the decode")

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None and self.logprobs is not False

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class TemplateOptions(_Body):
    model_config = ConfigDict(strict=True, extra="forbid")

    enable_thinking: bool | None = None


class ChatRequest(_Request):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool | None = Field(None, description=_LOGPROBS)
    max_completion_tokens: _Tokens | None = Field(None, description="as max_tokens")
    chat_template_kwargs: TemplateOptions | None = None

    @property
    def most_tokens(self) -> int | None:
        given = [most for most in (self.max_tokens, self.max_completion_tokens) if most is not None]
        return min(given, default=None)

    @property
    def thinking(self) -> bool | None:
        """Whether the model may think before it answers; None: nobody said so."""
        return None if self.chat_template_kwargs is None else self.chat_template_kwargs.enable_thinking


class CompletionRequest(_Request):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | _Ids
        | Annotated[list[_Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: Annotated[int, Field(ge=0)] | Literal[False] | None = Field(
        None, description=f"0 or 1: {_LOGPROBS}; 1 names the token in top_logprobs, too"
    )


class LiveRequest(_Body):
    """What the page at / asks for."""

    prompt: str
    max_tokens: _Tokens | None = None
    blockbatch: BlockBatchOptions | None = None


def refuse(body: _Request) -> None:
    """Raises ApiError for a field that asks for something which this server does not have."""
    rules = _BOTH | (_CHAT_ONLY if isinstance(body, ChatRequest) else _COMPLETION_ONLY)
    for name, value in (body.model_extra or {}).items():
        harmless = rules.get(name)
        if harmless is not None and not any(_same(value, one) for one in harmless):
            expected = " or ".join(json.dumps(one) for one in harmless if one is not None)
            raise bad_request(
                f"{name}: not supported; expected it to be left out{f' or {expected}' if expected else ''}",
                name,
                "unsupported_parameter",
            )
    if isinstance(body, CompletionRequest) and (body.logprobs or 0) > 1:
        raise bad_request(
            f"logprobs: expected 0 or 1, since the logits of other tokens are not kept, got {body.logprobs}",
            "logprobs",
            "unsupported_parameter",
        )
    if body.stream_options is not None and not body.stream:
        raise bad_request(
            "stream_options: expected only together with stream, got it without", "stream_options"
        )


def texts_of(messages: list[ChatMessage]) -> list[Mapping[str, str]]:
    """Roles and texts, parts put together."""
    return [
        {
            "role": "system" if message.role == "developer" else message.role,
            "content": _content(message.content, f"messages[{place}].content"),
        }
        for place, message in enumerate(messages)
    ]


def _content(content: str | list[ContentPart], name: str) -> str:
    if isinstance(content, str):
        return content
    for place, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise bad_request(
                f"{name}[{place}]: expected a part of type 'text' with a text, got {part.type[:40]!r}", name
            )
    return "".join(part.text for part in content)


def _same(value: Any, other: Any) -> bool:
    """Equal, where true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
