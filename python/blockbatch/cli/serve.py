"""`blockbatch serve`: a model behind OpenAI's API."""

from __future__ import annotations

import argparse
import os
import signal
from importlib.util import find_spec
from typing import Any

from blockbatch.cli import ranks
from blockbatch.cli.arguments import add_decoding, add_own, given_options, methods_note
from blockbatch.cli.arguments import load as load_named
from blockbatch.cli.help import examples

_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def add_parser(commands: Any) -> None:
    """Adds the command to those of `blockbatch`."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP, as OpenAI's clients expect it",
        description="Serve a model over HTTP: /v1/chat/completions, /v1/completions, /v1/models, /health, "
        "/metrics, and a page at / that shows a prompt while it denoises. Requests join and leave the "
        "running batch at any forward. The decoding options are those of requests that say nothing else.",
        epilog=methods_note()
        + "\n\n"
        + examples(
            "blockbatch serve tiny",
            "blockbatch serve GSAI-ML/LLaDA-8B-Instruct --preset careful --port 8000",
            "blockbatch serve tiny --api-key SECRET --max-requests 32 --branches load",
        ),
    )
    parser.set_defaults(run=run)
    add_model(parser)
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    http.add_argument("--port", type=int, default=8000, help="port; 0: any that is free (8000)")
    http.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("BLOCKBATCH_API_KEY"),
        help="what clients must bring as bearer token (BLOCKBATCH_API_KEY of the environment; none)",
    )
    http.add_argument(
        "--request-timeout", type=seconds, default=600.0, metavar="SECONDS", help="of a request (600)"
    )
    http.add_argument(
        "--drain-seconds",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="for running requests after SIGTERM (30)",
    )
    http.add_argument(
        "--max-body-bytes", type=_positive, default=4 << 20, metavar="N", help="of a request (4194304)"
    )
    http.add_argument("--no-page", action="store_true", help="no page at /")
    http.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    http.add_argument("--log-prompts", action="store_true", help="the log holds prompts and answers")
    add_engine(parser)
    add_decoding(parser)


def add_model(parser: Any) -> None:
    """Adds the options that say which model is loaded, and how."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="tiny or tiny-block (both built in), a HuggingFace folder, or a hub id",
    )
    group = parser.add_argument_group("model")
    add_own(group)
    group.add_argument("--device", help="cuda (default where there is a GPU), cuda:1, cpu")
    group.add_argument("--dtype", help="float32 (default on the CPU), bfloat16 (default elsewhere), float16")
    group.add_argument(
        "--quantization",
        help="fp8: layers in 8 bits; fp8-all: the LM head too; left out: as the checkpoint has them",
    )
    group.add_argument("--kv-dtype", help="fp8: keys and values in 8 bits; left out: as --dtype")
    group.add_argument("--backend", help="reference, triton or cuda; left out: the fastest that runs")
    group.add_argument("--served-model-name", metavar="NAME", help="what clients call it (MODEL)")
    group.add_argument(
        "--chat-format",
        default="auto",
        choices=("auto", "model", "plain"),
        help="of the model's family, or plain: texts with blank lines between them; auto (default): the "
        "former where the tokenizer has its tokens",
    )


def add_engine(parser: Any) -> None:
    """Adds the options of the engine."""
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--max-requests", type=_positive, default=32, metavar="N", help="that run at a time (32)"
    )
    engine.add_argument(
        "--max-queue",
        "--max-queued-requests",
        type=_count,
        default=128,
        metavar="N",
        help="that wait; more are turned away with 503 (128)",
    )
    engine.add_argument(
        "--branches",
        default="fixed",
        choices=("fixed", "load"),
        help="of a new request: as its settings say, or fewer under load (fixed)",
    )
    engine.add_argument("--deterministic", action="store_true", help="bits do not depend on neighbours")
    engine.add_argument(
        "--max-tokens-per-step", type=_positive, metavar="N", help="of a forward (as measured)"
    )
    engine.add_argument("--cache-tokens", type=_positive, metavar="N", help="of the K/V cache (what fits)")


def run(options: argparse.Namespace) -> None:
    """Serves until it is told to end; leaves by SystemExit where the status is not 0."""
    rank, size = ranks.process()
    if rank > 0:
        follow(options)
        return
    lacking = [name for name in _NEEDED if find_spec(name) is None]
    if lacking:
        raise RuntimeError(
            f"serve: expected the packages of the extra serve (pip install 'blockbatch[serve]'), lacking are "
            f"{', '.join(lacking)}"
        )
    if options.api_key == "":
        raise ValueError("--api-key: expected a key, got an empty one")
    from blockbatch.cli.version import version
    from blockbatch.serving.server import run as serve
    from blockbatch.serving.service import Settings

    settings = Settings(
        model_name=options.served_model_name or options.model,
        options=given_options(options),
        chat_format=options.chat_format,
        api_key=options.api_key,
        request_timeout=options.request_timeout,
        drain_seconds=options.drain_seconds,
        max_body_bytes=options.max_body_bytes,
        log_prompts=options.log_prompts,
        page=not options.no_page and size == 1,  # it decodes beside the engine
    )

    status = serve(
        settings,
        lambda: model_and_engine(options),
        host=options.host,
        port=options.port,
        version=version(),
        log_level=options.log_level,
    )
    if status:
        raise SystemExit(status)


def follow(options: argparse.Namespace) -> None:
    """Takes part in what the first process decodes, until that ends."""
    model = load_named(options)
    # Who tells all processes to end means the first, whose requests then end before the others may.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        engine_of(model, options).follow()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def model_and_engine(options: argparse.Namespace) -> tuple[Any, Any]:
    """What the options name, loaded."""
    model = load_named(options)
    return model, engine_of(model, options)


def engine_of(model: Any, options: argparse.Namespace) -> Any:
    """The engine that the options name."""
    from blockbatch.decoding.engine import Engine

    return Engine(
        model,
        max_requests=options.max_requests,
        max_queue=options.max_queue,
        branches=options.branches,
        max_tokens_per_step=options.max_tokens_per_step,
        deterministic=options.deterministic,
        cache_tokens=options.cache_tokens,
    )


def seconds(text: str) -> float:
    """a positive number of seconds"""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def _positive(text: str) -> int:
    """an integer of at least 1"""
    return _at_least(text, 1)


def _count(text: str) -> int:
    """an integer of at least 0"""
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text!r}")
    return value
