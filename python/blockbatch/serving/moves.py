"""Requests as NVIDIA Dynamo's frontend sends them, and how one goes on that has moved to another worker.

When a worker dies, the frontend sends its requests to another one, with the tokens that were sent so far
behind the prompt and so many tokens less to write. That is how a model that writes left to right goes on; a
canvas does not, since its tokens are not decoded in order. So the request is decoded again from its own
prompt, with the settings that it had, and what was sent already is skipped. Where the prompt ends, and with
how many branches the request was decoded, goes along in the *link*: a record that a worker's chunks bear, and
that the frontend puts into the request when it moves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from blockbatch.decoding.choice import eos_token_ids
from blockbatch.serving.answers import Answer
from blockbatch.serving.errors import ApiError, bad_request
from blockbatch.serving.logprobs import logarithm
from blockbatch.serving.protocol import CompletionRequest, refuse
from blockbatch.serving.reading import Job, Reader
from blockbatch.stops import PrefixReader

# An annotation of a request that begins so holds the options of the decode as JSON.
OPTIONS_PREFIX = "blockbatch:"
# The link has the form of one between traces: 32 and 16 digits.
_MARK = b"blockbatch-moved".hex()
_SAMPLING = ("temperature", "top_p", "top_k", "seed")
# Fields of a request's parts -> what asks for nothing; None always does.
_REFUSED = {
    "sampling_options": {
        "n": 1,
        "best_of": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "repetition_penalty": 1,
        "min_p": 0,
        "use_beam_search": False,
        "guided_decoding": None,
    },
    "stop_conditions": {
        "stop_token_ids": [],
        "min_tokens": 0,
        "ignore_eos": False,
        "max_thinking_tokens": None,
    },
    "output_options": {"prompt_logprobs": None},
}


@dataclass(frozen=True)
class Asked:
    """What a worker is asked for.

    Attributes:
        job: what the engine is asked for, from the prompt on.
        sent: ids of the answer that the client has.
    """

    job: Job
    sent: list[int]


class StreamDiffersError(RuntimeError):
    """A request that moved was decoded to other tokens than those that were sent already."""


def read(request: Mapping[str, Any], reader: Reader, request_id: str, *, seeded: bool = False) -> Asked:
    """A request of the frontend, which names its fields so: `token_ids`, `stop_conditions`, ...

    Args:
        request_id: stays the same when the request moves; without a seed of its own it is drawn by that of
            this name.
        seeded: whether the server has a seed for requests without one.

    Raises:
        ApiError: what was expected and what came.
    """
    _refuse_others(request)
    ids, length, branches = request["token_ids"], *_link(request)
    length = len(ids) if length is None else length
    prompt, sent = ids[:length], ids[length:]
    stop, sampling = request.get("stop_conditions") or {}, request.get("sampling_options") or {}
    body = {name: sampling[name] for name in _SAMPLING if sampling.get(name) is not None}
    if "seed" not in body and not seeded:
        body["seed"] = int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:7], "big")
    if stop.get("max_tokens") is not None:
        body["max_tokens"] = stop["max_tokens"] + len(sent)
    if stop.get("stop"):
        body["stop"] = stop["stop"]
    wanted = (request.get("output_options") or {}).get("logprobs")
    if wanted is not None:
        body["logprobs"] = wanted
    options = _options(request)
    if options is not None:
        body["blockbatch"] = options
    try:
        asked = CompletionRequest.model_validate({"prompt": prompt, **body})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise bad_request(f"{place}: {first['msg']}", place) from None
    refuse(asked)
    (job,) = reader.completion(asked)
    return Asked(job if branches is None else replace(job, branches=branches), sent)


def link(prompt_tokens: int, branches: int) -> dict[str, str]:
    """What a chunk bears for the worker that may have to go on."""
    return {"trace_id": _MARK, "span_id": f"{prompt_tokens:08x}{branches:08x}"}


def _link(request: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Length of the prompt and number of branches of a request that moved; None each of one that did not."""
    found = request.get("migration_link")
    if found is None:
        return None, None
    if found.get("trace_id") != _MARK:
        raise bad_request("migration_link: expected that of another worker of this kind, got a foreign one")
    return int(found["span_id"][:8], 16), int(found["span_id"][8:], 16)


