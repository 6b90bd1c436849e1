"""The answers as the OpenAPI schema tells them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorDetail


class Forwards(BaseModel):
    nfe: dict[str, int]
    branches: int | list[int] | None
    tokens_per_forward: float | None


class UsageAnswer(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    blockbatch: Forwards


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatToken(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[Any]


class ChatLogprobs(BaseModel):
    """The log of the model's probability of each token in the forward that committed it."""

    content: list[ChatToken]
    refusal: None


class CompletionLogprobs(BaseModel):
    """The log of the model's probability of each token in the forward that committed it."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionAnswer(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageAnswer


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None = None


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["starting", "ready", "draining", "failed"]


class Version(BaseModel):
    version: str


_SAID = {
    400: "What is wrong with the body; also a prompt that is too long.",
    401: "The key is missing or wrong.",
    404: "No such model.",
    413: "The body is too large, or the request can never fit into memory.",
    500: "The engine failed.",
    503: "The server starts, ends or has a full queue; Retry-After says when to come again.",
    504: "The request took too long.",
}


_EVENTS: dict[str, Any] = {"text/event-stream": {}}


def _errors(*statuses: int) -> dict[int | str, Any]:
    return {status: {"model": ErrorAnswer, "description": _SAID[status]} for status in statuses}


def _decode(answer: type[BaseModel]) -> dict[int | str, Any]:
    whole = {"model": answer, "description": "All of it; with `stream` chunks.", "content": _EVENTS}
    return {200: whole, **_errors(*_SAID)}


CHAT, COMPLETION = _decode(ChatAnswer), _decode(CompletionAnswer)
MODELS = {200: {"model": ModelList}, **_errors(401)}
MODEL = {200: {"model": ModelCard}, **_errors(401, 404)}
HEALTH = {200: {"model": Health}, 503: {"model": Health, "description": "No requests are taken."}}
VERSION = {200: {"model": Version}}
METRICS = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
LIVE = {
    200: {"description": "Events.", "content": _EVENTS},
    **_errors(400, 401, 413, 500, 503),
}


def with_key(app: FastAPI, keyed: bool) -> Callable[[], dict[str, Any]]:
    """The function that gives the schema: without FastAPI's own 422, and with the key where there is one."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            _finish(schema, keyed)
            app.openapi_schema = schema
        return app.openapi_schema

    return openapi


def _finish(schema: dict[str, Any], keyed: bool) -> None:
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if keyed and path.startswith(("/v1", "/live")):
                operation["security"] = [{"key": []}]
    parts = schema.setdefault("components", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        parts.get("schemas", {}).pop(unused, None)
    if keyed:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
