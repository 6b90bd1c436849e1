"""`blockbatch dynamo`, or `python -m blockbatch.serving.dynamo`: a worker of NVIDIA Dynamo."""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from typing import Any

from blockbatch.cli import serve
from blockbatch.cli.arguments import add_decoding, given_options, methods_note
from blockbatch.cli.help import examples

_NEEDED = ("dynamo", "pydantic", "prometheus_client")


def add_parser(commands: Any) -> None:
    """Adds the command to those of `blockbatch`."""
    parser = commands.add_parser(
        "dynamo",
        help="serve a model as a worker of NVIDIA Dynamo",
        description="Serve a model behind `python -m dynamo.frontend`, which finds the worker by a folder "
        "(DYN_FILE_KV). Requests of a worker that dies go on with another one, token by token as they began.",
        epilog=methods_note()
        + "\n\n"
        + examples(
            "blockbatch dynamo tiny",
            "blockbatch dynamo GSAI-ML/LLaDA-8B-Instruct --device cuda:1 --preset careful",
        ),
    )
    parser.set_defaults(run=run)
    serve.add_model(parser)
    worker = parser.add_argument_group("Dynamo")
    worker.add_argument(
        "--endpoint",
        default="dynamo.blockbatch.generate",
        metavar="NAMES",
        help="namespace, component and endpoint (dynamo.blockbatch.generate)",
    )
    worker.add_argument(
        "--discovery-backend",
        default=os.environ.get("DYN_DISCOVERY_BACKEND", "file"),
        help="how the frontend finds the worker (DYN_DISCOVERY_BACKEND of the environment; file)",
    )
    worker.add_argument(
        "--host",
        default=os.environ.get("DYN_TCP_RPC_HOST", "127.0.0.1"),
        help="address to listen on for the frontend (DYN_TCP_RPC_HOST of the environment; 127.0.0.1)",
    )
    worker.add_argument(
        "--drain-seconds",
        type=serve.seconds,
        default=30.0,
        metavar="SECONDS",
        help="for running requests after SIGTERM, before they move to another worker (30)",
    )
    worker.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    serve.add_engine(parser)
    add_decoding(parser)


def run(options: argparse.Namespace) -> None:
    """Works until it is told to end; leaves by SystemExit where the status is not 0."""
    lacking = [name for name in _NEEDED if find_spec(name) is None]
    if lacking:
        raise RuntimeError(
            "dynamo: expected the packages of the extra cluster (pip install 'blockbatch[cluster]'), lacking "
            f"are {', '.join(lacking)}"
        )
    if len(options.endpoint.split(".")) != 3:
        raise ValueError(f"--endpoint: expected three names with dots between them, got {options.endpoint!r}")
    from blockbatch.models.checkpoint import resolve_folder
    from blockbatch.models.model import BUILT_IN
    from blockbatch.serving.dynamo import Settings
    from blockbatch.serving.dynamo import run as work

    os.environ["DYN_TCP_RPC_HOST"] = options.host
    settings = Settings(
        model_name=options.served_model_name or options.model,
        folder=BUILT_IN.get(options.model) or resolve_folder(options.model),
        endpoint=options.endpoint,
        options=given_options(options),
        chat_format=options.chat_format,
        max_requests=options.max_requests,
        drain_seconds=options.drain_seconds,
        discovery=options.discovery_backend,
    )
    status = work(settings, lambda: serve.model_and_engine(options), log_level=options.log_level)
    if status:
        raise SystemExit(status)
