"""From the body of a request to what the engine is asked: token ids, settings and the limit of the answer."""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any

from blockbatch.config import DecodeConfig
from blockbatch.methods import DEFAULT_GEN_LENGTH
from blockbatch.models.chat import SPECIAL_TOKENS
from blockbatch.models.spec import is_block_causal
from blockbatch.prompts import encode_prompt
from blockbatch.serving.errors import ApiError, bad_request
from blockbatch.serving.protocol import ChatRequest, CompletionRequest, texts_of

# A canvas is a multiple of it unless block sizes are named: all blocks from 4 to 32 divide it.
CANVAS_UNIT = 32
CHAT_FORMATS = ("auto", "model", "plain")
_NAMED = re.compile(r"([a-z_]+)(?:\[\d+\])?: ")
# Below it a temperature is as good as 0, which clients come near to where they mean it.
_COLDEST = 1e-3
_GREEDY = {"temperature": 0.0, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Job:
    """One text to decode.

    Attributes:
        prompt: token ids.
        config: settings; its stop texts are in `stop`.
        limit: tokens of the answer at most; the canvas may hold more.
        stop: texts that end the answer.
        branches: rows that the request asks for; None: as the engine decides.
        logprobs: whether it asks for the log-probabilities of its tokens.
    """

    prompt: list[int]
    config: DecodeConfig
    limit: int
    stop: tuple[str, ...]
    branches: int | None
    logprobs: bool = False


class Reader:
    """Reads bodies for one model.

    Args:
        model: from `load_model`, with a tokenizer.
        options: the decode options that requests have unless they say otherwise, `preset` among them.
        chat_format: "model": the format of the model's family; "plain": the messages' texts with blank lines
            between them; "auto": the former where the tokenizer holds its tokens.

    Raises:
        ValueError: a model without a tokenizer, or options that do not go together.
    """

    def __init__(self, model: Any, options: Mapping[str, Any], chat_format: str = "auto") -> None:
        if model.tokenizer is None:
            raise ValueError("model: expected a model with a tokenizer, got one without")
        if chat_format not in CHAT_FORMATS:
            raise ValueError(f"chat_format: expected one of {', '.join(CHAT_FORMATS)}, got {chat_format!r}")
        self._model, self._options = model, dict(options)
        tokens = SPECIAL_TOKENS[model.spec.family]
        known = all(model.tokenizer.token_to_id(token) is not None for token in tokens)
        if chat_format == "model" and not known:
            raise ValueError(
                f"chat_format: expected auto or plain for a tokenizer without {', '.join(tokens)}, got "
                f"{chat_format!r}"
            )
        self.plain_chat = chat_format == "plain" or (chat_format == "auto" and not known)
        _config(self._options).for_model(model.spec)

    def chat(self, body: ChatRequest) -> list[Job]:
        """The one job of a chat.

        Raises:
            ApiError: what was expected and what came.
        """
        messages = texts_of(body.messages)
        if self.plain_chat:
            if body.thinking is not None:
                raise bad_request(
                    "enable_thinking: expected a model with a chat format, got one without",
                    "chat_template_kwargs.enable_thinking",
                )
            ids = self._encode("\n\n".join(message["content"] for message in messages), "messages")
        else:
            try:
                text = self._model.tokenizer.chat(
                    messages, self._model.spec.family, enable_thinking=body.thinking
                )
            except ValueError as error:
                raise bad_request(str(error), "messages") from None
            ids = self._encode(text, "messages", add_bos=False)
        return [self.job(ids, body, "messages")]

    def completion(self, body: CompletionRequest) -> list[Job]:
        """A job for each prompt.

        Raises:
            ApiError: what was expected and what came.
        """
        prompt = body.prompt
        one = isinstance(prompt, str) or isinstance(prompt[0], int)
        prompts = [prompt] if one else prompt
        names = ["prompt"] if one else [f"prompt[{place}]" for place in range(len(prompts))]
        return [
            self.job(self._encode(text, name) if isinstance(text, str) else text, body, name)
            for text, name in zip(prompts, names, strict=True)
        ]

    def job(self, ids: list[int], body: Any, name: str) -> Job:
        """What the engine is asked for one prompt.

        Args:
            ids: of the prompt.
            body: of a chat or a completion.
            name: of the prompt in messages.
        """
        asked = {} if body.blockbatch is None else body.blockbatch.model_dump(exclude_unset=True)
        asked = {option: value for option, value in asked.items() if value is not None}
        branches = asked.pop("branches", None)
        options = self._merged(asked)
        options |= _sampling(body, options)
        try:
            options = _without_drafts(options, asked)
            limit, options = self._limit(len(ids), getattr(body, "most_tokens", None), options, asked)
            config = _config(options).for_model(self._model.spec)
        except (ValueError, TypeError) as error:
            raise named(error, asked) from None
        stop = (*config.stop, *getattr(body, "stops", ()))
        return Job(ids, config, limit, stop, branches, getattr(body, "wants_logprobs", False))

    def _merged(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The server's options with a request's, which starts anew with a preset or method of its own."""
        method = self._options.get("method")
        anew = "preset" in asked or asked.get("method", method) != method
        kept = {name: self._options[name] for name in ("gen_length", "stop") if name in self._options}
        return (kept if anew else self._options) | dict(asked)

    def _limit(
        self, prompt: int, most: int | None, options: dict[str, Any], asked: Mapping[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        """Tokens of the answer at most, and the options with a canvas that holds them."""
        longest = self._model.spec.max_length
        room = longest - prompt
        if is_block_causal(self._model.spec):
            length = asked.get("gen_length", most or options.get("gen_length", DEFAULT_GEN_LENGTH))
            return most or length, options | {"gen_length": length}
        unit = _unit(options)
        if "gen_length" in asked:
            length = asked["gen_length"]
            wanted = length if most is None else most
            if wanted > length:
                raise ValueError(f"gen_length: expected at least max_tokens = {wanted}, got {length}")
        elif most is None:
            wanted = options.get("gen_length", DEFAULT_GEN_LENGTH)
            # A long prompt leaves less room than usual, which nobody asked to have.
            length = wanted if wanted <= room else room // unit * unit
            wanted = min(wanted, length)
        else:
            wanted, length = most, -(-most // unit) * unit
        if length > room or length < 1:
            needed = f"{prompt} tokens and a canvas of {max(length, unit)}"
            raise ApiError(
                400,
                f"prompt: expected prompt and canvas to fit in {longest} positions, got {needed}",
                code="context_length_exceeded",
            )
        return wanted, options | {"gen_length": length}

    def _encode(self, text: str, name: str, add_bos: bool | None = None) -> list[int]:
        try:
            return encode_prompt(self._model, text, name, add_bos=add_bos)
        except ValueError as error:
            raise bad_request(str(error), name) from None


def named(error: Exception, asked: Collection[str] = ()) -> ApiError:
    """A message of the package, whose first word is the argument, as an answer."""
    found = _NAMED.match(str(error))
    param = found[1] if found else None
    return bad_request(str(error), f"blockbatch.{param}" if param in asked else param)


def _config(options: Mapping[str, Any]) -> DecodeConfig:
    given = dict(options)
    preset = given.pop("preset", None)
    return DecodeConfig(**given) if preset is None else DecodeConfig.preset(preset, **given)


def _sampling(body: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """How tokens are drawn, as clients of OpenAI's form say it; what they leave out is the server's.

    At temperature 0 `top_p` and `top_k` change nothing, so they may be there. Without a seed every request
    has another one.
    """
    given = {name: getattr(body, name, None) for name in ("temperature", "top_p", "top_k", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    temperature = given.get("temperature", options.get("temperature", 0.0))
    if temperature < _COLDEST:
        return dict(_GREEDY)
    if given.get("top_k", 1) < 1:  # 0 and -1: all
        given["top_k"] = None
    if "seed" in given:
        given["seed"] %= 2**63
    elif "seed" not in options:
        given["seed"] = secrets.randbits(63)
    return given


def _without_drafts(options: dict[str, Any], asked: Collection[str]) -> dict[str, Any]:
    """Drafts go with greedy decoding alone; a request that draws tokens did not ask for the server's."""
    if not options.get("temperature") or "drafts" in asked or "preset" in asked:
        return options
    return options if _config({**options, **_GREEDY}).drafts is None else {**options, "drafts": None}


def _unit(options: Mapping[str, Any]) -> int:
    """What the length of a canvas is a multiple of."""
    sizes = options.get("block_sizes") or options.get("block_size") or CANVAS_UNIT
    sizes = [sizes] if isinstance(sizes, int) else sizes
    return lcm(*(size for size in sizes if isinstance(size, int) and size > 0))
