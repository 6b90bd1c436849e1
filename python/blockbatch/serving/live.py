"""The page at /: a prompt while it denoises, forward by forward.

The engine tells final texts alone, so the page's decode is a session of its own beside the engine, with a
trace. One runs at a time, since it takes memory and time of its own.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from importlib import resources
from typing import Any

from starlette.responses import Response, StreamingResponse

from blockbatch.generation import build_result, open_session
from blockbatch.methods import METHOD_TABLE, PRESET_TABLE
from blockbatch.parallel import share_of
from blockbatch.serving.answers import phases
from blockbatch.serving.errors import bad_request, engine_failed, unavailable
from blockbatch.serving.logs import event
from blockbatch.serving.protocol import ChatRequest, LiveRequest
from blockbatch.serving.reading import Job, named
from blockbatch.serving.respond import server_event
from blockbatch.serving.service import Service
from blockbatch.tracing import open_recorder, phase


def page(keyed: bool) -> str:
    """The page's text.

    Args:
        keyed: whether it asks for the server's key.
    """
    files = resources.files("blockbatch")

    def read(folder: str, *names: str) -> str:
        texts = (files.joinpath(*folder.split("/"), name).read_text(encoding="utf-8") for name in names)
        return "\n".join(texts)

    about = {"keyed": keyed, "methods": list(METHOD_TABLE), "presets": list(PRESET_TABLE)}
    parts = {
        # The colours, cells and panels of the replay page.
        "STYLE": read("pictures/replay_page", "page.css", "controls.css", "branches.css")
        + read("serving/live_page", "live.css"),
        "ABOUT": json.dumps(about),
        "SCRIPT": read("serving/live_page", "live.js"),
    }
    return re.sub("@([A-Z]+)@", lambda place: parts[place[1]], read("serving/live_page", "page.html"))


async def respond(service: Service, body: LiveRequest) -> Response:
    """The events of one decode: `begin`, a `forward` each, then `end` or `error`.

    Raises:
        ApiError: 400 for bad input, or a model of several ranks; 503 while another is shown.
    """
    if share_of(service.model).size > 1:
        raise bad_request("live: expected a model of one process, since the page decodes beside the engine")
    asked = None if body.blockbatch is None else body.blockbatch.model_dump(exclude_unset=True)
    messages = [{"role": "user", "content": body.prompt}]
    chat = ChatRequest(messages=messages, max_tokens=body.max_tokens, blockbatch=asked)
    (job,) = service.reader.chat(chat)
    if service.live.locked():
        raise unavailable("live: expected one decode at a time, another is shown")
    await service.live.acquire()
    try:
        decode = await asyncio.to_thread(LiveDecode, service.model, job)
    except BaseException as error:
        service.live.release()
        if isinstance(error, (ValueError, TypeError)):
            raise named(error) from None
        if isinstance(error, MemoryError):
            raise unavailable(str(error)) from None
        raise
    return StreamingResponse(_events(service, decode), media_type="text/event-stream")


async def _events(service: Service, decode: LiveDecode) -> AsyncIterator[bytes]:
    try:
        yield server_event({"begin": decode.about()})
        # A forward that has begun ends, whatever becomes of the reader.
        while told := await asyncio.shield(asyncio.to_thread(decode.forward)):
            yield server_event({"forward": told})
        yield server_event({"end": decode.end()})
    except Exception as error:
        event("live_failed", error=error)
        yield server_event(engine_failed().body())
    finally:
        service.live.release()


class LiveDecode:
    """A decode that tells what every forward changed.

    Args:
        model: from `load_model`.
        job: what to decode.
    """

    def __init__(self, model: Any, job: Job) -> None:
        self._model, self._job = model, job
        self._config = replace(job.config, trace=True, stop=job.stop)
        self._session = open_session(model, job.prompt, self._config)
        self._recorder = open_recorder(self._session, self._config)
        self._told: set[int] = set()

    def about(self) -> dict[str, Any]:
        """What the page has to know before the first forward."""
        state, model = self._session.state, self._model
        sizes = state.block_size.tolist()[: state.num_branches]
        drafts = len(self._config.drafts or ())
        mask = model.spec.mask_token_id
        return {
            "model": model.name,
            "method": self._config.method,
            "blockSizes": sizes[: len(sizes) - drafts],
            "genLength": self._config.gen_length if model.spec.block_size is None else 0,
            "mask": mask,
            "eos": list(self._session.params.eos_token_ids),
            "promptTokens": len(self._job.prompt),
            "pieces": self._pieces([mask, *self._session.params.eos_token_ids]),
        }

    def forward(self) -> dict[str, Any] | None:
        """What one forward changed; None: there is no more."""
        step = self._session.step()
        if step is None:
            return None
        self._recorder.add(step)
        record = self._recorder.traces[0][-1]
        changes = record["commits"] + record["merges"]
        return {
            "phase": phase(record),
            "kind": record["kind"],
            "rows": record["rows"],
            "windows": record["windows"],
            "commits": [[one["branch"], one["positions"], one["tokens"]] for one in record["commits"]],
            "merges": [[one["branch"], one["positions"], one["tokens"]] for one in record["merges"]],
            "syncs": [[one["branch"], one["leader"]] for one in record["syncs"]],
            "pieces": self._pieces([token for one in changes for token in one["tokens"]]),
        }

    def end(self) -> dict[str, Any]:
        """How it ended."""
        result = build_result(self._model, self._session, 0)
        return {
            "text": result.text,
            "tokens": len(result.tokens),
            "nfe": {**phases(asdict(result.nfe)), "total": result.nfe.total},
            "winner": result.block_size,
            "stopReason": result.stop_reason,
            "seconds": round(result.seconds, 3),
        }

    def _pieces(self, tokens: list[int]) -> dict[str, str]:
        """The texts of those tokens that the page does not know yet."""
        fresh = set(tokens) - self._told
        self._told |= fresh
        return {str(token): self._model.tokenizer.decode([token], skip_special=False) for token in fresh}
