"""The server under load: tokens a second, first text and end of answers, beside the same without it.

    python bench/serve.py [--model tiny --device cpu] [--out bench/results/serve_cpu.json]
    python bench/serve.py --model llada-8b [--out bench/results/serve.json]

Every setting decodes the same requests one by one (`generate`), in fixed batches (`generate` with a list),
by the engine alone, and through the server with 1, 8, 32 and 64 streams at a time. Before any figure counts,
every answer must be the text that `generate` gives the request alone with as many branches. Tokens are those
before the end of the texts. "first" is the first final text, "whole" the end of an answer, both from the
client's request on.
Large shapes have random weights and scripted predictions, see serve_model.py.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import serve_client
import serve_model
import torch
from random_models import DTYPES
from timing import synchronize, write_report

import blockbatch
from blockbatch.decoding.admission import fewer_sizes
from blockbatch.decoding.engine import Engine

RESULTS = Path(__file__).parent / "results"
# Name -> options of a decode, and the engine's rule for branches.
SETTINGS = {
    "dual_cache": ({"method": "dual_cache", "eos_exit": "prefix"}, "fixed"),
    "careful": ({"preset": "careful"}, "fixed"),
    "blockbatch": ({"method": "blockbatch"}, "fixed"),
    "blockbatch, branches by load": ({"method": "blockbatch"}, "load"),
}
_MOST_QUEUED = 4096
# Requests for each place.
_ROUNDS = 16
# Positions of the engine's cache on a GPU, which two processes share here: 24 GiB in the shape of LLaDA-8B.
_CACHE_TOKENS = 48 * 1024


def config_of(setting: str, gen_length: int, branches: int | None = None) -> blockbatch.DecodeConfig:
    options = {**SETTINGS[setting][0], "gen_length": gen_length}
    preset = options.pop("preset", None)
    made = blockbatch.DecodeConfig.preset(preset, **options) if preset else blockbatch.DecodeConfig(**options)
    if branches is None or made.block_sizes is None or branches == len(made.block_sizes):
        return made
    return blockbatch.DecodeConfig(**options, block_sizes=fewer_sizes(made.block_sizes, branches))


class Expected:
    """What `generate` gives each request alone, by its number of branches."""

    def __init__(self, model: Any, prompts: list[list[int]], setting: str, gen_length: int) -> None:
        self._about = model, prompts, setting, gen_length
        self._known: dict[tuple[int, int | None], blockbatch.Result] = {}

    def result(self, number: int, branches: int | None = None) -> blockbatch.Result:
        model, prompts, setting, gen_length = self._about
        if (number, branches) not in self._known:
            config = config_of(setting, gen_length, branches)
            self._known[number, branches] = blockbatch.generate(model, prompts[number], config)
        return self._known[number, branches]

    def check(self, number: int, text: str, branches: int | None = None) -> None:
        if text != self.result(number, branches).text:
            raise SystemExit(f"{self._about[2]}: request {number} has another text than alone")


def without_server(
    model: Any, prompts: list[list[int]], setting: str, expected: Expected, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The same requests one by one, in fixed batches, and by the engine alone."""
    config = config_of(setting, options.gen_length)
    for size in (1, *options.batches):
        asked = few(prompts, size)
        blockbatch.generate(model, asked[:size], config)
        synchronize(model.device)
        begun = time.perf_counter()
        results = []
        for start in range(0, len(asked), size):
            results += blockbatch.generate(model, asked[start : start + size], config)
        seconds = time.perf_counter() - begun
        for number, result in enumerate(results):
            expected.check(number, result.text)
        name = "one by one" if size == 1 else f"batches of {size}"
        yield line(setting, name, size, sum(len(result.tokens) for result in results), seconds)
    if model.runners is not None:
        model.runners = None
    for clients in options.clients:
        yield by_engine(model, prompts, setting, clients, options)


def few(prompts: list[list[int]], at_a_time: int) -> list[list[int]]:
    """As many as give a steady rate with so many at a time."""
    return prompts[: _ROUNDS * at_a_time]


def by_engine(
    model: Any, prompts: list[list[int]], setting: str, clients: int, options: argparse.Namespace
) -> dict[str, Any]:
    """The engine without HTTP, with so many requests in it all the time."""
    engine, prompts = new_engine(model, setting, options), few(prompts, clients)
    config, waiting, done = config_of(setting, options.gen_length), list(range(len(prompts))), []

    def submit() -> None:
        if waiting:
            engine.submit(prompts[waiting.pop()], config, on_update=note)

    def note(request: Any) -> None:
        if request.ended:
            if request.error is not None:
                raise SystemExit(f"engine: {request.error!r}")
            done.append(request.result)
            submit()

    def run() -> float:
        begun = time.perf_counter()
        for _ in range(clients):
            submit()
        engine.run_until_idle()
        return time.perf_counter() - begun

    run()
    waiting, warm = list(range(len(prompts))), done.copy()
    done.clear()
    seconds = run()
    if len(done) != len(prompts) or len(warm) != len(prompts):
        raise SystemExit(f"engine: {len(done)} of {len(prompts)} requests ended")
    engine.close()
    return line(setting, "engine", clients, sum(len(result.tokens) for result in done), seconds)


