"""Final tokens as text, and the JSON of answers and chunks in OpenAI's form."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from blockbatch.models.tokenizer import REPLACEMENT, Tokenizer
from blockbatch.serving.logprobs import TokenLogprob, of_chat, of_completion
from blockbatch.stops import PrefixReader, cut


class Answer:
    """The text of one request while its tokens become final, at most `limit` of them.

    Args:
        tokenizer: of the model.
        limit: tokens at most.
        stop: texts that end it.
        eos_token_ids: ids that end it.

    Attributes:
        text: what is settled so far.
        tokens: of the whole answer, once it has ended.
        finish_reason: "stop" or "length", once it has ended; else None.
    """

    def __init__(
        self, tokenizer: Tokenizer, limit: int, stop: Sequence[str], eos_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer, self._limit, self._stop = tokenizer, limit, tuple(stop)
        self._eos = frozenset(eos_token_ids)
        self._reader = PrefixReader(tokenizer, self._stop, eos_token_ids)
        self._pieces: list[str] = []
        self.tokens: list[int] = []
        self.finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def push(self, final: Sequence[int]) -> str:
        """The text that is settled now; `final` holds all final tokens of the request.

        Once more tokens are final than the answer may have, it ends, although the request may go on.
        """
        piece = self._reader.push(final[: self._limit])
        self._pieces.append(piece)
        if len(final) > self._limit and not self._ends(final):
            piece += self.finish(final)
        return piece

    def finish(self, canvas: Sequence[int]) -> str:
        """The rest of the text, of a request that has ended with this canvas."""
        within = list(canvas[: self._limit])
        self.tokens, text, stopped = cut(self._tokenizer, within, self._stop, tuple(self._eos))
        ended = stopped or self._ends(canvas)
        self.finish_reason = "stop" if ended else "length"
        if not ended:
            text = text.rstrip(REPLACEMENT)  # half a character, the rest of which is beyond the limit
        rest = text[len(self.text) :]
        self._pieces.append(rest)
        return rest

    def _ends(self, tokens: Sequence[int]) -> bool:
        """Whether a text ends inside the limit or right behind it."""
        return self._reader.found or bool(self._eos.intersection(tokens[: self._limit + 1]))


@dataclass
class Usage:
    """What the requests of one answer took.

    Attributes:
        prompt_tokens, completion_tokens: the latter before the end of the texts.
        nfe: forwards by phase.
        branches: rows of each request.
        adopted: drafts that came true.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    nfe: dict[str, int] = field(default_factory=dict)
    branches: list[int] = field(default_factory=list)
    adopted: int = 0

    def add(self, prompt: int, completion: int, nfe: Mapping[str, int], branches: int | None) -> None:
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        for phase, count in nfe.items():
            self.nfe[phase] = self.nfe.get(phase, 0) + count
        if branches is not None:
            self.branches.append(branches)

    @property
    def forwards(self) -> int:
        return sum(self.nfe.values())

    def json(self) -> dict[str, Any]:
        """In OpenAI's form, with what is special to these decodes in `blockbatch`."""
        forwards = self.forwards
        per_forward = round(self.completion_tokens / forwards, 3) if forwards else None
        branches = self.branches[0] if len(set(self.branches)) == 1 else self.branches or None
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "blockbatch": {
                "nfe": {**self.nfe, "total": forwards},
                "branches": branches,
                "tokens_per_forward": per_forward,
            },
        }


@dataclass(frozen=True)
class Ended:
    """How one HTTP request with its decodes ended, for metrics and log.

    Attributes:
        request_id: what clients and the log call it.
        outcome: "stop", "length", "abort" (the client went) or "error".
        usage: of all its decodes.
        seconds: from its beginning to its end.
        first: seconds until the first text; None: there was none.
        queued: seconds that each decode waited for its first forward.
    """

    request_id: str
    outcome: str
    usage: Usage
    seconds: float
    first: float | None
    queued: list[float]


def phases(nfe: Any) -> dict[str, int]:
    """Forwards by phase, of a record or a mapping of them."""
    counts = dict(nfe) if isinstance(nfe, Mapping) else asdict(nfe)
    return {phase: int(count) for phase, count in counts.items() if phase != "total"}


class Shape(ABC):
    """The JSON of one answer; `ChatShape` and `CompletionShape` say how a text stands in it.

    Args:
        request_id: of the answer and all its chunks.
        model: the name that clients know.
        with_usage: whether a chunk with the usage ends the stream; the others then say that it is to come.
        top: whether `top_logprobs` of a completion name the token itself.
    """

    prefix = whole = chunk = ""

    def __init__(self, request_id: str, model: str, with_usage: bool = False, top: bool = False) -> None:
        self.request_id = f"{self.prefix}-{request_id}"
        self._head = {"id": self.request_id, "created": int(time.time()), "model": model}
        self.with_usage, self._top = with_usage, top

    def answer(
        self,
        texts: Sequence[str],
        reasons: Sequence[str],
        usage: Usage,
        tokens: Sequence[Sequence[TokenLogprob] | None] | None = None,
    ) -> dict[str, Any]:
        tokens = [None] * len(texts) if tokens is None else tokens
        choices = [
            self._choice(index, reason, own, **self._full(text))
            for index, (text, reason, own) in enumerate(zip(texts, reasons, tokens, strict=True))
        ]
        return {**self._head, "object": self.whole, "choices": choices, "usage": usage.json()}

    def begin(self, index: int) -> dict[str, Any] | None:
        """The chunk before the first text; None: there is none."""
        return None

    def piece(self, index: int, text: str, tokens: Sequence[TokenLogprob] | None = None) -> dict[str, Any]:
        return self._chunk([self._choice(index, None, tokens, **self._delta(text))])

    def end(self, index: int, reason: str) -> dict[str, Any]:
        return self._chunk([self._choice(index, reason, **self._delta(None))])

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage.json()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        to_come = {"usage": None} if self.with_usage else {}
        return {**self._head, "object": self.chunk, "choices": choices, **to_come}

    def _choice(
        self, index: int, reason: str | None, tokens: Sequence[TokenLogprob] | None = None, **content: Any
    ) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    @abstractmethod
    def _logprobs(self, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        """Of some tokens; None: nobody asked."""

    @abstractmethod
    def _full(self, text: str) -> dict[str, Any]:
        """The fields of a choice that hold a whole text."""

    @abstractmethod
    def _delta(self, text: str | None) -> dict[str, Any]:
        """The fields of a choice that hold the next piece of a text; None: of its last chunk."""


class ChatShape(Shape):
    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self, index: int) -> dict[str, Any]:
        return self._chunk([self._choice(index, None, delta={"role": "assistant", "content": ""})])

    def _logprobs(self, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        return of_chat(tokens)

    def _full(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _delta(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}


class CompletionShape(Shape):
    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def _logprobs(self, tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        return of_completion(tokens, self._top)

    def _full(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}
