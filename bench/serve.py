"""The server under load: tokens a second, first text and end of answers, beside the same without it.

    python bench/serve.py [--model tiny --device cpu] [--out bench/results/serve_cpu.json]
    python bench/serve.py --model llada-8b [--out bench/results/serve.json]
    python bench/serve.py --model llada-8b --settings dual_cache --clients 1 8 32 --rounds 4 --checked 4

Every setting decodes the same requests one by one (`generate`), in fixed batches (`generate` with a list),
by the engine alone (serve_engine.py), and through the server with 1, 8, 32 and 64 streams at a time; `--by`
names some of these. Answers must be the text that `generate` gives the request alone with as many branches
(`--checked`: those of so many requests). Tokens are those before the end of the texts. "first" is the first
final text, "whole" the end of an answer, both from the client's request on. The file is written after every
line.
Large shapes have random weights and scripted predictions, see serve_model.py.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
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
from serve_engine import RESULTS, arguments, measured, new_engine, save, tell
from serve_settings import RULES, SETTINGS, config_of
from timing import synchronize

import blockbatch
from blockbatch.decoding.engine import Engine

_BY = ("one", "batches", "engine", "server")


class Expected:
    """What `generate` gives each request alone, by its number of branches."""

    def __init__(
        self, model: Any, prompts: list[list[int]], setting: str, gen_length: int, checked: int | None = None
    ) -> None:
        self._about, self._checked = (model, prompts, setting, gen_length), checked
        self._known: dict[tuple[int, int | None], blockbatch.Result] = {}

    def result(self, number: int, branches: int | None = None) -> blockbatch.Result:
        model, prompts, setting, gen_length = self._about
        if (number, branches) not in self._known:
            config = config_of(setting, gen_length, branches)
            self._known[number, branches] = blockbatch.generate(model, prompts[number], config)
        return self._known[number, branches]

    def check(self, number: int, text: str, branches: int | None = None) -> None:
        if self._checked is not None and number >= self._checked:
            return
        if text != self.result(number, branches).text:
            raise SystemExit(f"{self._about[2]}: request {number} has another text than alone")


def without_server(
    model: Any, prompts: list[list[int]], setting: str, expected: Expected, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The same requests one by one, in fixed batches, and by the engine alone."""
    config = config_of(setting, options.gen_length)
    sizes = [1] if "one" in options.by else []
    for size in (*sizes, *(options.batches if "batches" in options.by else ())):
        asked = few(prompts, size, options)
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
    for clients in options.clients if "engine" in options.by else ():
        found = measured(model, few(prompts, clients, options), setting, clients, vars(options))
        tell(found)
        yield found


def few(prompts: list[list[int]], at_a_time: int, options: argparse.Namespace) -> list[list[int]]:
    """As many as give a steady rate with so many at a time."""
    return prompts[: options.rounds * at_a_time]


def by_server(
    port: int,
    prompts: list[list[int]],
    setting: str,
    clients: int,
    expected: Expected,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The server with so many streams at a time, some before it counts."""
    own, prompts = SETTINGS[setting], few(prompts, clients, options)
    bodies = [{"prompt": ids, "max_tokens": options.gen_length, "blockbatch": own} for ids in prompts]
    serve_client.load(port, bodies[: max(2 * clients, 8)], clients)
    told, seconds = serve_client.load(port, bodies, clients)
    for answer in told:
        expected.check(answer.number, answer.text, answer.branches if RULES[setting] == "load" else None)
    found = line(setting, "server", clients, sum(answer.tokens for answer in told), seconds)
    for name in ("first", "whole"):
        spans = sorted(getattr(answer, name) for answer in told)
        found[f"{name}_s"] = {
            "p50": statistics.median(spans),
            "p99": spans[math.ceil(0.99 * (len(spans) - 1))],
        }
    found["branches"] = statistics.mean(answer.branches for answer in told)
    return found


def line(setting: str, by: str, at_a_time: int, tokens: int, seconds: float) -> dict[str, Any]:
    rate = tokens / seconds
    print(f"{setting:30} {by:16} {at_a_time:3} at a time  {rate:9.1f} tokens/s", flush=True)
    return {"setting": setting, "by": by, "at_a_time": at_a_time, "tokens": tokens, "seconds": seconds,
            "tokens_per_s": rate}  # fmt: skip


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
                alone, engine = rates.get(("one by one", 1)), rates.get(("engine", clients))
                figures = {
                    name: rate / other
                    for name, other in (("times_one_by_one", alone), ("share_of_the_engine", engine))
                    if other
                }
                found.append({"setting": setting, "streams": clients, **figures})
    return found


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(json.loads(sys.argv[2])))
    on_gpu = torch.cuda.is_available()
    parser = arguments(__doc__, on_gpu)
    parser.add_argument("--batches", nargs="*", type=int, default=[8, 32])
    parser.add_argument("--by", nargs="*", choices=_BY, default=_BY)
    parser.add_argument("--checked", type=int, help="requests that are also decoded alone; left out: all")
    parser.add_argument("--out", type=Path, default=RESULTS / ("serve.json" if on_gpu else "serve_cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    given = {key: value for key, value in vars(options).items() if key != "out"}
    model, prompts = serve_model.load(given)
    lines: list[dict[str, Any]] = []
    for line in lines_of(model, prompts, options, given):
        lines.append(line)
        report(options, model.device, lines, last=False)
    report(options, model.device, lines, last=True)


def lines_of(
    model: Any, prompts: list[list[int]], options: argparse.Namespace, given: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    for setting in options.settings:
        expected = Expected(model, prompts, setting, options.gen_length, options.checked)
        yield from without_server(model, prompts, setting, expected, options)
        model.runners = None
        gc.collect()
        if "server" not in options.by:
            continue
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        with server(setting, given) as port:
            for clients in options.clients:
                yield by_server(port, prompts, setting, clients, expected, options)


def report(
    options: argparse.Namespace, device: torch.device, lines: list[dict[str, Any]], *, last: bool
) -> None:
    results = dict(requests=options.requests, lines=lines, compared=compared(lines))
    save(options, device, last, **results)


if __name__ == "__main__":
    main()