def by_server(
    port: int, prompts: list[list[int]], setting: str, clients: int, expected: Expected, gen_length: int
) -> dict[str, Any]:
    """The server with so many streams at a time, once before it counts."""
    own, prompts = SETTINGS[setting][0], few(prompts, clients)
    bodies = [{"prompt": ids, "max_tokens": gen_length, "blockbatch": own} for ids in prompts]
    serve_client.load(port, bodies, clients)
    told, seconds = serve_client.load(port, bodies, clients)
    for answer in told:
        expected.check(
            answer.number, answer.text, answer.branches if SETTINGS[setting][1] == "load" else None
        )
    found = line(setting, "server", clients, sum(answer.tokens for answer in told), seconds)
    for name in ("first", "whole"):
        spans = sorted(getattr(answer, name) for answer in told)
        found[f"{name}_s"] = {"p50": statistics.median(spans), "p99": spans[int(0.99 * (len(spans) - 1))]}
    found["branches"] = statistics.mean(answer.branches for answer in told)
    return found


def line(setting: str, by: str, at_a_time: int, tokens: int, seconds: float) -> dict[str, Any]:
    rate = tokens / seconds
    print(f"{setting:30} {by:16} {at_a_time:3} at a time  {rate:9.1f} tokens/s", flush=True)
    return {"setting": setting, "by": by, "at_a_time": at_a_time, "tokens": tokens, "seconds": seconds,
            "tokens_per_s": rate}  # fmt: skip


def new_engine(model: Any, setting: str, options: argparse.Namespace | dict[str, Any]) -> Engine:
    given = vars(options) if isinstance(options, argparse.Namespace) else options
    return Engine(
        model,
        max_requests=given["max_requests"],
        max_queue=_MOST_QUEUED,
        branches=SETTINGS[setting][1],
        cache_tokens=given["cache_tokens"],
    )


@contextlib.contextmanager
def server(setting: str, options: dict[str, Any]) -> Iterator[int]:
    """A server in a process of its own; gives its port."""
    command = [sys.executable, __file__, "--child", json.dumps({**options, "setting": setting})]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    ports: list[int] = []
    ready = threading.Event()

    def read() -> None:
        for text in process.stderr:
            with contextlib.suppress(ValueError):
                told = json.loads(text)
                ports.extend([told["port"]] if told["event"] == "listening" else [])
                if told["event"] == "ready":
                    ready.set()
                if told["level"] in ("info", "debug"):
                    continue
            print(text, end="", file=sys.stderr)
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        ready.wait()
        if process.poll() is not None or not ports:
            raise SystemExit("the server did not start")
        yield ports[0]
    finally:
        process.terminate()
        process.wait(60)


def child(options: dict[str, Any]) -> int:
    """The server's process."""
    from blockbatch.serving.server import run
    from blockbatch.serving.service import Settings

    torch.set_num_threads(options["threads"])

    def load() -> tuple[Any, Engine]:
        model = serve_model.load(options)[0]
        return model, new_engine(model, options["setting"], options)

    settings = Settings(options["model"], request_timeout=None, page=False)
    return run(settings, load, host="127.0.0.1", port=0, version="bench", log_level="info")


def compared(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each server's line beside the same setting one by one, and beside the engine alone."""
    found = []
    for setting in SETTINGS:
        rates = {
            (one["by"], one["at_a_time"]): one["tokens_per_s"] for one in lines if one["setting"] == setting
        }
        for (by, clients), rate in rates.items():
            if by == "server":
                alone, engine = rates["one by one", 1], rates["engine", clients]
                figures = {"times_one_by_one": rate / alone, "share_of_the_engine": rate / engine}
                found.append({"setting": setting, "streams": clients, **figures})
    return found


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(json.loads(sys.argv[2])))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--model", default="llada-8b" if on_gpu else "tiny", help="tiny, or a shape")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--backend", choices=("reference", "triton", "cuda"))
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--clients", nargs="*", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--batches", nargs="*", type=int, default=[8, 32])
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--prompt-length", type=int, default=256, help="of random weights")
    parser.add_argument("--gen-length", type=int, default=256 if on_gpu else 128)
    parser.add_argument("--max-requests", type=int, default=64)
    parser.add_argument("--cache-tokens", type=int, default=_CACHE_TOKENS if on_gpu else None, metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS / ("serve.json" if on_gpu else "serve_cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    given = {key: value for key, value in vars(options).items() if key != "out"}
    lines: list[dict[str, Any]] = []
    for setting in options.settings:
        model, prompts = serve_model.load(given)
        device = model.device
        expected = Expected(model, prompts, setting, options.gen_length)
        lines += without_server(model, prompts, setting, expected, options)
        model.runners = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        with server(setting, given) as port:
            for clients in options.clients:
                lines.append(by_server(port, prompts, setting, clients, expected, options.gen_length))
        del model, expected
    rounded = [
        {key: round(value, 5) if isinstance(value, float) else value for key, value in one.items()}
        for one in (*lines, *compared(lines))
    ]
    write_report(
        options, device, model=options.model, gen_length=options.gen_length, requests=options.requests,
        lines=rounded[: len(lines)], compared=rounded[len(lines) :],
    )  # fmt: skip


if __name__ == "__main__":
    main()