def _options(request: Mapping[str, Any]) -> Any:
    for text in request.get("annotations") or ():
        if text.startswith(OPTIONS_PREFIX):
            try:
                return json.loads(text[len(OPTIONS_PREFIX) :])
            except ValueError:
                raise bad_request(
                    f"annotations: expected JSON behind {OPTIONS_PREFIX!r}, got {text[:80]!r}", "annotations"
                ) from None
    return None


def _refuse_others(request: Mapping[str, Any]) -> None:
    """Raises ApiError for a field that asks for something which there is not."""
    for part, fields in _REFUSED.items():
        for name, harmless in fields.items():
            value = (request.get(part) or {}).get(name)
            if value is not None and value != harmless:
                raise bad_request(f"{name}: not supported, got {value!r:.80}", name, "unsupported_parameter")
    if request.get("prompt_embeds") is not None or request.get("multi_modal_data"):
        raise bad_request("prompt: expected text or token ids alone", "prompt")


class TokenStream:
    """The chunks of one request for the frontend: ids that are final, each once, none that were sent before.

    Args:
        model: see `Answer`.
        asked: by the frontend.

    Attributes:
        answer: the whole of it, once `done`.
    """

    def __init__(self, model: Any, asked: Asked) -> None:
        self._job, self._sent, self._told = asked.job, asked.sent, 0
        ends = eos_token_ids(model, asked.job.config)
        self.answer = Answer(model.tokenizer, asked.job.limit, asked.job.stop, ends)
        self._stops = PrefixReader(model.tokenizer, asked.job.stop, ends) if asked.job.stop else None
        self.done = False

    def chunk(self, request: Any) -> dict[str, Any] | None:
        """What is new of the engine's request; None: nothing is.

        Raises:
            StreamDiffersError: it cannot go on where the other worker ended.
        """
        final, ended = list(request.final), request.ended  # in this order: ids behind a stop text come last
        if ended:
            return self._last(request)
        final = final[: self._job.limit]
        if self._stops is not None:
            self._stops.push(final)
            if self._stops.found:  # which of them belong to the answer the end says
                return None
        return self._tokens(final, request)

    def _tokens(self, final: list[int], request: Any) -> dict[str, Any] | None:
        known = self._sent[: len(final)]
        if final[: len(known)] != known:
            raise StreamDiffersError(
                "request: expected the tokens that another worker sent before, got others; run the workers "
                "with --deterministic, on devices of one kind"
            )
        start = max(self._told, len(self._sent))
        new, self._told = final[start:], max(self._told, len(final))
        if not new:
            return None
        chunk = {"token_ids": new, "index": 0}
        if self._job.logprobs:
            chunk["log_probs"] = [logarithm(sure) for sure in request.confidences[start : start + len(new)]]
        return {**chunk, "worker_trace_link": link(len(self._job.prompt), request.branches)}

    def _last(self, request: Any) -> dict[str, Any]:
        self.answer.finish(request.result.canvas)
        tokens = self.answer.tokens
        if len(tokens) < len(self._sent):
            tokens = [*tokens, *[-1] * (len(self._sent) - len(tokens))]  # other tokens than were sent
        chunk = self._tokens(tokens, request) or {"token_ids": [], "index": 0}
        self.done = True
        prompt, written = len(self._job.prompt), len(self.answer.tokens)
        usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
        return {**chunk, "finish_reason": self.answer.finish_reason, "completion_usage": usage}


def refused(error: ApiError, errors: Any) -> Exception:
    """An error of the server as the frontend understands it: what another worker may do better moves there.

    Args:
        errors: the module `dynamo.llm.exceptions`.
    """
    if error.status < 500:
        return errors.InvalidArgument(error.message)
    kind = errors.WorkerUnavailable if error.status == 503 else errors.EngineShutdown
    return kind(error.message)
