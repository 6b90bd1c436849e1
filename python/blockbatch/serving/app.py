"""The routes."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException

from blockbatch.serving import live, metrics, schemas
from blockbatch.serving.answers import ChatShape, CompletionShape, Shape
from blockbatch.serving.errors import ApiError
from blockbatch.serving.gate import Gate
from blockbatch.serving.protocol import ChatRequest, CompletionRequest, LiveRequest, refuse
from blockbatch.serving.respond import Json, respond
from blockbatch.serving.service import Service

# Parts of a message's place that name a member of a union rather than a field.
_UNION_PART = re.compile(r"str|int|nullable|BlockBatchOptions|[a-z]+\[.*\]|(function|constrained)-.*")


def create_app(service: Service, version: str) -> FastAPI:
    """The ASGI application of one server; its lifespan starts and ends the service."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="blockbatch",
        version=version,
        description="Masked diffusion language models behind OpenAI's API.",
        lifespan=lifespan,
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(Gate, service=service)
    app.openapi = schemas.with_key(app, service.settings.api_key is not None)
    _add_errors(app)
    _add_state(app, service, version)
    _add_decodes(app, service)
    if service.settings.page:
        _add_page(app, service)
    return app


def _add_decodes(app: FastAPI, service: Service) -> None:
    async def decode(request: Request, body: Any, read: Any, shape: type[Shape]) -> Response:
        service.require_ready()
        refuse(body)
        service.check_model(body.model)
        size = int(request.headers.get("content-length", 1 << 30))
        jobs = await service.read(read, body, size)
        name = request.scope["state"]["request_id"]
        made = shape(name, service.settings.model_name, body.wants_usage, body.logprobs == 1)
        return await respond(service, request, jobs, made, stream=bool(body.stream))

    @app.post("/v1/chat/completions", responses=schemas.CHAT, response_class=Json)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """The assistant's next turn."""
        return await decode(request, body, lambda it: service.reader.chat(it), ChatShape)

    @app.post("/v1/completions", responses=schemas.COMPLETION, response_class=Json)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """The text behind a prompt, or behind each of several."""
        return await decode(request, body, lambda it: service.reader.completion(it), CompletionShape)


def _add_state(app: FastAPI, service: Service, version: str) -> None:
    created = int(time.time())

    def model() -> dict[str, Any]:
        found = {
            "id": service.settings.model_name,
            "object": "model",
            "created": created,
            "owned_by": "blockbatch",
        }
        if service.model is not None:
            found["max_model_len"] = service.model.spec.max_length
        return found

    @app.get("/v1/models", responses=schemas.MODELS, response_class=Json)
    async def models() -> Response:
        """The one model."""
        return Json({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name:path}", responses=schemas.MODEL, response_class=Json)
    async def one_model(name: str) -> Response:
        """The model, by its name."""
        service.check_model(name)
        return Json(model())

    @app.get("/health", responses=schemas.HEALTH, response_class=Json)
    async def health() -> Response:
        """200 while requests are taken, else 503."""
        return Json({"status": service.status}, 200 if service.status == "ready" else 503)

    @app.get("/version", responses=schemas.VERSION, response_class=Json)
    async def tell_version() -> Response:
        return Json({"version": version})

    @app.get("/metrics", responses=schemas.METRICS, response_class=Response)
    async def tell_metrics() -> Response:
        """Figures in the text format of Prometheus."""
        return Response(service.metrics.text(), headers={"content-type": metrics.CONTENT_TYPE})


def _add_page(app: FastAPI, service: Service) -> None:
    page = live.page(service.settings.api_key is not None)

    @app.get("/", response_class=HTMLResponse)
    async def show_page() -> Response:
        """A page that shows a prompt while it denoises."""
        return HTMLResponse(page)

    @app.post("/live", responses=schemas.LIVE, response_class=Json)
    async def show_decode(body: LiveRequest) -> Response:
        """The canvases of all branches after every forward, as events; what the page at / reads."""
        service.require_ready()
        return await live.respond(service, body)


def _add_errors(app: FastAPI) -> None:
    def answer(error: ApiError) -> Response:
        return Json(error.body(), error.status, error.headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def bad_body(request: Request, error: RequestValidationError) -> Response:
        return answer(_bad_body(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return answer(ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return answer(ApiError(500, "server: an error that nobody expected; the log has it"))


def _bad_body(errors: Sequence[Any]) -> ApiError:
    """The first thing that is wrong with a body; of a field with several types what each needs."""
    places = [_place(error["loc"]) for error in errors]
    # Of a list that holds a wrong member the member says more than that it is no text.
    place = max((place for place in places if place.startswith(places[0])), key=len)
    said = dict.fromkeys(error["msg"] for error, its in zip(errors, places) if its == place)
    return ApiError(400, f"{place or 'body'}: {' or '.join(said)}", param=place or None)


def _place(parts: Sequence[str | int]) -> str:
    name = ""
    for part in parts[1:]:
        if isinstance(part, int):
            name += f"[{part}]" if name else ""
        elif not _UNION_PART.fullmatch(part):
            name += f".{part}" if name else part
    return name[:200]
